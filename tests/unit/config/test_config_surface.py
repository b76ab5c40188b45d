"""The keys of a configuration are listed in a golden file: a new knob shows in review and has to be argued for."""

from collections.abc import Callable, Iterator
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel

from firm.config import RunConfig


def keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """Dotted paths of all keys: ``[]`` marks a list, ``{}`` a mapping, ``(kind)`` the section chosen by ``kind``."""
    for name, field in model.model_fields.items():
        sections = list(_sections(field.rebuild_annotation()))
        if not sections:
            yield f"{path}{name}"
        for section, mark in sections:
            kind = section.model_fields.get("kind") if len(sections) > 1 else None
            choice = f"({kind.default})" if kind else ""
            yield from keys(section, f"{path}{name}{mark}{choice}.")


def _sections(annotation: Any, mark: str = "") -> Iterator[tuple[type[BaseModel], str]]:
    """Sections inside a type such as ``list[A | B] | None``, each with the mark of its container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, mark
    for argument in get_args(annotation):
        yield from _sections(argument, {list: "[]", dict: "{}"}.get(get_origin(annotation), mark))


@pytest.mark.golden
def test_keys_are_those_of_the_golden_file(golden: Callable[[str, str], None]) -> None:
    golden("config_keys.txt", "\n".join(sorted(keys(RunConfig))) + "\n")
