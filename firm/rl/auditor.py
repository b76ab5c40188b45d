"""Audits: how critic and auditor judge the policy's images of fixed prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from pydantic import TypeAdapter

from firm.chat.journal import OpenChat, forgetful
from firm.config import RewardConfig, SteeredRun
from firm.config.reward import REWARD
from firm.critics.judge import Judge, JudgeInput, Judging, judging, soft_scores
from firm.critics.load import open_judge
from firm.dist import Ranks, gather
from firm.looks import look
from firm.policies.encoders import HOST
from firm.policies.generate import Encoded, encode
from firm.policies.policy import Policy
from firm.policies.sampler import noise_for
from firm.records import Assessment, Invalid, Prompt, UserError
from firm.rewards import rewards_of
from firm.rl.audit import Audit, SampleName, Values, best
from firm.rl.rollout import draw_prompts, sample_for

IMAGES_PER_PROMPT = 2  # the fewest that show whether the critic ranks images of one prompt as the auditor does
DIGITS = 4  # of a value in an audit, of which a checkpoint holds thousands
_ASSESSMENTS = TypeAdapter(list[Assessment])


class Auditor:
    """Audits policies on training prompts: all checks on the same prompts and noise, the last ones on fresh ones.

    The ranks share the images of an audit; all take part in it and get the same one.

    Attributes:
        shown: This rank's share of the last audit, for people.
    """

    shown: Sequence[JudgeInput] = ()

    def __init__(
        self,
        policy: Policy,
        critic: Judge,
        prompts: Sequence[Prompt],
        config: SteeredRun,
        ranks: Ranks,
        open_chat: OpenChat = forgetful,
    ) -> None:
        self.policy = policy
        self.critic = critic
        self.prompts = prompts
        self.config = config
        self.ranks = ranks
        self._encoded: tuple[Sequence[Prompt], Encoded] | None = None
        judge = config.auditor.judge
        self.judge: Judge = open_judge(judge, config.auditor.rubrics, chat=open_chat("auditor", judge))

    def check(self, epoch: int, parameters: str = "ema", sample: SampleName = "check") -> Audit:
        """Sample with a parameter set, which is what it is after ``epoch``, and judge."""
        number = self.config.auditor.num_images
        order = draw_prompts(self.prompts, number, self.config.seed, -1 - get_args(SampleName).index(sample))
        drawn = [order[i // IMAGES_PER_PROMPT] for i in range(number)]
        with judging(self.critic) as critic, judging(self.judge) as auditor:
            with self.policy.using(parameters):
                items = self._sample(drawn, f"audit/{sample}", critic, auditor)
            found = [values(self._everywhere(judge.assessments()), self.config.reward) for judge in (critic, auditor)]
        self.shown = items
        seen = shares(gather([look(item.images) for item in items], self.ranks))
        return Audit(sample=sample, epoch=epoch, prompts=tuple(drawn), critic=found[0], auditor=found[1], seen=seen)

    def _sample(self, drawn: Sequence[int], purpose: str, *judges: Judging) -> list[JudgeInput]:
        """This rank's share of the images of the drawn prompts, which judges get as they are made.

        Audits of one purpose have the same prompts: they are encoded for the first of them, and kept on the host.
        """
        share = self.ranks.share(len(drawn))
        prompts = [self.prompts[drawn[i]] for i in share]
        if not prompts:
            return []
        noise = noise_for(self.policy.latent_shape, self.config.seed, purpose, share)
        if self._encoded is None or self._encoded[0] != prompts:
            self._encoded = prompts, encode(self.policy, prompts).to(HOST)
        return sample_for(judges, self.policy, prompts, self._encoded[1], noise, self.config.rl)[1]

    def _everywhere(self, assessments: Sequence[Assessment]) -> list[Assessment]:
        """Assessments of all ranks' images, on every rank."""
        plain = _ASSESSMENTS.dump_python(list(assessments), mode="json")
        return _ASSESSMENTS.validate_python(gather(plain, self.ranks))

    def choose(self, candidates: Mapping[int, str]) -> list[Audit]:
        """Audit again, on fresh prompts and noise, so that the best of many noisy checks is not taken for the best.

        Args:
            candidates: Parameter set of each epoch that may be kept, that of epoch 0 among them.

        Returns:
            An audit of each on one fresh sample, which chooses, then those of the base and the kept policy on another,
            which measures: what was chosen for its luck shows none there.
        """
        choice = [self.check(epoch, name, "choice") for epoch, name in sorted(candidates.items())]
        kept = best(choice).epoch
        return choice + [self.check(epoch, candidates[epoch], "report") for epoch in sorted({0, kept})]


def shares(seen: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Share of the images of which each thing was seen."""
    return {name: round(sum(image[name] for image in seen) / len(seen), DIGITS) for name in seen[0]}


def values(assessments: Sequence[Assessment], formula: RewardConfig) -> dict[str, Values]:
    """A judge's values of each image by measure: the reward that its scores give, and its scores on every dimension.

    Raises:
        UserError: No image has a reward, since judgements failed.
    """
    rewards, valid = rewards_of(assessments, formula)
    if not bool(valid.any()):
        failed = (o for a in assessments for o in a.values() if isinstance(o, Invalid))
        raise UserError(
            "the auditor or the critic judged none of the images", "auditor.judge", str(next(failed, "no answers"))
        )
    columns = {REWARD: [r if ok else None for r, ok in zip(rewards.tolist(), valid.tolist(), strict=True)]}
    columns |= {d: soft_scores(assessments, d, formula.soft) for d in assessments[0]}
    return {m: tuple(None if v is None else round(v, DIGITS) for v in column) for m, column in columns.items()}
