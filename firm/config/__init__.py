"""The configuration of a run as one pydantic model; ``firm.presets`` loads it.

Unknown keys and impossible values are rejected. Every section is handed to the code it configures and to no other.
This module loads no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt, model_validator

from firm.config.chat import ChatConfig as ChatConfig
from firm.config.chat import EndpointChat as EndpointChat
from firm.config.chat import PythonChat as PythonChat
from firm.config.launch import LaunchConfig, LocalLaunch
from firm.config.section import NamedFile, NonNegative, Positive, Section, Share

Dimension = Literal["instruction_following", "quality"]


class PromptsConfig(Section):
    """Where prompts come from. Prompts of the test split never enter curation's training data or RL."""

    path: str | None = None  # a user's file: text, JSONL or a JSON list of {"input_prompt": ...}
    function: str | None = None  # dotted name "module:function" of function(split) -> list[str]
    test_share: Share = 0.1  # held out by the hash of the prompt, where `function` does not say
    limit: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if (self.path is None) == (self.function is None):
            raise ValueError("give either path or function, not both or neither")
        return self

    def named_files(self) -> Iterator[NamedFile]:
        """The prompts."""
        if self.path is not None:
            yield NamedFile("path", self.path)


class PolicyConfig(Section):
    """An image generator: the model that RL trains, or a source of candidates."""

    family: Literal["sd3"] = "sd3"
    model: str  # a folder, a hub id, or pkg://PACKAGE/PATH for files inside an installed package
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    resolution: PositiveInt
    max_sequence_length: PositiveInt = 256  # T5 tokens; 1 where the model has no T5

    def named_files(self) -> Iterator[NamedFile]:
        """The model."""
        yield NamedFile("model", self.model, is_model=True)


class GeneratedSource(Section):
    """Candidates sampled from a generator on the training (or held-out) prompts."""

    kind: Literal["generated"] = "generated"
    name: str
    policy: PolicyConfig
    num_images: PositiveInt
    num_inference_steps: PositiveInt
    guidance_scale: Positive = 1.0
    mismatched: Share = 0.0  # share of images paired with another prompt on purpose, as score 1 and 2 are rare


class FunctionSource(Section):
    """Candidates from a function(index, seed, split) -> (prompt, PIL image), by dotted name."""

    kind: Literal["function"] = "function"
    name: str
    function: str
    num_images: PositiveInt


class FilesSource(Section):
    """Candidates from a user's JSONL file of {"prompt": ..., "image": path relative to the file}."""

    kind: Literal["files"] = "files"
    name: str
    path: str

    def named_files(self) -> Iterator[NamedFile]:
        """The rows and their images."""
        yield NamedFile("path", self.path, follow=("image",))


CandidateSource = Annotated[GeneratedSource | FunctionSource | FilesSource, Field(discriminator="kind")]


class JudgedDimension(Section):
    """How curation judges one dimension: the teacher's rubric and the share of its examples that train the critic."""

    rubric: str
    share: Share = 1.0

    def named_rubrics(self) -> Iterator[str]:
        """The teacher's."""
        yield self.rubric


class CurationConfig(Section):
    """Plan-then-score curation (paper section 3.2) and score balancing."""

    planner: ChatConfig
    evaluator: ChatConfig
    sources: list[CandidateSource] = Field(min_length=1)
    planner_rubric: str = "plan"
    dimensions: dict[Dimension, JudgedDimension] = {"instruction_following": JudgedDimension(rubric="evaluate")}
    rationale: Literal["full", "summary"] = "full"  # summary: the evaluator's Final Analysis only
    hard_from: PositiveInt = 6  # prompts whose plan has this many questions are "hard", others "easy"
    attempts: PositiveInt = 3  # tries for an answer that does not parse
    shard_size: PositiveInt = 1024
    batch_size: PositiveInt = 128
    test_share: Share = (
        0.1  # of each source, on held-out prompts; files are where prompts.test_share puts their prompts
    )
    target: dict[int, NonNegative] = {1: 1, 2: 1, 3: 1, 4: 1, 5: 1}  # wanted ratio of the scores
    oversample: Positive = 1.0  # a scarce score may be repeated up to this factor in the training data

    @model_validator(mode="after")
    def _target_covers_scores(self) -> CurationConfig:
        if not set(self.target) <= {1, 2, 3, 4, 5} or sum(self.target.values()) <= 0:
            raise ValueError("target must map scores 1..5 to ratios, at least one of them positive")
        if len({s.name for s in self.sources}) != len(self.sources):
            raise ValueError("sources must have distinct names")
        return self

    def named_rubrics(self) -> Iterator[str]:
        """The planner's."""
        yield self.planner_rubric


