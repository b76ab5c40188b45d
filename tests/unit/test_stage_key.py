"""The key of a stage: whatever its result depends on changes it, nothing else does."""

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from firm import stage
from firm.bench.run import STAGE as BENCH
from firm.config import STAGES, RewardConfig, RunConfig
from firm.config.chat import PythonChat
from firm.config.curation import FunctionSource
from firm.config.loading import load_config
from firm.config.prompts import PromptsConfig
from firm.critics.rubrics import load_rubric, parse_rubric
from firm.curation.run import STAGE as CURATION
from firm.images import encode_image
from firm.records import ArtifactRef, Stage, UserError
from firm.stage import stage_key
from firm.storage.digests import content_hash

OLD = 1_000_000_000  # a time of change long ago: as good as certain not to change again unnoticed


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's prompts, images and models, and a memory of hashes of their own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "memory"))
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(encode_image(Image.new("RGB", (8, 8), (i, 0, 0))))
    rows = [{"prompt": "a red circle", "image": f"{i}.png"} for i in range(2)]
    (tmp_path / "candidates.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for model in ("policy", "critic"):
        (tmp_path / model / "weights").mkdir(parents=True)
        (tmp_path / model / "weights" / "model.safetensors").write_bytes(b"\0" * 100)
    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        os.utime(path, (OLD, OLD))
    return tmp_path


@pytest.fixture
def later() -> Iterator[pytest.MonkeyPatch]:
    """An hour after the files were written, so that they are as good as certain not to change again unnoticed."""
    with pytest.MonkeyPatch.context() as clock:
        now = time.time
        clock.setattr(time, "time", lambda: now() + 3600)
        yield clock


@pytest.fixture
def config(folder: Path) -> RunConfig:
    return load_config(
        "gen-shapes",
        [
            f"prompts.path={folder}/prompts.txt",
            f"curation.sources=[{{kind: files, name: mine, path: {folder}/candidates.jsonl}}]",
            f"policy.model={folder}/policy",
            f"critic.model={folder}/critic",
        ],
    )


def key(config: RunConfig, sections: tuple[str, ...] = CURATION.sections, **inputs: str) -> str:
    refs = {name: ArtifactRef(uri="anywhere", sha256=sha) for name, sha in inputs.items()}
    return stage_key(Stage(name="a-stage", sections=sections), config, refs)


def change(config: RunConfig, **sections: Any) -> RunConfig:
    return config.model_copy(update=sections)


def test_it_depends_on_its_sections_and_inputs_only(config: RunConfig) -> None:
    before = key(config, data="a" * 64)
    assert key(config, data="a" * 64) == before != key(config, data="b" * 64) != key(config)
    assert key(change(config, seed=7), data="a" * 64) != before
    assert key(change(config, name="other", store="elsewhere"), data="a" * 64) == before
    assert key(change(config, sft=config.sft.model_copy(update={"batch_size": 3})), data="a" * 64) == before
    assert stage_key(CURATION, config, {}) != key(config)
    critic = config.critic.model_copy(update={"answer_style": "reason_first"})
    assert key(change(config, critic=critic), data="a" * 64) != before
    critic = config.critic.model_copy(update={"batch_size": 3})  # no part of "critic.rubrics"
    assert key(change(config, critic=critic), data="a" * 64) == before


def test_what_follows_from_a_section_can_be_all_that_counts(config: RunConfig) -> None:
    """The bench asks which dimensions are rewarded, not by which formula."""
    base, bonuses = config.reward.base, config.reward.bonuses
    before = key(config, BENCH.sections)
    same = RewardConfig(formula="weighted_sum", base=base, bonuses=bonuses, weights=[0.5, 0.5])
    assert key(change(config, reward=same), BENCH.sections) == before
    other = RewardConfig(formula="base_only", base=base, bonuses=bonuses)
    assert key(change(config, reward=other), BENCH.sections) != before


@pytest.mark.parametrize("name", ["edits.json", "edits.jsonl"])
def test_source_images_of_prompts_count(config: RunConfig, folder: Path, name: str) -> None:
    row = {"prompt": "make it red", "source_image": "0.png"}
    (folder / name).write_text(json.dumps([row] if name == "edits.json" else row))
    prompts = change(config, prompts=config.prompts.model_copy(update={"path": str(folder / name)}))
    before = key(prompts, ("prompts",))
    (folder / "0.png").write_bytes(b"another image")
    assert key(prompts, ("prompts",)) != before


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("prompts.txt", "prompts"),
        ("candidates.jsonl", "curation"),
        ("1.png", "curation"),
        ("policy/weights/model.safetensors", "policy"),
        ("critic/weights/model.safetensors", "critic"),
    ],
)
def test_the_content_of_every_named_file_counts(config: RunConfig, folder: Path, file: str, section: str) -> None:
    path = folder / file
    before, content = key(config, (section,)), path.read_bytes()
    os.utime(path, (OLD + 5, OLD + 5))
    assert key(config, (section,)) == before, "a new time alone is no change"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    changed = key(config, (section,))
    assert changed != before and key(config, (section,)) == changed
    path.write_bytes(content)
    assert key(config, (section,)) == before
    path.unlink()
    with pytest.raises(UserError, match="(?i)no such file") as caught:
        if section in ("policy", "critic"):  # a folder with a file less is another model, not an error
            assert key(config, (section,)) not in (before, changed)
            raise UserError("no such file", str(path))
        key(config, (section,))
    assert path.name in str(caught.value)


