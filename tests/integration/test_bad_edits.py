"""What a user of editing does wrong ends with one clear message that names the culprit, or is counted as invalid."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from integration.slips import Case, Result, complains, firm, run, write
from PIL import Image
from shared import BASE, generated

from firm.config.loading import load_config
from firm.critics.judge import JudgeInput
from firm.critics.load import open_judge
from firm.curation import run as curation
from firm.images import encode_image
from firm.records import Invalid, JudgedCandidate, Prompt, Summary, UserError
from firm.shapes import editing
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

EDITING = [
    "name=small",
    "prompts.function=firm.shapes.editing:prompts",
    "policy={family: qwen_image_edit, model: ./editor, resolution: 32}",
    "curation.labeller=difference_first",
    "curation.sources=[{kind: function, name: mine, function: 'mine:candidate', num_images: 24}]",
    "curation.dimensions={execution: {rubric: evaluate_execution}, consistency: {rubric: evaluate_consistency}}",
    "curation.test_share=0.5",
    "curation.shard_size=8",
    "curation.batch_size=8",
    "critic.rubrics={execution: short_execution, consistency: short_consistency}",
    "auditor.rubrics={execution: execution, consistency: consistency}",
    "reward={formula: cme}",
    "bench.sources=[]",
    "bench.gate.rules=[{metric: coverage, at_least: 0.9}]",
    "bench.gate.accept_gaps=[execution.skill_low, execution.pairwise, consistency.skill_low, consistency.pairwise]",
    "further_rounds={}",
]
MINE = """
from PIL import Image
from firm.records import Prompt
from firm.shapes.editing import candidate

def prompts_of_a_file(split):
    return [Prompt(text=f"make the red circle blue, {split}", image=f"{split}.png")]

def image(index, seed, split):
    asked, before, after = candidate(index, seed, split)
    return asked, after

def three(index, seed, split):
    return "a red circle", Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))

def four(index, seed, split):
    return (*candidate(index, seed, split), Image.new("RGB", (32, 32)))

def bytes_of_images(index, seed, split):
    asked, *images = candidate(index, seed, split)
    return asked, *[picture.tobytes() for picture in images]

def only_an_image(index, seed, split):
    return candidate(index, seed, split)[2]

def cropped(index, seed, split):
    asked, before, after = candidate(index, seed, split)
    return asked, before, after.crop((0, 0, 32, 24))

def absent(index, seed, split):
    asked, before, after = candidate(index, seed, split)
    while "add" in asked:  # which needs nothing to be there
        asked, before, after = candidate(index := index + 1000, seed, split)
    return asked, Image.new("RGB", before.size, "gray"), after

def sometimes_absent(index, seed, split):
    return absent(index, seed, split) if index % 4 == 0 else candidate(index, seed, split)
