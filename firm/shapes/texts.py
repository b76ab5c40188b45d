"""What the texts of all tasks have in common: their normal form and their split."""

import hashlib
from functools import cache

from firm.records import SPLITS


def normalised(text: str) -> str:
    """Returns a text without what does not count: capitals, white space, a full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".")


def digest(text: str) -> int:
    """Returns the SHA-256 of a text as a number: a coin that never changes."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


@cache
def of_split(texts: tuple[str, ...], split: str) -> tuple[str, ...]:
    """Returns the texts of a split, in their order; about one in five is "test", by its hash.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: the shapes world has {' and '.join(map(repr, SPLITS))}")
    return tuple(text for text in texts if (digest(text) % 5 == 0) == (split == "test"))