def test_a_model_folder_that_is_missing_is_an_error_and_a_hub_id_is_not(config: RunConfig, folder: Path) -> None:
    (folder / "policy").rename(folder / "moved")
    with pytest.raises(UserError, match="no model folder") as caught:
        key(config, ("policy",))
    assert caught.value.where == "policy.model"
    hub = config.policy.model_copy(update={"model": "stabilityai/stable-diffusion-3.5-medium"})
    assert key(change(config, policy=hub), ("policy",))


def test_an_edited_rubric_is_another(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {section: key(config, (section,)) for section in ("curation", "critic", "critic.rubrics", "auditor", "rl")}

    def edited(name: str) -> Any:
        rubric = load_rubric(name)
        return parse_rubric(name, f"---\nanswer: {rubric.answer}\n---\n{rubric.text} edited")

    monkeypatch.setattr(stage, "load_rubric", edited)
    changed = {section for section, value in before.items() if key(config, (section,)) != value}
    assert changed == {"curation", "critic", "critic.rubrics", "auditor"}


def test_what_has_not_changed_is_not_read_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, later: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    from firm.storage import digests

    real = digests.sha256_file
    monkeypatch.setattr(digests, "sha256_file", lambda path: read.append(path) or real(path))
    first = content_hash(folder / "policy")
    assert content_hash(folder / "policy") == first and len(read) == 1
    weights = folder / "policy" / "weights" / "model.safetensors"
    later.undo()
    weights.write_bytes(b"\1" * 100)  # now: it may change again within the tick of the clock, and is not remembered
    second = content_hash(folder / "policy")
    assert second != first and len(read) == 2
    assert content_hash(folder / "policy") == second and len(read) == 3


def test_another_content_of_equal_size_and_time_counts(folder: Path, later: pytest.MonkeyPatch) -> None:
    """As of two models unpacked from archives that give every file the same time."""
    weights = folder / "policy" / "weights" / "model.safetensors"
    first = content_hash(folder / "policy")
    before = weights.stat()
    while weights.stat().st_ctime_ns == before.st_ctime_ns:  # within a tick of the clock
        weights.write_bytes(b"\1" * 100)
        os.utime(weights, (OLD, OLD))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert content_hash(folder / "policy") != first


def test_a_damaged_memory_is_no_memory(folder: Path, later: pytest.MonkeyPatch) -> None:
    first = content_hash(folder / "policy")
    [memory] = (folder / "memory").rglob("digests.json")
    memory.write_text("{")
    assert content_hash(folder / "policy") == first


def test_names_of_files_in_a_folder_count(folder: Path) -> None:
    first = content_hash(folder / "policy")
    (folder / "policy" / "weights" / "model.safetensors").rename(folder / "policy" / "weights" / "other.safetensors")
    assert content_hash(folder / "policy") != first


def test_evaluation_and_report_are_the_same_in_all_rounds(config: RunConfig) -> None:
    plain = config.model_copy(update={"rounds": 2}).model_dump(mode="json")
    seeds = {name: stage._config(name, plain, 2, {}).seed for name in STAGES}
    assert {name for name, seed in seeds.items() if seed == config.seed} == {"evaluate", "report"}


def test_lines_in_a_file_called_json_are_followed(folder: Path) -> None:
    """As rows are read: a line is a row in every file but Parquet."""
    (folder / "rows.json").write_text('{"image": "one.bin"}\n{"image": "two.bin"}\n')
    for name in ("one.bin", "two.bin"):
        (folder / name).write_bytes(b"0")
    before = content_hash(folder / "rows.json", ("image",))
    (folder / "two.bin").write_bytes(b"1")
    assert content_hash(folder / "rows.json", ("image",)) != before


# ---- what is replaced behind a name


def replace(path: Path, content: bytes) -> None:
    """As `mv` and `rsync` do: another file under the same name, of the same size and time."""
    new = path.with_name("new")
    new.write_bytes(content)
    os.utime(new, (OLD, OLD))
    new.replace(path)


def test_an_image_replaced_under_the_same_name_counts(
    config: RunConfig, folder: Path, later: pytest.MonkeyPatch
) -> None:
    before = key(config, ("curation",))
    content = (folder / "1.png").read_bytes()
    replace(folder / "1.png", content[:-1] + b"x")
    changed = key(config, ("curation",))
    replace(folder / "1.png", content)
    assert changed != before == key(config, ("curation",))


@pytest.mark.parametrize("section", ["policy", "critic"])
def test_weights_replaced_in_a_model_folder_count(
    config: RunConfig, folder: Path, later: pytest.MonkeyPatch, section: str
) -> None:
    before = key(config, (section,))
    replace(folder / section / "weights" / "model.safetensors", b"\1" * 100)
    assert key(config, (section,)) != before


LINKED = {"weights": "policy/weights/model.safetensors", "folder of weights": "policy/weights", "model": "policy"}
LINKED |= {"prompts": "prompts.txt", "image": "1.png", "rows": "candidates.jsonl"}


@pytest.mark.parametrize("what", LINKED)
def test_a_link_that_is_moved_counts(config: RunConfig, folder: Path, later: pytest.MonkeyPatch, what: str) -> None:
    """Both files lie there from the start, of the same size and, as in an archive, of the same times."""
    link = folder / LINKED[what]
    sections = ("prompts", "curation", "policy")
    link.rename(one := folder / "one")
    (shutil.copytree if one.is_dir() else shutil.copy2)(one, other := folder / "other")
    for path in [other] if other.is_file() else [p for p in other.rglob("*") if p.is_file()]:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"blue", b"pink").replace(b"\0", b"\1").replace(b'circle"', b'square"'))
        os.utime(path, (OLD, OLD))
    link.symlink_to(one)
    before = key(config, sections)
    link.unlink()
    link.symlink_to(other)
    changed = key(config, sections)
    link.unlink()
    link.symlink_to(one)
    assert changed != before == key(config, sections)


