"""What the sentences of a report call things: the same report is about a generator or an editor."""

from __future__ import annotations

from typing import NamedTuple


class Terms(NamedTuple):
    """Nouns, of which the plural ends in s.

    Attributes:
        model: What the policy is.
        image: What it makes.
        prompt: What it is asked.
        group: What images that are compared with one another have in common.
        given: All that it is given, in the plural.
    """

    model: str
    image: str
    prompt: str
    group: str
    given: str


GENERATION = Terms("image generator", "image", "prompt", "prompt", "prompts")
EDITING = Terms("image editor", "edit", "instruction", "source and instruction", "sources and instructions")

SEEN = {"copies": "untouched", "blanks": "empty"}
"""What audits see of images without a judge, in words."""
