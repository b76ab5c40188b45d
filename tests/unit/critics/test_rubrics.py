"""Templates: complete, literal, versioned."""

import hashlib
from importlib import resources

import pytest

from firm.critics.rubrics import NO_PLAN, load_rubric, parse_rubric, rubric_names
from firm.records import UserError

NAMES = ["evaluate", "instruction_following", "plan", "quality", "short_instruction_following", "short_quality"]


def test_the_shipped_templates() -> None:
    assert rubric_names() == NAMES
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
    with pytest.raises(UserError, match="use one of evaluate, instruction_following") as error:
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