def test_a_link_is_told_by_its_inode(folder: Path, later: pytest.MonkeyPatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of the same size may have been written within one tick of the clock."""
    for name, content in (("one", b"1"), ("two", b"2")):
        (folder / name).write_bytes(content)
    tick = (folder / "one").stat().st_ctime_ns
    real = Path.stat
    frozen = lambda path, **how: Status(real(path, **how), tick)  # noqa: E731
    monkeypatch.setattr(Path, "stat", frozen)
    link = folder / "link"
    link.symlink_to(folder / "one")
    before = content_hash(link)
    link.unlink()
    link.symlink_to(folder / "two")
    assert content_hash(link) != before


class Status:
    """What is known of a file, changed at another time."""

    def __init__(self, status: os.stat_result, ctime_ns: int) -> None:
        self.status = status
        self.st_ctime_ns = ctime_ns

    def __getattr__(self, name: str) -> Any:
        return getattr(self.status, name)


def test_a_folder_that_links_to_itself_has_an_end(folder: Path) -> None:
    before = content_hash(folder / "policy")
    (folder / "policy" / "weights" / "again").symlink_to(folder / "policy")
    assert content_hash(folder / "policy") == before


def test_prompts_of_equal_text_in_other_splits_count(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which prompts are held out is decided by a share, or by a function of the user's."""
    before = key(config, ("prompts",))
    other = change(config, prompts=config.prompts.model_copy(update={"test_share": 0.5}))
    assert key(other, ("prompts",)) != before

    monkeypatch.syspath_prepend(folder)
    prompts = "def prompts(split):\n    return {'%s': ['a red circle'], '%s': ['a blue square']}[split]\n"
    (folder / "my_prompts.py").write_text(prompts % ("train", "test"))
    mine = change(config, prompts=PromptsConfig(function="my_prompts:prompts"))
    before = key(mine, ("prompts",))
    assert key(mine, ("prompts",)) == before
    (folder / "my_prompts.py").write_text(prompts % ("test", "train"))
    assert key(mine, ("prompts",)) != before


@pytest.mark.parametrize("kind", ["judge", "candidates"])
def test_the_code_of_a_judge_and_of_candidates_counts(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.syspath_prepend(folder)
    (folder / "mine.py").write_text("x = 1\n")
    curation = {
        "judge": {"evaluator": PythonChat(target="mine:Judge")},
        "candidates": {"sources": [FunctionSource(name="mine", function="mine:candidate", num_images=8)]},
    }[kind]
    mine = change(config, curation=config.curation.model_copy(update=curation))
    before = key(mine, ("curation",))
    (folder / "mine.py").write_text("x = 2\n")
    changed = key(mine, ("curation",))
    assert changed != before
    (folder / "mine.py").unlink()
    assert key(mine, ("curation",)) not in (before, changed), "what cannot be found is refused by who loads it"


def test_the_modules_beside_that_of_a_judge_count(
    config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in its package, as it may import that; not what Python or others leave there."""
    monkeypatch.syspath_prepend(folder)
    (folder / "my_judges" / "parts").mkdir(parents=True)
    for name in ("__init__.py", "judge.py", "helper.py", "parts/helper.py"):
        (folder / "my_judges" / name).write_text("x = 1\n")
    evaluator = PythonChat(target="my_judges.judge:Judge")
    mine = change(config, curation=config.curation.model_copy(update={"evaluator": evaluator}))
    keys = {key(mine, ("curation",))}
    (folder / "my_judges" / "log.txt").write_text("asked\n")
    assert {key(mine, ("curation",))} == keys
    for name in ("helper.py", "parts/helper.py"):
        (folder / "my_judges" / name).write_text("x = 2\n")
        keys.add(key(mine, ("curation",)))
    assert len(keys) == 3
