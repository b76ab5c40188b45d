"""Checkpoints: exact continuation, and a kill at any moment leaves a whole one."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integration.checkpoints import read, save
from shared import python_path
from torch import nn

from firm import dist
from firm.config.launch import LocalLaunch
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.records import UserError
from firm.storage.artifacts import Output
from firm.storage.checkpoint import Checkpoints, load_optimizer, load_state, optimizer_tensors, save_state
from firm.storage.open import open_store


class Killed(BaseException):
    """Stands for a kill -9."""


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    module(torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()


def made() -> tuple[nn.Module, torch.optim.AdamW, list[str]]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    named = dict(module.named_parameters())
    return module, torch.optim.AdamW(named.values(), lr=0.1), list(named)


def test_training_continues_exactly(tmp_path: Path) -> None:
    module, optimizer, names = made()
    for seed in range(3):
        step(module, optimizer, seed)
    save_state(tmp_path / "c", {**module.state_dict(), **optimizer_tensors(optimizer, names)}, {"epoch": 3})
    for seed in range(3, 6):
        step(module, optimizer, seed)
    again, other, _ = made()
    tensors, state = load_state(tmp_path / "c")
    assert state == {"epoch": 3}
    again.load_state_dict({k: t for k, t in tensors.items() if not k.startswith("optimizer/")})
    load_optimizer(other, names, tensors)
    for seed in range(3, 6):
        step(again, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(("options", "where"), [({}, "cpu"), ({"fused": True}, "meta"), ({"capturable": True}, "meta")])
def test_steps_are_counted_where_the_optimizer_needs_them(options: dict[str, Any], where: str) -> None:
    module, optimizer, names = made()
    step(module, optimizer, 0)
    tensors = optimizer_tensors(optimizer, names)
    elsewhere = [nn.Parameter(p.to("meta")) for p in module.parameters()]  # stands for a GPU
    other = torch.optim.AdamW(elsewhere, **options)
    load_optimizer(other, names, tensors)
    for parameter in elsewhere:
        devices = {key: value.device.type for key, value in other.state[parameter].items()}
        assert devices == {"step": where, "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_tensors_that_share_memory_types_and_devices_survive(tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    tensors = {"a": x, "b": x.t(), "c": x[0], "d": torch.tensor(3), "e": x.bfloat16(), "f": torch.zeros(0)}
    save_state(tmp_path / "deep" / "c", tensors, {"history": [{"a": 0.1}], "none": None})
    found, state = load_state(tmp_path / "deep" / "c")
    assert state == {"history": [{"a": 0.1}], "none": None}
    assert all(torch.equal(found[k], t) and found[k].dtype == t.dtype for k, t in tensors.items())
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"tensors.safetensors", "state.json"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        save_state(tmp_path / "file" / "c", {}, {})
    assert str(tmp_path / "file" / "c") in str(caught.value)


# ---- the last one


@pytest.fixture(params=["folder", "bucket"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A store in a folder and one in S3."""
    return str(tmp_path / "out") if request.param == "folder" else request.getfixturevalue("s3_uri") + "/out"


def test_the_last_checkpoint_is_found_and_the_one_before_stays(uri: str, tmp_path: Path) -> None:
    out = Output.open(uri, tmp_path / "here")
    assert read(out) is None
    for number in (1, 2, 2, 3):
        save(out, number)
        assert read(out) == number
    elsewhere = Output.open(uri, tmp_path / "elsewhere")
    (elsewhere.folder / "metrics").unlink(missing_ok=True)
    assert read(elsewhere) == 3 and (elsewhere.folder / "metrics").read_text() == "3"
    assert sorted(p.name for p in Checkpoints(elsewhere).folder.iterdir()) == ["step-2", "step-3"]


