"""The film of a training run: small pictures of the same prompts and noise at each audit, for people.

Equal runs of as many processes have equal films, so it is part of the policy's artifact, and of the report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from firm.images import Picture, picture
from firm.records import Prompt, Record

FILM = "film.jsonl"
SHOTS = 6
"""Prompts of a film."""
SIDE = 128
"""Most pixels of a side of its pictures: a checkpoint holds the whole film."""


class Shot(Record):
    """One prompt at one audit.

    Attributes:
        prompt: Its text.
        pictures: The sample, for editing behind its source.
    """

    prompt: str
    pictures: tuple[Picture, ...]


class Frame(Record):
    """One audit; ``epoch`` 0 is the base."""

    epoch: int
    shots: tuple[Shot, ...]


class Film:
    """A file of a frame a line, which grows."""

    def __init__(self, path: Path, keep: int) -> None:
        """Go on after the first ``keep`` frames of ``path``; later ones belong to work that is being redone."""
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True)[:keep] if path.exists() else []
        path.write_bytes(b"".join(lines))

    def add(self, epoch: int, samples: Iterable[tuple[Prompt, Sequence[bytes]]]) -> None:
        """Add the first sample of each of the first prompts.

        Args:
            epoch: After which they were made.
            samples: Prompts, each with PNG images: the sample, for editing behind its source.
        """
        firsts: dict[Prompt, Sequence[bytes]] = {}
        for prompt, images in samples:
            firsts.setdefault(prompt, images)
        shots = tuple(
            Shot(prompt=prompt.text, pictures=tuple(picture(image, prompt.text, SIDE) for image in images))
            for prompt, images in list(firsts.items())[:SHOTS]
        )
        with open(self._path, "ab") as file:
            file.write(Frame(epoch=epoch, shots=shots).model_dump_json().encode() + b"\n")


def read_film(path: Path) -> list[Frame]:
    """The frames of a file. Lines are split as bytes: a prompt may have what Unicode takes for the end of one."""
    return [Frame.model_validate_json(line) for line in path.read_bytes().splitlines()]
