"""How well a critic in training judges examples that it does not learn from: curation's test examples."""

from __future__ import annotations

from itertools import cycle, islice
from typing import Any

from firm import dist
from firm.config import CriticConfig
from firm.critics.agreement import Agreement, Expected, Prediction, agreement
from firm.critics.judge import JudgeInput
from firm.critics.local import LocalCritic
from firm.records import Example, Prompt, UserError
from firm.seeds import seed_for
from firm.sft.loss import with_logits
from firm.sft.run import EVAL
from firm.sft.sharding import is_sharded, reshard
from firm.storage.table import Table, shards_in

COLUMNS = ("id", "dimension", "prompt", "difficulty", "source", "score", "images")


class HeldOut:
    """Test examples that a critic judges as it will be asked to: with its score-first prefix, or by writing answers.

    They are those of whole prompts, drawn by a seed, so that images of one prompt can be ranked. Ranks share them in
    batches, as many on each: where a critic is sharded, all ranks go through it at the same time.
    """

    def __init__(self, data: str, critic: CriticConfig, number: int, seed: int) -> None:
        """Choose at most ``number`` examples of the artifact ``data``.

        Raises:
            UserError: There are none (exit code 2).
        """
        shards = shards_in(data, "test")
        self._critic = critic
        self._rows = Table(shards, Example, COLUMNS)
        if not len(self._rows):
            raise UserError("no test examples to judge while training", "sft.eval_steps", "set it to 0", usage=True)
        listed = Table(shards, Example, ("prompt", "dimension")).__getitems__(range(len(self._rows)))
        chosen = sorted(range(len(listed)), key=lambda i: (seed_for(seed, "sft/eval", listed[i]["prompt"]), i))[:number]
        self._batches = []
        for dimension in critic.rubrics:
            mine = [i for i in chosen if listed[i]["dimension"] == dimension]
            self._batches += [mine[i : i + critic.batch_size] for i in range(0, len(mine), critic.batch_size)]

    def judge(self, model: Any) -> dict[str, float]:
        """Numbers by name, the same on all ranks, which call this together; the model is left as it was."""
        ranks = dist.start()
        on_each = -(-len(self._batches) // ranks.size)
        mine = list(islice(cycle(self._batches), on_each * ranks.size))[ranks.rank :: ranks.size]
        critic = LocalCritic(self._critic.model, self._critic, ranks.device, model, together=is_sharded(model))
        was_training = model.training
        model.eval()
        with with_logits(model):
            found = [prediction for batch in mine for prediction in self._predictions(critic, batch)]
        model.train(was_training)
        reshard(model)
        everywhere = [Prediction(**plain) for plain in dist.gather([p.model_dump(mode="json") for p in found], ranks)]
        once = {(p.dimension, p.id): p for p in everywhere}
        return _numbers(agreement([once[key] for key in sorted(once)], num_bootstrap=1))

    def _predictions(self, critic: LocalCritic, batch: list[int]) -> list[Prediction]:
        rows = self._rows.__getitems__(batch)
        prompts = [Prompt.model_validate(row["prompt"]) for row in rows]
        items = [
            JudgeInput(prompt, [image["bytes"] for image in row["images"]], dimensions=(row["dimension"],))
            for row, prompt in zip(rows, prompts, strict=True)
        ]
        return [
            Prediction(**_expected(row, prompt).model_dump(), outcome=assessment[row["dimension"]])
            for row, prompt, assessment in zip(rows, prompts, critic.judge(items), strict=True)
        ]


def _expected(row: dict[str, Any], prompt: Prompt) -> Expected:
    kept = {name: row[name] for name in ("id", "dimension", "difficulty", "source")}
    return Expected(**kept, prompt=prompt, whose="teacher", reference=row["score"])


def _numbers(result: Agreement) -> dict[str, float]:
    """What is shown while training: the error in all, and for each dimension with ranks and failed judgements."""
    found = {"mae": result.overall[0].metrics["mae"]}
    for group in result.groups:
        if group.by == "all":
            found |= {f"{group.dimension}_{name}": group.metrics[name] for name in ("mae", "pairwise", "spearman")}
            found[f"{group.dimension}_invalid"] = sum(group.invalid.values()) / float(group.metrics["n"] or 1)
    return {EVAL + name: value for name, value in found.items() if value is not None}
