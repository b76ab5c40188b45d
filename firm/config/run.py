"""Everything that defines a run, as one pydantic model; no torch is loaded."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator, model_validator

from firm.config.auditor import AuditorConfig
from firm.config.bench import BenchConfig
from firm.config.critic import CriticConfig
from firm.config.curation import CurationConfig
from firm.config.evaluate import EvaluateConfig
from firm.config.images import ImagesConfig
from firm.config.launch import LaunchConfig, LocalLaunch
from firm.config.policy import PolicyConfig
from firm.config.prompts import PromptsConfig
from firm.config.reward import REWARD, RewardConfig
from firm.config.rl import RLConfig
from firm.config.section import Positive, Section
from firm.config.sft import SFTConfig

StageName = Literal["curation", "sft", "bench", "gate", "rl", "evaluate", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""All stages, left to right: each a package of firm and a component of the pipeline."""
ChangingSection = Literal["curation", "sft", "bench", "rl"]
"""Sections that a further round may change; with the others alike, rounds can be compared."""


class RunConfig(Section):
    """Everything that defines a run. Stages receive the smallest section they need."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=60)
    seed: int = Field(default=0, ge=0, lt=2**31)
    store: str = "runs"  # a folder, or s3://bucket/prefix (minio://bucket/prefix)
    images: ImagesConfig = ImagesConfig()
    prompts: PromptsConfig
    policy: PolicyConfig
    curation: CurationConfig
    critic: CriticConfig
    sft: SFTConfig = SFTConfig()
    bench: BenchConfig
    reward: RewardConfig = RewardConfig.model_validate({})
    rl: RLConfig
    auditor: AuditorConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LocalLaunch()
    rounds: int = Field(default=1, ge=1, le=9)  # how often the stages run, each time from the last policy and critic
    further_rounds: dict[ChangingSection, dict[str, Any]] = {}  # what is different in every round after the first
    expected_s: dict[StageName, Positive] = {}  # stage -> seconds on two cores, for the first estimate of the time left

    @field_validator("store")
    @classmethod
    def _holds_no_secret(cls, store: str) -> str:
        if "@" in urlsplit(store).netloc:
            raise ValueError("it must hold no password: put the keys into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return store

    @field_validator("policy")
    @classmethod
    def _can_be_trained(cls, policy: PolicyConfig) -> PolicyConfig:
        if policy.dtype == "float16":
            raise ValueError("gradients of RL are too small for float16: set policy.dtype to bfloat16 or float32")
        return policy

    @model_validator(mode="before")
    @classmethod
    def _in_one_order(cls, data: Any) -> Any:
        return in_one_order(data)

    @model_validator(mode="after")
    def _reward_is_judged(self) -> RunConfig:
        needed = set(self.reward.dimensions)
        if missing := sorted(needed - set(self.critic.rubrics)):
            raise ValueError(f"reward needs {missing}, for which critic.rubrics has no rubric")
        if missing := sorted(needed - set(self.auditor.rubrics)):
            raise ValueError(f"auditor.rubrics has no rubric for {missing}, of which the reward is made")
        if REWARD in {*self.critic.rubrics, *self.auditor.rubrics}:
            raise ValueError(
                f"critic.rubrics or auditor.rubrics has a dimension called {REWARD}, as the reward itself is"
            )
        if self.wants_distributions and not self.critic.gives_distributions:
            fix = "set critic.endpoint.logprobs to true, or critic.num_samples above 1, or"
            instead = "reward.soft to false and bench.point_estimate to score"
            raise ValueError(f"the critic gives whole scores and no distribution: {fix} {instead}")
        if self.critic.kind == "trained" and not needed <= set(self.curation.dimensions):
            raise ValueError("reward uses a dimension that curation.dimensions does not have")
        return self

    @model_validator(mode="after")
    def _gate_measures_what_there_is(self) -> RunConfig:
        names = [s.name for s in (*self.curation.sources, *self.bench.sources)]
        if len(set(names)) != len(names):
            raise ValueError("sources of curation and bench must have distinct names")
        known = {"dimension": list(self.critic.rubrics), "source": names}
        for i, rule in enumerate(self.bench.gate.rules):
            for field, values in known.items():
                if (value := getattr(rule, field)) not in (None, *values):
                    where = f"bench.gate.rules.{i}.{field}"
                    raise ValueError(f"{where}: unknown {field} {value!r}, use one of {', '.join(values)}")
            judged = [s.name for s in (*self.curation.sources, *self.bench.sources) if s.kind != "scores"]
            ruled = {rule.dimension} if rule.dimension else set(self.reward.dimensions)
            if rule.source in judged and (missing := sorted(ruled - set(self.curation.dimensions))):
                where = f"bench.gate.rules.{i}.source"
                raise ValueError(f"{where}: the teacher judges {rule.source}, but not its {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _gate_covers_the_reward(self) -> RunConfig:
        gaps = self.bench.gaps(self.reward.dimensions)
        accepted = self.bench.gate.accept_gaps
        if unknown := [name for name in accepted if name not in gaps]:
            raise ValueError(f"bench.gate.accept_gaps names {', '.join(unknown)}, which is no gap: remove it")
        if missing := [gap for gap in gaps if gap not in accepted]:
            raise ValueError(
                f"bench.gate has no rule for {', '.join(missing)} on images of the policy that RL starts from. Give "
                "bench.sources one of kind policy (or scores with of_policy: true), and bench.gate.rules "
                "{metric: skill_low, source: ITS NAME, at_least: 0} and {metric: pairwise, source: ITS NAME, "
                "at_least: 0.6} (or another bound above 0.5); or accept the gap by its name in bench.gate.accept_gaps"
            )
        return self

    @property
    def wants_distributions(self) -> bool:
        """Whether the critic's scores are to be more than whole numbers."""
        return self.reward.soft or self.bench.point_estimate != "score"


def in_one_order(data: Any) -> Any:
    """Sort the keys of all mappings, as texts: KFP hands a dict over as JSON in any order, which must not matter."""
    if isinstance(data, dict):
        return {str(key): in_one_order(data[key]) for key in sorted(data, key=str)}
    return [in_one_order(item) for item in data] if isinstance(data, list) else data


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value or pydantic model, independent of key order."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