"""
GENERATION = [
    "curation.labeller=plan_then_score",
    "curation.dimensions={instruction_following: {rubric: evaluate}, quality: {rubric: quality}}",
    "critic.rubrics={instruction_following: short_instruction_following, quality: short_quality}",
    "auditor.rubrics={instruction_following: evaluate, quality: quality}",
    "reward={formula: qma}",
    "bench.gate.accept_gaps=[instruction_following.skill_low, instruction_following.pairwise, quality.skill_low, "
    "quality.pairwise]",
]
PLAIN = "prompts.function=firm.shapes.generation:prompts"
GENERATOR = f"policy={{family: sd3, model: '{BASE}', resolution: 32, max_sequence_length: 1}}"
SAMPLED = f"curation.sources=[{json.dumps(generated(8, 2))}]"
EDITED = SAMPLED.replace("sd3", "qwen_image_edit").replace(BASE, "./editor")
FILES = "curation.sources=[{kind: files, name: mine, path: mine.jsonl}]"
SCORES = "bench.sources=[{kind: scores, name: people, path: scores.jsonl}]"
PROMPTS = "prompts={path: p.jsonl, test_share: 0.5}"
SQUARE, WIDE = (encode_image(Image.new("RGB", size, "gray")) for size in ((8, 8), (12, 8)))


def rows(**row: Any) -> str:
    """Enough rows for both splits: the prompt is followed by a number."""
    return "\n".join(json.dumps({**row, "prompt": f"{row['prompt']} {i}"}) for i in range(40))


def function(name: str) -> str:
    return f"curation.sources.0.function=mine:{name}"


RED = {"prompt": "make it red"}
SCORED = {**RED, "image": "a.png", "scores": {"execution": 4}}

# ---- caught before any stage starts: exit code 2 ---------------------------------------------------------------------

CASES: dict[str, Case] = {
    "editor without source images": ({}, [PLAIN], ["policy.family, prompt ", "qwen_image_edit edits, and needs"]),
    "generator with source images": ({}, [GENERATOR], ["policy.family, prompt ", "sd3 generates and does not edit"]),
    "sampled generator with source images": ({}, [SAMPLED], ["curation.sources.0.policy.family, prompt ", "sd3 "]),
    "sampled editor without source images": (
        {},
        [PLAIN, GENERATOR, EDITED, *GENERATION],
        ["curation.sources.0.policy.family, prompt ", "qwen_image_edit edits"],
    ),
    "one prompt without a source image": (
        {"p.jsonl": rows(**RED, source_image="a.png") + '\n"make it blue"', "a.png": SQUARE},
        [PROMPTS],
        ["policy.family, prompt 'make it blue'", "needs a source image", "give every prompt a source_image"],
    ),
    "rubrics of images for prompts with source images": (
        {},
        GENERATION,
        ["critic.rubrics.", "judges 1 image(s), and a prompt has a source", "prompt 'make the"],
    ),
    "rubrics of edits for prompts without source images": (
        {},
        [PLAIN, GENERATOR],
        ["critic.rubrics.", "judges 2 image(s), and a prompt has no source"],
    ),
    "prompt with a source image that is missing": (
        {"p.jsonl": rows(**RED, source_image="b.png")},
        [PROMPTS],
        ["p.jsonl, line 1", "there is no source image 'b.png'"],
    ),
    "prompt of a function with a source image that is missing": (
        {},
        ["prompts.function=mine:prompts_of_a_file"],
        ["train.png, prompt 'make the red circle blue, train'", "No such file"],
    ),
    "source image that is no image": (
        {"p.jsonl": rows(**RED, source_image="b.png"), "b.png": b"no image"},
        [PROMPTS],
        ["b.png, prompt 'make it red ", "cannot decode"],
    ),
    "source image that is not square": (
        {"p.jsonl": rows(**RED, source_image="b.png"), "b.png": WIDE},
        [PROMPTS],
        ["b.png, prompt 'make it red ", "must be square, and this one is 12 x 8", "crop it"],
    ),
    "candidates without a source image": (
        {"mine.jsonl": rows(**RED, image="a.png"), "a.png": SQUARE},
        [FILES],
        ["mine.jsonl, entry 0: a.png", "judge 2 image(s), not 1", "give each entry a source_image"],
    ),
    "candidates of generation with a source image": (
        {"mine.jsonl": rows(**RED, image="a.png", source_image="b.png"), "a.png": SQUARE, "b.png": SQUARE},
        [PLAIN, GENERATOR, FILES, *GENERATION],
        ["mine.jsonl, entry 0: a.png", "judge 1 image(s), not 2", "leave source_image out"],
    ),
    "candidates with a source image that is missing": (
        {"mine.jsonl": rows(**RED, image="a.png", source_image="b.png"), "a.png": SQUARE},
        [FILES],
        ["mine.jsonl, entry 0: b.png", "No such file"],
    ),
    "scores of edits without a source image": (
        {"scores.jsonl": json.dumps(SCORED), "a.png": SQUARE},
        [SCORES],
        ["scores.jsonl, line 1", "execution of 2 image(s), not of 1", "give each row a source_image"],
    ),
    "scores of generation with a source image": (
        {
            "scores.jsonl": json.dumps({**SCORED, "scores": {"quality": 4}, "source_image": "a.png"}),
            "a.png": SQUARE,
        },
        [PLAIN, GENERATOR, SCORES, SAMPLED, *GENERATION],
        ["scores.jsonl, line 1", "quality of 1 image(s), not of 2", "leave source_image out"],
    ),
    "scores with a source image that is missing": (
        {"scores.jsonl": json.dumps({**SCORED, "source_image": "b.png"}), "a.png": SQUARE},
        [SCORES],
        ["scores.jsonl, line 1", "b.png", "No such file"],
    ),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    whole = load_config("gen-shapes", EDITING).model_dump(mode="json", exclude_none=True)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(whole))
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "editor").mkdir()
    (tmp_path / "editor" / "model_index.json").write_text('{"_class_name": "QwenImageEditPlusPipeline"}')
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_a_slip_is_named_before_anything_starts(folder: Path, here: Callable[..., Result], case: str) -> None:
    files, assignments, words = CASES[case]
    write(folder, files)
    complains(here(*run("small.yaml", *assignments)), 2, *words)
    assert not (folder / "runs").exists()


# ---- caught by curation: exit code 2 if the request was wrong, 1 if no judgement is valid ----------------------------

EDITS = rows(**RED, image="a.png", source_image="b.png")
JUDGING: dict[str, tuple[dict[str, str | bytes], list[str], int, list[str]]] = {
    "sizes that differ": (
        {"mine.jsonl": EDITS, "a.png": SQUARE, "b.png": WIDE},
        [FILES],
        2,
        ["mine.jsonl, entry ", ": a.png", "the source image has 12 x 8 pixels, the edited one 8 x 8"],
    ),
    "a source that is no image": (
        {"mine.jsonl": EDITS, "a.png": SQUARE, "b.png": b"no image"},
        [FILES],
        2,
        ["mine.jsonl, entry ", ": b.png", "cannot decode"],
    ),
    "sizes of a function that differ": (
        {},
        [function("cropped")],
        2,
        ["mine:cropped, train 0", "32 x 32 pixels, the edited one 32 x 24"],
    ),
    "an image without its source": (
        {},
        [function("image")],
        2,
        ["mine, train 0", "judge 2 image(s), not 1", "(prompt, source image, edited image)"],
    ),
    "an image too many": ({}, [function("four")], 2, ["mine, train 0", "judge 2 image(s), not 3"]),
    "an edit for rubrics of images": (
        {},
        [PLAIN, GENERATOR, function("three"), "curation.sources.0.num_images=24", *GENERATION],
        2,
        ["mine, train 0", "judge 1 image(s), not 2", "(prompt, image)"],
    ),
    "no prompt": ({}, [function("only_an_image")], 2, ["mine:only_an_image gives no prompt with images for train 0"]),
    "bytes for images": ({}, [function("bytes_of_images")], 2, ["mine:bytes_of_images gives no prompt with images"]),
    "objects that are never there": (
        {},
        [function("absent")],
        1,
        ["curation.evaluator", "no valid judgement", "request_failed", "but the source image shows nothing"],
    ),
}  # fmt: skip


@pytest.fixture
def curate(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Summary]]:
    """curate(*assignments): curation in this process, to the folder ``curated``."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield lambda *words: curation.run(load_config("small.yaml", words), {}, Output.open(str(folder / "curated")))
    sys.modules.pop("mine", None)