class LoraConfig(Section):
    """Low-rank adapter."""

    rank: PositiveInt = 32
    alpha: PositiveInt = 64


class CriticConfig(Section):
    """The critic: which model it starts from, how it is asked and how it answers.

    ``kind: endpoint`` uses a served critic in bench, reward and evaluation, and trains none.
    """

    kind: Literal["trained", "endpoint"] = "trained"
    model: str = ""
    from_scratch: bool = False  # random weights from the model's config (tiny models only)
    endpoint: EndpointChat | None = None
    answer_style: Literal["score_first", "reason_first"] = "reason_first"
    rubrics: dict[Dimension, str]  # template names in firm/critics/templates
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    max_new_tokens: PositiveInt = 1024
    batch_size: PositiveInt = 8

    @model_validator(mode="after")
    def _kind_has_its_fields(self) -> CriticConfig:
        if self.kind == "trained" and not self.model:
            raise ValueError("a trained critic needs `model`")
        if self.kind == "endpoint" and self.endpoint is None:
            raise ValueError("an endpoint critic needs `endpoint`")
        return self

    def named_files(self) -> Iterator[NamedFile]:
        """The model that training starts from."""
        if self.kind == "trained":
            yield NamedFile("model", self.model, is_model=True)

    def named_rubrics(self) -> Iterator[str]:
        """One for each dimension."""
        yield from self.rubrics.values()


class SFTConfig(Section):
    """Supervised fine-tuning of the critic (method.md section 3)."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: learns from scratch in fewer steps
    learning_rate: Positive = 1e-5
    lr_scheduler: str = "cosine"
    lr_scheduler_kwargs: dict[str, float] = {}
    warmup_ratio: Share = 0.1
    weight_decay: NonNegative = 0.0
    adam_beta2: Share = 0.999
    max_grad_norm: Positive = 1.0
    batch_size: PositiveInt = 5  # per device
    gradient_accumulation: PositiveInt = 2
    epochs: Positive = 1.0
    max_steps: PositiveInt | None = None
    checkpoint_steps: PositiveInt = 500
    gradient_checkpointing: bool = False
    lora: LoraConfig | None = None


class Rule(Section):
    """One condition of the gate, on a metric of the bench, for example ``mae <= 0.6``."""

    metric: str
    dimension: Dimension = "instruction_following"
    source: str | None = None  # only examples of this candidate source
    at_most: float | None = None
    at_least: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Rule:
        if self.at_most is None and self.at_least is None:
            raise ValueError("a rule needs at_most or at_least")
        return self


class BenchConfig(Section):
    """Critic against human scores; the gate decides whether it may steer RL."""

    num_bootstrap: PositiveInt = 1000
    point_estimate: Literal["score", "soft_score", "median"] = "score"
    gate: list[Rule] = Field(min_length=1)


class RewardConfig(Section):
    """Reward formula (paper section 3.4). Scores are normalised with (s-1)/4."""

    formula: Literal["qma", "cme", "weighted_sum", "base_only", "base_and_bonus"] = "qma"
    base: Dimension = "instruction_following"
    bonuses: list[Dimension] = ["quality"]
    weights: list[NonNegative] = [0.4, 0.6]  # w1 (base alone), then one per bonus
    soft: bool = True  # expectation over the score tokens instead of the hard score

    @model_validator(mode="after")
    def _weights_match(self) -> RewardConfig:
        if self.formula == "base_only":
            return self
        if self.formula in ("qma", "cme") and len(self.bonuses) != 1:
            raise ValueError(f"{self.formula} takes exactly one bonus")
        if len(self.weights) != 1 + len(self.bonuses):
            raise ValueError(f"weights must have {1 + len(self.bonuses)} entries: the base, then one per bonus")
        if abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError("weights must sum to 1")
        return self


class RLConfig(Section):
    """DiffusionNFT (reference nft.md; names as in NVlabs/DiffusionNFT where it has one)."""

    prompts_per_epoch: PositiveInt
    group_size: int = Field(ge=2)
    max_epochs: PositiveInt
    num_inference_steps: PositiveInt = 10
    solver: Literal["euler", "dpm2"] = "dpm2"
    batch_size: PositiveInt = 8  # images a forward pass
    inner_epochs: PositiveInt = 1
    optimizer_steps: PositiveInt = 1  # per inner epoch
    timesteps: Literal["scheduler", "uniform"] = "scheduler"
    timestep_fraction: Share = 0.99  # scheduler: int(fraction * num_inference_steps) timesteps a sample
    num_timesteps: PositiveInt = 1  # uniform: draws a sample
    learning_rate: Positive = 3e-4
    weight_decay: NonNegative = 1e-4
    adam_beta2: Share = 0.999
    max_grad_norm: Positive = 1.0
    lora: LoraConfig | None = None  # none: full fine-tuning
    beta: Positive = 1.0
    adv_clip_max: Positive = 5.0
    adv_mode: Literal["all", "positive_only", "negative_only", "one_only", "binary"] = "all"
    std: Literal["global", "group"] = "global"
    kl_weight: NonNegative = 1e-4
    decay: Literal["copy", "linear_to_0.5", "delayed_linear_to_0.999"] = "linear_to_0.5"
    ema_decay: Share = 0.9
    dtype: Literal["float32", "bfloat16"] = "float32"  # autocast of the forward passes
    gradient_checkpointing: bool = False
    checkpoint_epochs: PositiveInt = 30


class AuditorConfig(Section):
    """A judge that RL does not optimise. Stops RL when the reward rises while this judge's score falls."""

    judge: ChatConfig
    rubrics: dict[Dimension, str] = {"instruction_following": "evaluate"}
    every: PositiveInt = 10  # epochs between checks
    patience: PositiveInt = 3  # checks in a row below the best before RL stops
    tolerance: NonNegative = 0.0  # a fall smaller than this does not count
    num_images: PositiveInt = 128

    def named_rubrics(self) -> Iterator[str]:
        """One for each dimension."""
        yield from self.rubrics.values()


