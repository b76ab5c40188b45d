"""Rubrics: the versioned prompt templates that say how one dimension is judged and how the answer is read.

A template is a Markdown file in ``firm/critics/templates`` with a small front matter::

    ---
    dimension: instruction_following
    answer: boxed
    images: 1
    ---
    text with {prompt} and {plan}

The templates follow the paper's prompts (sections 3.1 and 3.2, appendices C and D) in our own words. The same file
serves curation, training and inference, so training and serving cannot drift apart. Those for edits begin with the
images, the instruction and the report, which all dimensions of a pair have in common: what comes first is encoded once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal, cast, get_args

from firm.config.section import Section
from firm.critics.answers import ScoreFormat
from firm.records import UserError

AnswerFormat = Literal[ScoreFormat, "checklist", "text"]
NO_PLAN = "(no plan was made: first list the requirements of the prompt yourself)"
NO_REPORT = "(no report was made: first compare the two images yourself)"
INSTEAD = {"plan": NO_PLAN, "report": NO_REPORT}
"""Name of a labeller's material -> what stands in a template where there is none."""

_PLACEHOLDER = re.compile(r"(?<!\w)\{([a-z_]+)\}")  # not the {n} of \boxed{n}
_FRONT_MATTER = re.compile(r"\A---\n(.*?)^---\n(.*)\Z", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Rubric:
    """One prompt template.

    Attributes:
        name: Name of the template.
        text: The template without its front matter.
        version: First 12 hexadecimal digits of the SHA-256 of the whole file; changes with every edit.
        answer: How the answer is read by `firm.critics.answers`: ``boxed``, ``json`` and ``score`` by `parse_answer`
            (``json`` without a dimension by `parse_instruction`), ``checklist`` by `parse_plan`, ``text`` by
            `parse_report`.
        images: Number of images that go with the text.
        dimension: The judged dimension; None where no score is asked for.
    """

    name: str
    text: str
    version: str
    answer: AnswerFormat
    images: int
    dimension: str | None = None

    @property
    def placeholders(self) -> frozenset[str]:
        """Names of the values that `render` needs: ``prompt``, and material such as ``plan`` or ``report``."""
        return frozenset(_PLACEHOLDER.findall(self.text))

    @property
    def score_format(self) -> ScoreFormat:
        """The format of an answer that gives a score.

        Raises:
            UserError: The template asks for none.
        """
        if self.answer in ("checklist", "text"):
            raise UserError("the rubric asks for a text, not for a score", self.name, "", usage=True)
        return cast(ScoreFormat, self.answer)

    def render(self, values: Mapping[str, str | Sequence[str]]) -> str:
        """Fill the placeholders, literally: braces and placeholders inside a value stay as they are.

        Args:
            values: Name -> ready text, or lines that become a Markdown list. Empty material is replaced by a sentence
                that asks the judge to find it itself.

        Raises:
            UserError: A value is missing, or given although the template has no place for it.
        """
        if missing := sorted(self.placeholders - set(values)):
            raise UserError(f"the rubric needs {' and '.join(missing)}", self.name, "give the value", usage=True)
        if extra := sorted(set(values) - self.placeholders):
            fix = f"leave it out, or write {{{extra[0]}}} into the template"
            raise UserError(f"the rubric has no place for {' and '.join(extra)}", self.name, fix, usage=True)
        return _PLACEHOLDER.sub(lambda match: _text(match[1], values[match[1]]), self.text)


def _text(name: str, value: str | Sequence[str]) -> str:
    return (value if isinstance(value, str) else "\n".join(f"- {line}" for line in value)) or INSTEAD.get(name, "")


def rubric_names() -> list[str]:
    """Names of the templates shipped with the package."""
    files = resources.files("firm.critics").joinpath("templates").iterdir()
    return sorted(f.name.removesuffix(".md") for f in files if f.name.endswith(".md"))


def parse_rubric(name: str, source: str) -> Rubric:
    """Make a rubric from the text of a template file.

    Raises:
        UserError: The front matter is missing, has an unknown key or an impossible value.
    """
    match = _FRONT_MATTER.match(source)
    if match is None:
        raise UserError("the template has no front matter", name, "begin it with ---, answer: boxed, ---", usage=True)
    keys = {}
    for line in filter(str.strip, match[1].splitlines()):
        key, _, value = line.partition(":")
        keys[key.strip()] = value.strip()
    answer = keys.pop("answer", "")
    images = keys.pop("images", "1")
    dimension = keys.pop("dimension", None)
    if keys or answer not in get_args(AnswerFormat) or not images.isdecimal():
        known = f"dimension, answer ({', '.join(get_args(AnswerFormat))}), images (a number)"
        raise UserError("the template's front matter is not understood", name, f"it may have {known}", usage=True)
    version = hashlib.sha256(source.encode()).hexdigest()[:12]
    return Rubric(name, match[2].strip(), version, cast(AnswerFormat, answer), int(images), dimension)


@lru_cache(maxsize=64)
def load_rubric(name: str) -> Rubric:
    """Load a template by name.

    Raises:
        UserError: There is no such template; the message lists the known ones (exit code 2).
    """
    if name not in rubric_names():
        raise UserError(f"unknown rubric {name!r}", "", f"use one of {', '.join(rubric_names())}", usage=True)
    source = resources.files("firm.critics").joinpath("templates", f"{name}.md").read_text(encoding="utf-8")
    return parse_rubric(name, source)


def check_rubrics(config: Section) -> None:
    """Check that every rubric in a configuration exists and judges the dimension it is configured for.

    Raises:
        UserError: A rubric is missing, judges another dimension, or another number of images than those before it; the
            message names the key (exit code 2).
    """
    first: tuple[str, int] | None = None
    for key, section in config.walk(""):
        for named in section.named_rubrics():
            rubric = load_rubric(named.name)
            if rubric.dimension != named.dimension:
                judges = rubric.dimension or "no dimension"
                what = f"the rubric {named.name!r} judges {judges}, not {named.dimension or 'no dimension'}"
                raise UserError(what, f"{key}.{named.key}", f"use one of {', '.join(rubric_names())}", usage=True)
            if rubric.dimension is not None:
                first = first or (named.name, rubric.images)
                if rubric.images != first[1]:
                    what = f"{named.name!r} judges {rubric.images} image(s), but {first[0]!r} judges {first[1]}"
                    fix = "a run generates images or edits them: use rubrics of one of the two"
                    raise UserError(what, f"{key}.{named.key}", fix, usage=True)