@pytest.mark.parametrize("case", JUDGING)
def test_what_curation_cannot_use_is_named(folder: Path, curate: Callable[..., Summary], case: str) -> None:
    files, assignments, code, words = JUDGING[case]
    write(folder, files)
    with pytest.raises(UserError) as caught:
        curate(*assignments)
    assert caught.value.exit_code == code and caught.value.fix
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)


@pytest.mark.slow
def test_the_command_ends_so_too(folder: Path) -> None:
    files, assignments, code, words = JUDGING["sizes that differ"]
    write(folder, files)
    complains(firm(folder, *assignments), code, "curation failed", *words)
    assert "Traceback" not in (folder / "runs" / "small" / "run.log").read_text()


# ---- what cannot be judged is counted --------------------------------------------------------------------------------


def test_an_instruction_for_an_object_that_is_not_there_is_counted(
    folder: Path, curate: Callable[..., Summary]
) -> None:
    summary = curate(function("sometimes_absent"), "curation.sources.0.rewritten=0.5")
    judged = list(iter_shards(folder / "curated" / "judged", JudgedCandidate))
    failed = [j for j in judged if any(isinstance(o, Invalid) for o in j.assessment.values())]
    assert len(judged) == 24 and [j.index % 4 for j in failed] == [0] * 6
    outcomes = [o for j in failed for o in j.assessment.values()]
    assert all(isinstance(o, Invalid) and o.reason == "request_failed" for o in outcomes)
    assert all("but the source image shows nothing" in str(o) for o in outcomes)
    assert summary.metrics["invalid_judgements"] == len(outcomes) == 12
    assert [j for j in failed if "rewriting" in j.failed], "nor can the instruction be rewritten"


def test_an_edit_of_another_size_has_no_score_of_the_auditor(folder: Path) -> None:
    """As in a file of scores, whose images are not curated."""
    auditor = load_config(str(folder / "small.yaml")).auditor
    [asked, *pictures] = editing.candidate(0, 0, "train")
    images = [encode_image(picture) for picture in (pictures[0], pictures[1].crop((0, 0, 32, 24)))]
    [assessment] = open_judge(auditor.judge, auditor.rubrics).judge([JudgeInput(Prompt(text=asked), images)])
    assert all(isinstance(o, Invalid) and "size" in o.detail for o in assessment.values()), assessment
