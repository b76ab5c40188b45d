"""The key of a stage: whatever its result depends on changes it, nothing else does."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from firm import stage
from firm.bench.run import STAGE as BENCH
from firm.config import STAGES, RewardConfig, RunConfig
from firm.config.loading import load_config
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
    with pytest.raises(UserError, match="no such file") as caught:
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