class EvaluateConfig(Section):
    """Held-out prompts before and after RL, with the same seeds."""

    num_images: PositiveInt = 256
    num_inference_steps: PositiveInt = 40
    guidance_scale: Positive = 1.0
    batch_size: PositiveInt = 8
    num_bootstrap: PositiveInt = 1000


class RunConfig(Section):
    """Everything that defines a run. Stages receive the smallest section they need."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=60)
    seed: int = Field(default=0, ge=0, lt=2**31)
    store: str = "runs"  # a folder, or s3://bucket/prefix (minio://bucket/prefix)
    prompts: PromptsConfig
    policy: PolicyConfig
    curation: CurationConfig
    critic: CriticConfig
    sft: SFTConfig = SFTConfig()
    bench: BenchConfig
    reward: RewardConfig = RewardConfig()
    rl: RLConfig
    auditor: AuditorConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LocalLaunch()
    expected_s: dict[str, Positive] = {}  # stage -> seconds on two cores, for the first estimate of the time left

    @model_validator(mode="before")
    @classmethod
    def _in_one_order(cls, data: Any) -> Any:
        return in_one_order(data)

    @model_validator(mode="after")
    def _reward_is_judged(self) -> RunConfig:
        needed = {self.reward.base, *(self.reward.bonuses if self.reward.formula != "base_only" else ())}
        if missing := sorted(needed - set(self.critic.rubrics)):
            raise ValueError(f"reward needs {missing}, for which critic.rubrics has no rubric")
        if self.reward.base not in self.auditor.rubrics:
            raise ValueError(f"auditor.rubrics has no rubric for the reward's base {self.reward.base}")
        if self.critic.kind == "trained" and not needed <= set(self.curation.dimensions):
            raise ValueError("reward uses a dimension that curation.dimensions does not have")
        return self


def in_one_order(data: Any) -> Any:
    """Sort the keys of all mappings: KFP hands a dict over in any order, and results must not depend on it."""
    if isinstance(data, dict):
        return {key: in_one_order(data[key]) for key in sorted(data, key=str)}
    return [in_one_order(item) for item in data] if isinstance(data, list) else data


def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value or pydantic model, independent of key order."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
