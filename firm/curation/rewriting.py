"""Instruction rewriting (paper section 3.1): low scores are scarce, so some pairs get a prompt they do not show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from firm.chat.journal import OpenChat
from firm.config import CuratedRun
from firm.critics.answers import parse_instruction
from firm.critics.judge import RETRY_TEMPERATURE, JudgeInput
from firm.critics.labeller import Labeller
from firm.critics.material import Helper
from firm.critics.rubrics import load_rubric
from firm.curation.balance import histogram
from firm.prompts import Splits
from firm.records import Assessment, Candidate, Invalid, JudgedCandidate, Judgement, Prompt, Rewritten
from firm.seeds import seed_for

REWRITING = "rewriting"
"""Under which `JudgedCandidate.failed` says why a prompt is still the old one."""
NUM_SHOWN = 24
"""Rewritten candidates that the audit shows one by one; all of them are in the shards."""


class Rewriter:
    """Rewrites the prompts of a share of each source's candidates, and has the candidates judged again.

    Which ones depends on (seed, source, split, index) only. A new prompt is judged like any other, so one that happens
    to fit the images gets the score that it deserves.
    """

    def __init__(self, config: CuratedRun, open_chat: OpenChat, labeller: Labeller) -> None:
        """The reporter rewrites; it is opened only if a source has something to be rewritten."""
        curation = config.curation
        self._shares = {source.name: source.rewritten for source in curation.sources}
        self._seed = config.seed
        self._labeller = labeller
        if any(self._shares.values()):
            writer = curation.reporter or curation.evaluator
            self._writer = Helper(open_chat("rewriter", writer), writer, curation.attempts)
            self._rubric = load_rubric(curation.rewriter_rubric)
            self._splits = Splits(config.prompts)

    def rewrite(self, judged: Sequence[JudgedCandidate]) -> list[JudgedCandidate]:
        """The candidates in order, some with another prompt; one whose rewriting fails stays as it is and says why."""
        result = list(judged)
        chosen = [i for i, j in enumerate(judged) if self._draw(j) / 2**63 < self._shares[j.source]]
        if not chosen:
            return result
        written = self._writer.each(self._write, [judged[i] for i in chosen])
        reasons: dict[int, str] = {}
        asked: list[Candidate] = []
        for i, found in zip(chosen, written, strict=True):
            old = judged[i]
            if isinstance(found, Invalid):
                result[i] = old.model_copy(update={"failed": {**old.failed, REWRITING: found}})
                continue
            text, reasons[i] = found
            same = {name: getattr(old, name) for name in Candidate.model_fields}
            asked.append(Candidate(**{**same, "prompt": old.prompt.model_copy(update={"text": text})}))
        for (i, reason), new in zip(reasons.items(), self._labeller.label(asked), strict=True):
            before = Rewritten(prompt=judged[i].prompt, assessment=judged[i].assessment, reason=reason)
            result[i] = new.model_copy(update={"rewritten": before})
        return result

    def _draw(self, candidate: Candidate) -> int:
        return seed_for(self._seed, "rewrite", candidate.source, candidate.split, candidate.index)

    def _write(self, candidate: JudgedCandidate) -> tuple[str, str] | Invalid:
        """New text and reason. It must be of the candidate's split: a held-out prompt must not train the critic."""

        def read(text: str, truncated: bool) -> tuple[str, str] | Invalid:
            found = parse_instruction(text, truncated)
            if isinstance(found, Invalid):
                return found
            if found[0].casefold() == " ".join(candidate.prompt.text.split()).casefold():
                return Invalid(reason="unusable", detail="the prompt is still the same")
            if self._splits.of(Prompt(text=found[0])) != candidate.split:
                return Invalid(reason="unusable", detail=f"a prompt of the other split: {found[0][:200]}")
            return found

        return self._writer.ask(
            self._rubric,
            JudgeInput(candidate.prompt, candidate.images),
            read,
            seed=self._draw(candidate) % 2**31,
            temperature=RETRY_TEMPERATURE,  # or equal pairs would all be rewritten alike
        )


def audit(rewritten: Sequence[JudgedCandidate]) -> dict[str, list[dict[str, Any]]]:
    """Tables of rewritten candidates: the scores before and after, by source and dimension, and some one by one."""
    scores = []
    for source in dict.fromkeys(j.source for j in rewritten):
        mine = [j for j in rewritten if j.source == source]
        for dimension in mine[0].assessment:
            for when in ("before", "after"):
                column = [_scores(j, when)[dimension] for j in mine]
                scores.append({"source": source, "dimension": dimension, "when": when, **histogram(column)})
    step = -(-len(rewritten) // NUM_SHOWN) or 1
    shown = [
        {
            "id": f"{j.source}-{j.split}-{j.index}",
            "before": j.rewritten.prompt.text,
            "after": j.prompt.text,
            "reason": j.rewritten.reason,
            **{f"{d}_{when}": s for when in ("before", "after") for d, s in _scores(j, when).items()},
        }
        for j in rewritten[::step]
        if j.rewritten is not None
    ]
    return {"rewritten": scores, "rewritings": shown}


def _scores(judged: JudgedCandidate, when: str) -> dict[str, int | None]:
    assert judged.rewritten is not None
    assessment: Assessment = judged.rewritten.assessment if when == "before" else judged.assessment
    return {d: o.score if isinstance(o, Judgement) else None for d, o in assessment.items()}