def test_a_checkpoint_is_overdue_some_minutes_after_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("firm.storage.checkpoint.time.monotonic", lambda: now[0])
    out = Output.open(str(tmp_path))
    checkpoints = Checkpoints(out, minutes=2)
    save_state(checkpoints.folder / "x", {"x": torch.zeros(1)}, {})
    found = []
    for now[0] in (0, 119, 120, 121):
        found.append(checkpoints.overdue())
    checkpoints.keep("x")
    for now[0] in (122, 241):
        found.append(checkpoints.overdue())
    assert found == [False, False, True, True, False, True]
    assert not Checkpoints(out).overdue()


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped byte": lambda folder: flip(folder / "tensors.safetensors"),
    "flipped digit": lambda folder: (folder / "state.json").write_text('{"number": 3}'),
    "flipped other": lambda folder: flip(folder / "others" / "metrics"),
    "truncated file": lambda folder: truncate(folder / "tensors.safetensors"),
    "empty file": lambda folder: (folder / "state.json").write_bytes(b""),
    "lost file": lambda folder: (folder / "tensors.safetensors").unlink(),
    "empty contents": lambda folder: (folder / "checkpoint.json").write_bytes(b""),
    "torn contents": lambda folder: truncate(folder / "checkpoint.json"),
    "flipped contents": lambda folder: flip(folder / "checkpoint.json"),
    "lost contents": lambda folder: (folder / "checkpoint.json").unlink(),
    "lost folder": shutil.rmtree,
    "other files": lambda folder: (folder / "tensors.safetensors").rename(folder / "weights"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    out = Output.open(uri, tmp_path / "here")
    for number in (1, 2):
        save(out, number)
    DAMAGES[damage](Checkpoints(out).folder / "step-2")
    assert read(out) == 1 and (out.folder / "metrics").read_text() == "1"
    said = capsys.readouterr().out
    assert "going on from step-1" in said
    if not damage.startswith("lost c") and damage != "lost folder":  # as if it had never been brought to its end
        assert "the checkpoint step-2 is damaged and set aside: " in said
        assert [path.name.startswith("step-2-") for path in (out.folder / "work" / "set-aside").iterdir()] == [True]
    save(out, 2)
    assert read(out) == 2, "the work is done again"
    DAMAGES[damage](Checkpoints(out).folder / "step-2")
    DAMAGES[damage](Checkpoints(out).folder / "step-1")
    assert read(out) is None, "without a sound one it starts anew"


def test_a_damaged_checkpoint_takes_the_place_of_no_sound_one(uri: str, tmp_path: Path) -> None:
    out = Output.open(uri, tmp_path / "here")
    for number in (1, 2):
        save(out, number)
    truncate(Checkpoints(out).folder / "step-2" / "checkpoint.json")
    save(out, 3)
    flip(Checkpoints(out).folder / "step-3" / "tensors.safetensors")
    assert read(out) == 1


def test_damage_in_a_bucket_is_found_by_the_next_machine(s3_uri: str, tmp_path: Path) -> None:
    out = Output.open(s3_uri, tmp_path / "here")
    for number in (1, 2):
        save(out, number)
    store = open_store(s3_uri)
    key = "work/checkpoints/step-2/tensors.safetensors"
    store.put(key, store.get(key)[:-4] + b"\0\0\0\0")
    elsewhere = Output.open(s3_uri, tmp_path / "elsewhere")
    assert read(elsewhere) == 1
    assert not store.list("work/checkpoints/step-2/")
    assert read(Output.open(s3_uri, tmp_path / "third")) == 1


WORKER = """
from firm import dist
from firm.launch.job import worker_main
from firm.storage.checkpoint import Checkpoints

def train(request, inputs, out):
    (out.folder / f"rank{dist.start().rank}").write_text(Checkpoints(out).last().name)

worker_main(train)
"""


def test_all_ranks_go_on_from_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "resuming.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    out = Output.open(str(tmp_path / "out"))
    for number in (1, 2):
        save(out, number)
    DAMAGES["flipped byte"](Checkpoints(out).folder / "step-2")
    launch(TrainingJob("run", "rl", "resuming", {}, {}), out, LocalLaunch(num_workers=2))
    assert [(out.folder / f"rank{rank}").read_text() for rank in range(2)] == ["step-1", "step-1"]


def test_a_damaged_copy_on_another_machine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Output.open(str(tmp_path))
    save(out, 1)
    DAMAGES["flipped byte"](Checkpoints(out).folder / "step-1")
    monkeypatch.setattr(dist, "start", lambda: dist.Ranks(1, 2, torch.device("cpu")))
    monkeypatch.setattr(dist, "gather", lambda items, ranks: ["step-1"])  # what the first rank says
    with pytest.raises(UserError, match="a damaged checkpoint: tensors.safetensors: SHA-256") as caught:
        Checkpoints(out).last()
    assert "run again" in caught.value.fix


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_any_byte_is_found(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / str(time.monotonic_ns())
    out = Output.open(str(folder))
    for number in (1, 2):
        save(out, number)
    files = sorted(path for path in (Checkpoints(out).folder / "step-2").rglob("*") if path.is_file())
    path = data.draw(st.sampled_from(files))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    found = read(out)
    assert found == 1 or (found == 2 and path.name == "checkpoint.json"), "damage of the table that changes no meaning"


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Output.open(uri, tmp_path / "here")
    save(out, 1)
    for count in range(50):
        with monkeypatch.context() as patch:
            killed = killed_at(count, patch, out, 2)
        elsewhere = Output.open(uri, tmp_path / f"elsewhere-{count}")
        assert read(elsewhere) in (1, 2) and int((elsewhere.folder / "metrics").read_text()) >= (read(elsewhere) or 0)
        save(out, 1)
        if not killed:
            assert count > 3
            return
    raise AssertionError("saving never ended")


def killed_at(count: int, patch: pytest.MonkeyPatch, out: Output, number: int) -> bool:
    """Save and be killed in place of the ``count``-th operation; False if there were fewer."""
    left = [count]

    def deadly(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return real(*args, **kwargs)

        patch.setattr(owner, name, call)

    for name in ("mkdir", "replace", "write_text", "unlink"):
        deadly(Path, name)
    deadly(Output, "_publish_one")
    deadly(Output, "discard")
    try:
        save(out, number)
    except Killed:
        return True
    return False
