"""Checkpoints: exact continuation, and a kill at any moment leaves a whole one."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from firm.checkpoint import load_checkpoint, load_optimizer, optimizer_tensors, save_checkpoint
from firm.records import UserError


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
    save_checkpoint(tmp_path / "c", {**module.state_dict(), **optimizer_tensors(optimizer, names)}, {"epoch": 3})
    for seed in range(3, 6):
        step(module, optimizer, seed)
    again, other, _ = made()
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded is not None and loaded[1] == {"epoch": 3}
    again.load_state_dict({k: t for k, t in loaded[0].items() if not k.startswith("optimizer/")})
    load_optimizer(other, names, loaded[0])
    for seed in range(3, 6):
        step(again, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_tensors_that_share_memory_types_and_devices_survive(tmp_path: Path) -> None:
    x = torch.randn(4, 4)
    tensors = {"a": x, "b": x.t(), "c": x[0], "d": torch.tensor(3), "e": x.bfloat16(), "f": torch.zeros(0)}
    save_checkpoint(tmp_path / "deep" / "c", tensors, {"history": [{"a": 0.1}], "none": None})
    found = load_checkpoint(tmp_path / "deep" / "c")
    assert found is not None and found[1] == {"history": [{"a": 0.1}], "none": None}
    assert all(torch.equal(found[0][k], t) and found[0][k].dtype == t.dtype for k, t in tensors.items())


def test_nothing_there_is_none_and_nothing_is_pickled(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "c") is None
    save(tmp_path / "c", 1)
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"tensors.safetensors", "state.json"}


def save(folder: Path, number: int) -> None:
    save_checkpoint(folder, {"x": torch.full((3,), float(number))}, {"number": number})


def read(folder: Path) -> int | None:
    loaded = load_checkpoint(folder)
    if loaded is None:
        return None
    assert loaded[0]["x"].tolist() == [loaded[1]["number"]] * 3, "half of one and half of another"
    return int(loaded[1]["number"])


def killed_at(count: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> bool:
    """Run ``work`` and kill it in place of its ``count``-th operation on files; False if there were fewer."""
    left = [count]

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("mkdir", "rename", "write_text", "unlink"):
            patch.setattr(Path, name, deadly(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        try:
            work()
        except Killed:
            return True
    return False


def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in range(20):
        folder = tmp_path / str(count) / "c"
        save(folder, 1)
        killed = killed_at(count, monkeypatch, lambda folder=folder: save(folder, 2))  # type: ignore[misc]
        assert read(folder) in (1, 2)
        save(folder, 3)
        assert read(folder) == 3 and [p.name for p in folder.parent.iterdir()] == ["c"]
        if not killed:
            assert count > 4
            return
    raise AssertionError("saving never ended")


def test_a_second_kill_after_one_between_the_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in range(20):
        folder = tmp_path / str(count) / "c"
        save(folder, 1)
        folder.rename(folder.with_name("c.old"))  # what a kill between the two renames leaves
        assert read(folder) == 1
        if not killed_at(count, monkeypatch, lambda folder=folder: save(folder, 2)):  # type: ignore[misc]
            return
        assert read(folder) in (1, 2), f"killed at operation {count}"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write a checkpoint") as caught:
        save(tmp_path / "file" / "c", 1)
    assert str(tmp_path / "file" / "c") in str(caught.value)
