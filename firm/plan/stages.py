"""What each stage of a run will cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from firm.config import (
    AuditorConfig,
    CuratedRun,
    GeneratedSource,
    LocalLaunch,
    MeasuredRun,
    PolicyConfig,
    RunConfig,
    SteeredRun,
    TaughtRun,
    stages_of,
)
from firm.plan.assumptions import SIDE, Assumptions, Calls, Cost, Phase, StagePlan
from firm.plan.calls import candidates, questions, rows, teaching
from firm.plan.critic import Judging, Questions, judging, training
from firm.plan.origins import configured
from firm.plan.policy import Measured, PolicyMeter
from firm.policies.policy import find_family
from firm.records import SPLITS

HELD = ("weights", "gradients", "states")
"""Parts of a GPU's memory that stay from phase to phase."""


class Sampled(RunConfig):
    """A run with a policy."""

    policy: PolicyConfig


class Planner:
    """Plans the first round of a run, stage by stage."""

    def __init__(self, config: RunConfig, given: Assumptions) -> None:
        """Finds the configurations of the models.

        Raises:
            UserError: That of one is not on this machine, or a policy's is of another family.
        """
        self.given = given
        policy = config.policy and _here(config.policy, "policy.model")
        self.config = config.model_copy(update={"policy": policy})
        self.critic = config.critic
        if self.critic.kind != "endpoint":
            folder = configured(self.critic.model, "critic.model")
            self.critic = self.critic.model_copy(update={"model": str(folder)})
        launch = config.launch
        processes = 1 if isinstance(launch, LocalLaunch) else max(launch.gpus, 1)
        self.workers = launch.num_workers * processes
        self.side = policy.resolution if policy else given.image_side or SIDE
        self.curated_side = given.image_side or self.side
        self.answer_tokens = min(given.answer_tokens, self.critic.max_new_tokens)
        self.candidates = candidates(config.having(CuratedRun, "curation"), given) if config.curation else {}

    def stages(self) -> list[StagePlan]:
        """Those of the run, left to right."""
        config, described = self.config, stages_of(self.config)
        plans: dict[str, StagePlan] = {}
        if "curation" in described:
            curated = config.having(CuratedRun, "curation")
            plans |= {"curation": self.curation(curated), "sft": self.sft(curated)}
        if "bench" in described:
            plans["bench"] = self.bench(config.having(MeasuredRun, "bench"))
        if "rl" in described:
            steered = config.having(SteeredRun, "rl")
            before = self._evaluated(steered)  # measured as it is before it is made to train
            self.policy.train(steered.rl)
            plans |= {"rl": self.rl(steered), "evaluate": self.evaluate(steered, before)}
        return [plans.get(stage, StagePlan(stage)) for stage in described]

    @cached_property
    def policy(self) -> PolicyMeter:
        """The policy that RL trains."""
        return PolicyMeter(self.config.having(Sampled, "sampling").policy, self.given.prompt_tokens)

    @cached_property
    def judged(self) -> Judging:
        """Judgements of the policy's images by the trained critic; of one that is served, nothing here."""
        if self.critic.kind == "endpoint":
            return Judging(0, Counter(), Cost())
        return judging(self.critic, self._questions(self.side), self.answer_tokens)

    def _questions(self, side: int) -> Questions:
        return Questions.of(self.critic, configured(self.critic.model, "critic.model"), side, self.given)

    def curation(self, config: CuratedRun) -> StagePlan:
        """Candidates are sampled here, and judged by others."""
        curation = config.curation
        phases = []
        for i, source in enumerate(curation.sources):
            if isinstance(source, GeneratedSource) and source.policy != "kept":
                number = sum(rows(config, source, split, self.given) for split in SPLITS)
                policy = _here(source.policy, f"curation.sources.{i}.policy.model")
                meter = self.policy if policy == config.policy else PolicyMeter(policy, self.given.prompt_tokens)
                measured = meter.sampling(curation.batch_size, source.num_inference_steps, source.guidance_scale)
                cost = measured.item * number
                phases += _sampling(f"sampling {source.name}", meter, measured.memory, cost)
        total = sum(self.candidates.values())
        again = {s.name: s.rewritten * sum(rows(config, s, p, self.given) for p in SPLITS) for s in curation.sources}
        written = round(sum(again.values()))
        calls = teaching(config, total + written, self.curated_side, self.given)
        if written:
            writer = curation.reporter or curation.evaluator
            rubric = [curation.rewriter_rubric]
            calls.append(questions("rewriter", writer, rubric, written, self.curated_side, self.given))
        return StagePlan("curation", int(bool(phases)), tuple(phases), tuple(calls))

    def sft(self, config: CuratedRun) -> StagePlan:
        """As if every judgement became an example, up to its dimension's share."""
        if self.critic.kind != "trained":
            return StagePlan("sft")
        sft = config.sft
        shares = [d.share for name, d in config.curation.dimensions.items() if name in self.critic.rubrics]
        examples = sum(shares) * self.candidates["train"]
        steps = sft.max_steps or math.ceil(
            sft.epochs * examples / (sft.batch_size * sft.gradient_accumulation * self.workers)
        )
        measured = training(
            self.critic, sft, self._questions(self.curated_side), self.given.answer_tokens, self.workers
        )
        cost = (measured.batch * sft.gradient_accumulation + measured.step) * steps
        phases = (Phase("training", measured.memory, cost, self.workers),)
        return StagePlan("sft", self.workers, phases, checkpoint=measured.checkpoint, note=f"{steps:,} steps")

    def bench(self, config: MeasuredRun) -> StagePlan:
        """The policy's images are sampled and judged by the teacher, then the critic judges all there is."""
        phases = []
        calls: list[Calls] = []
        drawn = 0
        for source in config.bench.sources:
            if source.kind == "policy":
                drawn += source.num_images
                taught = config.having(TaughtRun, "bench")
                batch = min(taught.curation.batch_size, source.num_images)
                measured = self.policy.sampling(batch, source.num_inference_steps, source.guidance_scale)
                cost = measured.item * source.num_images
                phases += _sampling(f"sampling {source.name}", self.policy, measured.memory, cost)
        if drawn:
            calls += teaching(config.having(CuratedRun, "bench"), drawn, self.side, self.given)
        items = self.candidates.get("test", 0) + drawn
        phases.append(self._judging(items))
        curated = config.having(CuratedRun, "bench") if config.curation else None
        tested = [rows(curated, s, "test", self.given) for s in curated.curation.sources] if curated else []
        audited = sum(min(n, config.bench.auditor_images) for n in (*tested, drawn))
        calls += self._asked(items)
        if config.auditor:
            calls.append(self._audited(config.auditor, audited))
        return StagePlan("bench", 1, tuple(phases), tuple(calls))

    def rl(self, config: SteeredRun) -> StagePlan:
        """Epochs and audits on all GPUs; the policy trains by now."""
        rl = config.rl
        sampled = self.policy.sampling(rl.batch_size, rl.num_inference_steps)
        updated = self.policy.update(rl.batch_size)
        number = rl.prompts_per_epoch * rl.group_size
        timesteps = rl.num_timesteps
        if rl.timesteps == "scheduler":
            timesteps = max(int(rl.num_inference_steps * rl.timestep_fraction), 1)
        audits = _audits(config)
        audited = audits * config.auditor.num_images
        mine = number * rl.max_epochs / self.workers
        judge = self.judged
        critic = Counter(weights=judge.weights)
        held = _part(sampled.memory, *HELD) + critic
        shared = self.policy.shared(self.workers) if rl.sharding == "base" and self.workers > 1 else Counter[str]()
        updating = updated.item * (mine * timesteps * rl.inner_epochs)
        phases = (
            *_sampling("sampling", self.policy, sampled.memory + critic + shared, sampled.item * mine, self.workers),
            Phase("judging", held + judge.memory + _part(shared, *HELD), judge.item * mine, self.workers),
            Phase("updating", updated.memory + critic + shared, updating, self.workers),
            Phase("saving a checkpoint", self.policy.saving + critic + _part(shared, *HELD), Cost()),
            Phase(f"{audits} audits", {}, (sampled.item + judge.item) * (audited / self.workers), self.workers),
        )
        calls = (*self._asked(number * rl.max_epochs + audited), self._audited(config.auditor, audited))
        note = f"{rl.max_epochs} epochs"
        return StagePlan("rl", self.workers, phases, calls, self.policy.checkpoint, note)

    def _evaluated(self, config: SteeredRun) -> list[tuple[str, Measured]]:
        """Sampling of the policies that are compared, but the trained one."""
        settings = config.evaluate
        batch = min(settings.batch_size, settings.num_images)
        scales = {"base": settings.guidance_scale, "guided": settings.base_guidance_scale}
        steps = settings.num_inference_steps
        return [
            (name, self.policy.sampling(batch, steps, scale)) for name, scale in scales.items() if scale is not None
        ]

    def evaluate(self, config: SteeredRun, before: list[tuple[str, Measured]]) -> StagePlan:
        """Base and trained policy, and the base with guidance where it is asked for, beside the critic."""
        settings = config.evaluate
        batch = min(settings.batch_size, settings.num_images)
        final = self.policy.sampling(batch, settings.num_inference_steps, settings.guidance_scale)
        kept = _part(final.memory, "weights", "activations", "logits")
        measured = [*before, ("final", Measured(kept, final.item))]
        critic = Counter(weights=self.judged.weights)
        phases = [
            phase
            for name, one in measured
            for phase in _sampling(f"sampling {name}", self.policy, one.memory + critic, one.item * settings.num_images)
        ]
        judging_ = self._judging(settings.num_images * len(measured))
        held = Counter(weights=before[0][1].memory["weights"])
        phases.append(Phase(judging_.name, Counter(judging_.memory) + held, judging_.cost))
        asked = settings.num_images * len(measured)
        return StagePlan("evaluate", 1, tuple(phases), (*self._asked(asked), self._audited(config.auditor, asked)))

    def _judging(self, items: int) -> Phase:
        memory = self.judged.memory + Counter(weights=self.judged.weights)
        return Phase("judging", memory, self.judged.item * items)

    def _asked(self, items: int) -> list[Calls]:
        """What a served critic is asked."""
        served, rubrics = self.critic.endpoint, list(self.critic.rubrics.values())
        if served is None or self.critic.kind != "endpoint":
            return []
        return [questions("critic", served, rubrics, items * self.critic.num_samples, self.side, self.given)]

    def _audited(self, auditor: AuditorConfig, items: int) -> Calls:
        return questions("auditor", auditor.judge, list(auditor.rubrics.values()), items, self.side, self.given)


def _here(policy: PolicyConfig, key: str) -> PolicyConfig:
    model = str(configured(policy.model, key))
    find_family(policy.family, key).check(model, key)
    return policy.model_copy(update={"model": model})


def _sampling(name: str, policy: PolicyMeter, memory: Counter[str], cost: Cost, gpus: int = 1) -> list[Phase]:
    """Sampling, and the encoding before it where encoders are on the GPU for that only."""
    encoding = Phase("encoding prompts", _part(memory, *HELD) + policy.encoders, Cost(), gpus)
    return [*([encoding] if policy.encoders else []), Phase(name, memory, cost, gpus)]


def _part(memory: Mapping[str, int], *names: str) -> Counter[str]:
    return Counter({name: memory[name] for name in names if name in memory})


def _audits(config: SteeredRun) -> int:
    """Before RL, every few epochs and after the last; then at most three candidates, and two on other images."""
    epochs = config.rl.max_epochs
    return 1 + math.ceil(epochs / config.auditor.every) + 3 + 2
