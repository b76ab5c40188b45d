"""Templates: complete, literal, versioned."""

import hashlib
from importlib import resources
from itertools import takewhile

import pytest

from firm.critics.judge import question
from firm.critics.rubrics import NO_PLAN, NO_REPORT, load_rubric, parse_rubric, rubric_names
from firm.records import Prompt, UserError

NAMES = ["evaluate", "instruction_following", "plan", "quality", "short_instruction_following", "short_quality"]
EDITS = {
    "obvious_differences": (None, "text", "obvious differences"),
    "detailed_differences": (None, "text", "detailed differences"),
    "evaluate_execution": ("execution", "json", "execution score"),
    "evaluate_consistency": ("consistency", "json", "consistency score"),
    "execution": ("execution", "json", "execution score"),
    "consistency": ("consistency", "json", "consistency score"),
    "rewrite_instruction": (None, "json", "rewrite the instruction"),
    "short_execution": ("execution", "score", None),
    "short_consistency": ("consistency", "score", None),
}
PHRASES = {phrase for _, _, phrase in EDITS.values() if phrase}


def test_the_shipped_templates() -> None:
    assert rubric_names() == sorted([*NAMES, *EDITS])
    answers = {name: (load_rubric(name).answer, load_rubric(name).images) for name in NAMES}
    assert answers["plan"] == ("checklist", 0)
    assert answers["quality"] == ("json", 1)
    assert all(answers[n] == ("boxed", 1) for n in NAMES if n not in ("plan", "quality"))
    dimensions = {name: load_rubric(name).dimension for name in NAMES}
    assert dimensions["plan"] is None and dimensions["quality"] == dimensions["short_quality"] == "quality"


def test_the_placeholders_of_the_templates() -> None:
    assert load_rubric("plan").placeholders == {"prompt"}
    assert load_rubric("evaluate").placeholders == {"prompt", "plan"}
    assert load_rubric("quality").placeholders == frozenset()
    assert "technical quality" in load_rubric("quality").text.lower()
    short = load_rubric("short_instruction_following").render({"prompt": "a red circle"})
    assert short == "prompt : a red circle <image>"
    assert load_rubric("short_quality").render({}) == "quality <image>"


@pytest.mark.parametrize("name", ["plan", "evaluate", "instruction_following"])
def test_the_prompt_stands_at_the_end_between_markers(name: str) -> None:
    rubric = load_rubric(name)
    plan = {"plan": ["Is it red?"]} if "plan" in rubric.placeholders else {}
    lines = rubric.render({"prompt": "a red circle", **plan}).splitlines()
    start = lines.index("<START OF PROMPT>")
    assert lines[start + 1 : start + 3] == ["a red circle", "<END OF PROMPT>"]
    if not plan:
        assert start + 3 == len(lines)
    else:
        assert lines[start + 4 :] == ["<START OF PLAN>", "- Is it red?", "<END OF PLAN>"]


@pytest.mark.parametrize("name", EDITS)
def test_templates_of_edits_say_what_they_ask_for(name: str) -> None:
    """Teachers that are programs tell the questions apart by these phrases."""
    rubric = load_rubric(name)
    dimension, answer, phrase = EDITS[name]
    assert (rubric.dimension, rubric.answer, rubric.images) == (dimension, answer, 2)
    assert {p for p in PHRASES if p in rubric.text.lower()} == ({phrase} if phrase else set())
    differences = name.endswith("_differences")
    report = {"report"} if name.startswith("evaluate_") else set()
    assert rubric.placeholders == (set() if differences else {"prompt"}) | report


@pytest.mark.parametrize("name", [n for n, (d, _, _) in EDITS.items() if d and not n.startswith("short")])
def test_the_rubrics_of_edits_are_whole(name: str) -> None:
    text = question(load_rubric(name), Prompt(text="make it red"), {"report": ["a"]} if "_" in name else None)
    lines = text.splitlines()
    start = lines.index("<START OF INSTRUCTION>")
    assert lines[start + 1 : start + 3] == ["make it red", "<END OF INSTRUCTION>"]
    assert [line[:4] for line in lines if line[:1].isdigit() and line[1:4] == " - "] == [f"{s} - " for s in "54321"]
    assert '{"reasoning": "...", "score": [n]}' in text
    if "consistency" in name:
        assert all(word in text for word in ("Occlusion", "variations of quality", "Replacement", "physical"))
    else:
        assert "nobody asked for do not count" in text and "quality of the image" in text


@pytest.mark.parametrize("prefix", ["", "evaluate_", "short_"])
def test_the_two_questions_on_an_edit_begin_alike(prefix: str) -> None:
    """Images, instruction and report come first, so that they are encoded once for both."""
    prompt = Prompt(text="make it red")
    both = [question(load_rubric(f"{prefix}{d}"), prompt) for d in ("execution", "consistency")]
    common = "".join(a for a, b in takewhile(lambda pair: pair[0] == pair[1], zip(*both, strict=False)))
    assert common.count("<image>") == 2 and "make it red" in common
    if prefix == "short_":
        assert both[0] == f"{common}execution" == "before : <image> after : <image> make it red execution"
    else:
        assert common.endswith("Give the ") and (NO_REPORT in common) == (prefix == "evaluate_")


def test_values_are_filled_in_literally() -> None:
    text = load_rubric("evaluate").render({"prompt": "a {plan} of {0} {prompt} \\1 100%", "plan": ["{prompt}?"]})
    assert "a {plan} of {0} {prompt} \\1 100%" in text and "- {prompt}?" in text


def test_an_empty_plan_is_said_to_be_empty() -> None:
    assert NO_PLAN in load_rubric("evaluate").render({"prompt": "a", "plan": []})


def test_missing_and_superfluous_values_are_errors() -> None:
    with pytest.raises(UserError, match="needs plan"):
        load_rubric("evaluate").render({"prompt": "a"})
    with pytest.raises(UserError, match="no place for prompt"):
        load_rubric("quality").render({"prompt": "a"})


def test_the_version_is_the_hash_of_the_file() -> None:
    source = resources.files("firm.critics").joinpath("templates", "plan.md").read_bytes()
    assert load_rubric("plan").version == hashlib.sha256(source).hexdigest()[:12]


@pytest.mark.parametrize("name", ["no_such", "../templates/plan", "", "plan.md"])
def test_unknown_names_list_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="use one of consistency, .*evaluate, .*short_quality") as error:
        load_rubric(name)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "source",
    ["no front matter", "---\nanswer: poem\n---\nx", "---\nanswer: boxed\ncolour: red\n---\nx",
     "---\nanswer: boxed\nimages: many\n---\nx", "---\nimages: 1\n---\nx"],
)  # fmt: skip
def test_bad_front_matter(source: str) -> None:
    with pytest.raises(UserError, match="front matter"):
        parse_rubric("mine", source)
