"""Everything that defines a run, as one pydantic model; no torch is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, TypeVar, cast, get_args
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
from firm.records import UserError

StageName = Literal["curation", "sft", "bench", "gate", "rl", "evaluate", "report"]
STAGES: tuple[StageName, ...] = get_args(StageName)
"""All stages, left to right: each a package of firm and a component of the pipeline."""
ChangingSection = Literal["curation", "sft", "bench", "rl"]
"""Sections that a further round may change; with the others alike, rounds can be compared."""
View = TypeVar("View", bound="RunConfig")


class RunConfig(Section):
    """Everything that defines a run. Stages receive the smallest section they need.

    The critic is always there. Which stages run follows from the other sections (`firm.config.stages`). A section that
    is null is as if nobody had mentioned it, a ``base`` included.
    """

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=60)
    seed: int = Field(default=0, ge=0, lt=2**31)
    store: str = "runs"  # a folder, or s3://bucket/prefix (minio://bucket/prefix)
    images: ImagesConfig = ImagesConfig()
    prompts: PromptsConfig = PromptsConfig()
    policy: PolicyConfig | None = None
    curation: CurationConfig | None = None
    critic: CriticConfig
    sft: SFTConfig = SFTConfig()
    bench: BenchConfig | None = None
    reward: RewardConfig | None = None  # QMA where there is rl
    rl: RLConfig | None = None
    auditor: AuditorConfig | None = None
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
    def _can_be_trained(cls, policy: PolicyConfig | None) -> PolicyConfig | None:
        if policy is not None and policy.dtype == "float16":
            raise ValueError("gradients of RL are too small for float16: set policy.dtype to bfloat16 or float32")
        return policy

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_null(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if value is not None}
            if "rl" in data:
                data.setdefault("reward", {})
        return in_one_order(data)

    @model_validator(mode="after")
    def _needs_are_met(self) -> RunConfig:
        there = {name: value is not None for name, value in self}
        there["prompts"] = self.prompts.given
        lacking = [(who, [name for name in needed if not there[name]]) for who, needed in self._needs()]
        if said := [f"{who} needs {' and '.join(missing)}" for who, missing in lacking if missing]:
            raise ValueError(f"{'; '.join(said)}: add what is missing, or leave out what needs it")
        return self

    def _needs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yields what the configuration has, with the sections without which it means nothing."""
        if self.rl is not None:
            trained = ("curation",) if self.critic.kind == "trained" else ()
            yield "rl", ("prompts", "policy", *trained, "bench", "auditor")
        if self.rounds > 1:
            yield "more than one of rounds", ("rl",)
        for i, candidates in enumerate(self.curation.sources if self.curation else ()):
            if candidates.kind == "generated":
                yield f"curation.sources.{i}", ("prompts",)
        for i, source in enumerate(self.bench.sources if self.bench else ()):
            if source.kind == "policy":
                yield f"bench.sources.{i}", ("prompts", "policy", "curation")

    @model_validator(mode="after")
    def _reward_is_judged(self) -> RunConfig:
        needed = set(self.dimensions)
        audited = self.auditor.rubrics if self.auditor else {}
        if missing := sorted(needed - set(self.critic.rubrics)):
            raise ValueError(f"reward needs {missing}, for which critic.rubrics has no rubric")
        if self.reward and self.auditor and (missing := sorted(needed - set(audited))):
            raise ValueError(f"auditor.rubrics has no rubric for {missing}, of which the reward is made")
        if REWARD in {*self.critic.rubrics, *audited}:
            raise ValueError(
                f"critic.rubrics or auditor.rubrics has a dimension called {REWARD}, as the reward itself is"
            )
        if self.wants_distributions and not self.critic.gives_distributions:
            fix = "set critic.endpoint.logprobs to true, or critic.num_samples above 1, or"
            instead = "reward.soft to false and bench.point_estimate to score"
            raise ValueError(f"the critic gives whole scores and no distribution: {fix} {instead}")
        return self

    @model_validator(mode="after")
    def _critic_learns_what_it_is_for(self) -> RunConfig:
        if self.curation is None or self.critic.kind != "trained":
            return self
        if not self.curation.sources:
            raise ValueError("curation.sources is empty, and the critic is trained on what they give")
        if missing := sorted(set(self.dimensions) - set(self.curation.dimensions)):
            of = "reward" if self.reward else "critic.rubrics"
            raise ValueError(f"{of} uses a dimension that curation.dimensions does not have: {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _gate_measures_what_there_is(self) -> RunConfig:
        if self.bench is None:
            return self
        curation = self.curation
        sources = (*(curation.sources if curation else ()), *self.bench.sources)
        names = [s.name for s in sources]
        if len(set(names)) != len(names):
            raise ValueError("sources of curation and bench must have distinct names")
        known = {"dimension": list(self.critic.rubrics), "source": names}
        for i, rule in enumerate(self.bench.gate.rules):
            for field, values in known.items():
                if (value := getattr(rule, field)) not in (None, *values):
                    where = f"bench.gate.rules.{i}.{field}"
                    raise ValueError(f"{where}: unknown {field} {value!r}, use one of {', '.join(values)}")
            judged = [s.name for s in sources if s.kind != "scores"]
            ruled = {rule.dimension} if rule.dimension else set(self.dimensions)
            if curation and rule.source in judged and (missing := sorted(ruled - set(curation.dimensions))):
                where = f"bench.gate.rules.{i}.source"
                raise ValueError(f"{where}: the teacher judges {rule.source}, but not its {', '.join(missing)}")
        return self

    @model_validator(mode="after")
    def _gate_covers_the_reward(self) -> RunConfig:
        if self.bench is None or self.rl is None:
            return self
        gaps = self.bench.gaps(self.dimensions)
        if unknown := [name for name in self.bench.gate.accept_gaps if name not in gaps]:
            raise ValueError(f"bench.gate.accept_gaps names {', '.join(unknown)}, which is no gap: remove it")
        if missing := self.bench.open_gaps(self.dimensions):
            raise ValueError(
                f"bench.gate has no rule for {', '.join(missing)} on images of the policy that RL starts from. Give "
                "bench.sources one of kind policy (or scores with of_policy: true), and bench.gate.rules "
                "{metric: skill_low, source: ITS NAME, at_least: 0} and {metric: pairwise, source: ITS NAME, "
                "at_least: 0.6} (or another bound above 0.5); or accept the gap by its name in bench.gate.accept_gaps"
            )
        return self

    @property
    def dimensions(self) -> tuple[str, ...]:
        """What the critic is for: the dimensions of the reward, or of all its rubrics where there is none."""
        return self.reward.dimensions if self.reward else tuple(self.critic.rubrics)

    @property
    def wants_distributions(self) -> bool:
        """Whether the critic's scores are to be more than whole numbers."""
        soft = self.reward is not None and self.reward.soft
        return soft or (self.bench is not None and self.bench.point_estimate != "score")

    def having(self, view: type[View], who: str) -> View:
        """This run as one that has the sections of a view, for code that cannot do without them.

        Raises:
            UserError: It has not; ``who`` is named.
        """
        needed = [name for name, field in view.model_fields.items() if field.is_required()]
        if missing := [name for name in needed if getattr(self, name) is None]:
            what = f"{who} needs {' and '.join(missing)}, which the configuration does not have"
            fix = "add it, or name a preset that has it as `base`: see `firm config show gen-shapes`"
            raise UserError(what, ", ".join(missing), fix, usage=True)
        return cast(View, view.model_construct(self.model_fields_set, **dict(self)))


def in_one_order(data: Any) -> Any:
    """Sort the keys of all mappings, as texts: KFP hands a dict over as JSON in any order, which must not matter."""
    if isinstance(data, dict):
        return {str(key): in_one_order(data[key]) for key in sorted(data, key=str)}
    return [in_one_order(item) for item in data] if isinstance(data, list) else data


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value or pydantic model, independent of key order."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
