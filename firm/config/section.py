"""What all sections of the configuration share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class NamedFile(NamedTuple):
    """A file or folder that a section names: results depend on its content.

    Attributes:
        key: The key that names it, within its section.
        path: Its value.
        is_model: It may be a hub id or pkg://PACKAGE/PATH instead of a folder.
        is_code: It is a dotted name: the file is the source of its module.
        follow: Keys of the rows of a JSON, JSONL or Parquet file that name further files, relative to it.
    """

    key: str
    path: str
    is_model: bool = False
    is_code: bool = False
    follow: tuple[str, ...] = ()


class NamedRubric(NamedTuple):
    """A rubric that a section names, and the dimension it must judge (None: it asks for no score)."""

    key: str
    name: str
    dimension: str | None


class Section(BaseModel):
    """Base of every section: immutable, unknown keys rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def walk(self, key: str) -> Iterator[tuple[str, Section]]:
        """This section, whose key is given, and all sections inside it, each with its key."""
        yield key, self
        for name, value in self:
            items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
            for inner, item in (("", value), *items):
                if isinstance(item, Section):
                    yield from item.walk(".".join(filter(None, (key, name, str(inner)))))

    def named_files(self) -> Iterator[NamedFile]:
        """Files and folders that this section itself names."""
        yield from ()

    def named_rubrics(self) -> Iterator[NamedRubric]:
        """Rubrics that this section itself names."""
        yield from ()
