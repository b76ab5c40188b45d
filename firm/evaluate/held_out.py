"""The suite of held-out prompts: critic and auditor judge, and RL's gain is the mean of paired differences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import TypeAdapter

from firm.chat.journal import OpenChat, forgetful
from firm.config import SteeredRun
from firm.config.reward import REWARD
from firm.critics.agreement import Prediction, agreement
from firm.critics.judge import judge_inputs, soft_scores
from firm.critics.load import load_critic, open_judge
from firm.evaluate.suite import Scores
from firm.intervals import mean_ci
from firm.policies.generate import equally_often
from firm.prompts import load_prompts
from firm.records import Assessment, Prompt, Sample, SampledPolicy, Summary
from firm.rewards import rewards_of

_ASSESSMENT: TypeAdapter[Assessment] = TypeAdapter(Assessment)
KEPT = ("mae", "constant_mae", "pairwise")
"""Metrics of the critic's agreement that are headline numbers."""


class HeldOut:
    """Prompts that neither the critic nor RL has seen; a `firm.evaluate.suite.Suite`."""

    def __init__(
        self, config: SteeredRun, critic: Path | None, device: torch.device, open_chat: OpenChat = forgetful
    ) -> None:
        """Load the critic and open the auditor."""
        self.config = config
        auditor = config.auditor
        self.judges = {
            "critic": load_critic(critic, config.critic, device, open_chat),
            "auditor": open_judge(auditor.judge, auditor.rubrics, chat=open_chat("auditor", auditor.judge)),
        }

    def prompts(self) -> list[Prompt]:
        """The held-out prompt of each sample: every prompt equally often, in seeded order."""
        prompts = load_prompts(self.config.prompts, "test")
        return equally_often(prompts, self.config.evaluate.num_images, self.config.seed, "evaluate")

    def score(self, prompts: Sequence[Prompt], images: Sequence[bytes]) -> list[Scores]:
        """Judge -> dimension -> outcome."""
        items = judge_inputs(prompts, images)
        by_judge = {name: judge.judge(items) for name, judge in self.judges.items()}
        return [
            {name: _ASSESSMENT.dump_python(row[i], mode="json") for name, row in by_judge.items()}
            for i in range(len(items))
        ]

    def summary(self, samples: Sequence[Sample]) -> Summary:
        """Means before and after RL (and of the guided base) and of the paired differences, with intervals.

        They are of each judge's scores and of the reward, in [0, 1], that the formula makes of them, image by image.
        The table ``invalid`` counts the failed judgements of every judge, also of one that gave no valid pair;
        ``agreement`` says how well the critic still agrees with the auditor, also on what RL made of the policy.
        """
        by = {which: [s for s in samples if s.policy == which] for which in get_args(SampledPolicy)}
        by = {which: mine for which, mine in by.items() if mine}
        rows = []
        failed = []
        metrics = {}
        prompts = [s.prompt for s in by["base"]]
        for judge, dimension in self._judged():
            scores = {w: self._values([_assessment(s, judge) for s in by[w]], dimension) for w in by}
            where = {"judge": judge, "dimension": dimension}
            if dimension != REWARD:
                failed += [{**where, "policy": w, "invalid": s.count(None), "of": len(s)} for w, s in scores.items()]
            pairs = zip(scores["base"], scores["final"], strict=True)
            gains = [None if b is None or f is None else f - b for b, f in pairs]
            if not any(gain is not None for gain in gains):
                continue
            for name, column in {**scores, "gain": gains}.items():
                valid = [(value, prompt) for value, prompt in zip(column, prompts, strict=True) if value is not None]
                if not valid:  # of the guided base
                    continue
                mean, low, high = self._interval(valid)
                metrics[f"{judge}_{dimension}_{name}"] = mean
                row = {**where, "policy": name, "mean": mean, "low": low, "high": high}
                rows.append({**row, "n": len(valid), "invalid": column.count(None)})
                if name in by and dimension != REWARD:
                    full = sum(value >= 4.5 for value, _ in valid)
                    metrics[f"{judge}_{dimension}_full_marks_{name}"] = full / len(valid)
        agreed = self._agreement(samples)
        for row in agreed:
            for name in KEPT if row["num_valid"] else ():
                if row[name] is not None:
                    metrics[f"critic_{row['dimension']}_{name}_{row['policy']}"] = row[name]
        return Summary(
            stage="evaluate", metrics=metrics, tables={"scores": rows, "invalid": failed, "agreement": agreed}
        )

    def _agreement(self, samples: Sequence[Sample]) -> list[dict[str, Any]]:
        """The critic's agreement with the auditor by dimension of the reward and policy, as the bench measures it."""
        predictions = [
            Prediction(
                id=f"{sample.policy}-{sample.index}", dimension=dimension, prompt=sample.prompt, difficulty="",
                source=sample.policy, whose="auditor", reference=reference, outcome=outcome,
            )
            for dimension in self.config.reward.dimensions
            for sample in samples
            if (outcome := _assessment(sample, "critic").get(dimension))
            and (reference := soft_scores([_assessment(sample, "auditor")], dimension)[0]) is not None
        ]  # fmt: skip
        estimate = self.config.bench.point_estimate
        found = agreement(predictions, estimate, self.config.evaluate.num_bootstrap, self.config.seed)
        return [
            {"dimension": group.dimension, "policy": group.value, **group.metrics}
            for group in found.groups
            if group.by == "source"
        ]

    def _interval(self, valid: Sequence[tuple[float, Prompt]]) -> tuple[float, float, float]:
        """Mean and 95% interval, clustered by prompt: images of one prompt are no independent witnesses."""
        number = self.config.evaluate.num_bootstrap
        return mean_ci([v for v, _ in valid], number, self.config.seed, clusters=[prompt for _, prompt in valid])

    def _judged(self) -> Iterator[tuple[str, str]]:
        yield from (("auditor", d) for d in (REWARD, *self.config.auditor.rubrics))
        yield from (("critic", d) for d in (REWARD, *self.config.critic.rubrics))

    def _values(self, assessments: Sequence[Assessment], dimension: str) -> list[float | None]:
        """Scores of a dimension, or rewards; None where a judgement failed."""
        if dimension != REWARD:
            return soft_scores(assessments, dimension)
        rewards, valid = rewards_of(assessments, self.config.reward)
        return [value if ok else None for value, ok in zip(rewards.tolist(), valid.tolist(), strict=True)]


def _assessment(sample: Sample, judge: str) -> Assessment:
    return _ASSESSMENT.validate_python(sample.scores[judge])
