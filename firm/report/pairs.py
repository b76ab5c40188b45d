"""Pairs of samples of one prompt and one noise, before and after RL: which are shown, with the source of edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter

from firm.images import Picture, picture
from firm.records import Assessment, Judgement, Prompt, Record, Sample, SampledPolicy
from firm.storage.shards import iter_shards

MAX_SIDE = 384  # pixels; larger images are shrunk, as the page carries them
Which = Literal["base", "final"]
_WHICH: tuple[Which, ...] = ("base", "final")
T = TypeVar("T")
_ASSESSMENT: TypeAdapter[Assessment] = TypeAdapter(Assessment)


class Scored(Record):
    """A `Sample` without its image, which is what choosing needs."""

    index: int
    prompt: Prompt
    policy: SampledPolicy
    scores: dict[str, Any]

    def outcomes(self, judge: str) -> Assessment:
        """A judge's outcomes in the suite of held-out prompts; empty for other suites."""
        return _ASSESSMENT.validate_python(self.scores.get(judge, {}))


def choose(folder: Path, dimension: str, number: int) -> dict[str, Any]:
    """Choose pairs spread evenly over the auditor's gains, the largest gain and the largest fall among them.

    Args:
        folder: Shards of `Sample`.
        dimension: Whose gain orders the pairs.
        number: How many to choose.

    Returns:
        ``items`` (with ``index``, ``prompt``, ``gain`` and ``scores``), ``edits`` (whether they are edits of a source),
        ``total``, ``unrated``, ``better``, ``equal`` and ``worse``. Pairs without the auditor's judgement cannot be
        ordered: they are counted, and shown only where no pair has one.
    """
    samples: dict[int, dict[str, Scored]] = {}
    for sample in iter_shards(folder, Scored):
        if sample.policy in _WHICH:
            samples.setdefault(sample.index, {})[sample.policy] = sample
    pairs = [(pair["base"], pair["final"]) for _, pair in sorted(samples.items()) if len(pair) == len(_WHICH)]
    items = [_item(base, final, dimension) for base, final in pairs]
    rated = [item for item in items if item["gain"] is not None]
    rated.sort(key=lambda item: (-item["gain"], item["index"]))
    signs = Counter((item["gain"] > 0) - (item["gain"] < 0) for item in rated)
    return {
        "items": spread(rated or items, number),
        "edits": any(base.prompt.image is not None for base, _ in pairs),
        "total": len(items),
        "unrated": len(items) - len(rated),
        "better": signs[1],
        "equal": signs[0],
        "worse": signs[-1],
    }


def spread(items: Sequence[T], number: int) -> list[T]:
    """The first, the last and equal steps between."""
    if len(items) <= number:
        return list(items)
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


def _item(base: Scored, final: Scored, dimension: str) -> dict[str, Any]:
    names = [(judge, d) for judge in ("auditor", "critic") for d in base.outcomes(judge)]
    scores = []
    for judge, name in sorted(names, key=lambda name: (name[0], name[1] != dimension)):
        row: dict[str, Any] = {"judge": judge, "dimension": name}
        for which, sample in zip(_WHICH, (base, final), strict=True):
            outcome = sample.outcomes(judge).get(name)
            row[which] = round(outcome.soft_score, 4) if isinstance(outcome, Judgement) else None
        scores.append(row)
    first = next((r for r in scores if r["judge"] == "auditor" and r["dimension"] == dimension), None)
    known = first is not None and first["base"] is not None and first["final"] is not None
    gain = round(first["final"] - first["base"], 4) if first and known else None
    return {"index": base.index, "prompt": base.prompt.text, "gain": gain, "scores": scores}


def pictures(folder: Path, indices: Iterable[int]) -> dict[int, dict[str, Picture]]:
    """Images of the chosen pairs: ``base``, ``final`` and, where an image was edited, its ``source``."""
    wanted = set(indices)
    found: dict[int, dict[str, Picture]] = {}
    for sample in iter_shards(folder, Sample):
        if sample.index in wanted and sample.policy in _WHICH:
            mine = found.setdefault(sample.index, {})
            where = f"{folder} sample {sample.index}"
            mine[sample.policy] = picture(sample.images[-1], where, MAX_SIDE)
            if len(sample.images) > 1:
                mine["source"] = picture(sample.images[0], where, MAX_SIDE)
    return found
