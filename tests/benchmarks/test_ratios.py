"""Ratios measured in one run on this machine, reference and ours side by side: `make bench` prints them."""

import json
import statistics
import time
from collections.abc import Callable
from itertools import accumulate, count
from pathlib import Path

import pytest
import torch
from benchmarks.reference import Reference
from shared import ALONE, CPU, TINY

from firm.config import CriticConfig, LoraConfig, RLConfig
from firm.config.loading import load_config
from firm.critics.judge import JudgeInput
from firm.critics.local import LocalCritic, load_processor
from firm.images import encode_image
from firm.policies.policy import Policy
from firm.policies.sampler import noise_for
from firm.records import Prompt
from firm.rl.rollout import Rollout
from firm.rl.update import Updater
from firm.sft.train import prepare
from firm.shapes.editing import candidates
from firm.shapes.generation import candidate
from firm.shapes.models import WEIGHTS

pytestmark = pytest.mark.bench


def interleaved(ours: Callable[[], object], reference: Callable[[], object], rounds: int = 7) -> dict[str, float]:
    """Median seconds of both, measured in turns, and their ratio."""
    times: dict[str, list[float]] = {"ours": [], "reference": []}
    for warm in (ours, reference):
        warm()
    for _ in range(rounds):
        for name, work in (("ours", ours), ("reference", reference)):
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["ours"] / medians["reference"]}


def show(name: str, result: dict[str, float]) -> None:
    print(f"\n{name}: " + json.dumps({k: float(f"{v:.4g}") for k, v in result.items()}))


def test_score_first_judges_faster_than_generating(tmp_path: Path) -> None:
    """One forward pass for the score distribution, against generating the rationale before the score."""
    config = load_config("gen-shapes", ["critic.batch_size=64"])
    model = prepare(config.critic, config.sft, 0)
    model.save_pretrained(tmp_path)
    load_processor(config.critic.model).save_pretrained(tmp_path)
    first = LocalCritic(tmp_path, config.critic, CPU)
    reason = config.critic.model_copy(update={"answer_style": "reason_first", "max_new_tokens": 24})
    second = LocalCritic(tmp_path, reason, CPU)
    items = [JudgeInput(Prompt(text=p), [encode_image(i)]) for p, i in (candidate(n, 0, "train") for n in range(64))]
    result = interleaved(lambda: first.judge(items), lambda: second.judge(items), rounds=3)
    show("score-first / reason-first judgement", result)
    assert result["ratio"] < 0.5


@pytest.mark.parametrize("style", ["score_first", "reason_first"])
def test_two_dimensions_of_a_pair_cost_less_than_twice_one(style: str) -> None:
    """One pass over the pair's images for both dimensions, against a critic for each dimension."""
    folder = WEIGHTS / "critic"
    dimensions = {d: f"short_{d}" for d in ("execution", "consistency")}
    plain = {"model": str(folder), "answer_style": style, "dtype": "float32", "batch_size": 64, "max_new_tokens": 24}

    def critic(**rubrics: str) -> LocalCritic:
        return LocalCritic(folder, CriticConfig.model_validate({**plain, "rubrics": rubrics}), CPU)

    both = critic(**dimensions)
    single = [critic(**{d: rubric}) for d, rubric in dimensions.items()]
    items = [JudgeInput(Prompt(text=p), [*map(encode_image, pair)]) for p, *pair in candidates(64, 0, "train")]
    result = interleaved(lambda: both.judge(items), lambda: [one.judge(items) for one in single])
    show(f"two dimensions of a pair / twice one, {style}", result)
    assert result["ratio"] < (0.75 if style == "score_first" else 0.85)


def lora_policy() -> Policy:
    policy = Policy(TINY, CPU)
    policy.train(LoraConfig(rank=32, alpha=64), ("old", "ema", "reference"), 0)
    return policy


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that tensors made by ``work`` take at once."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(
    ("kl_weight", "on_policy", "bound"), [(1e-4, False, 1.03), (0.0, False, 0.76), (0.0, True, 0.51)]
)
def test_update_against_the_reference_order(kl_weight: float, on_policy: bool, bound: float) -> None:
    """Steps of the updater against a re-statement of NVlabs' loop, which always makes three forward passes and a
    backward; after ten steps the weights are the same. On policy the old policy is refreshed before every step.
    """
    rl = RLConfig(
        prompts_per_epoch=2, group_size=8, max_epochs=10, num_inference_steps=4, batch_size=16, kl_weight=kl_weight
    )
    updater, twin = Updater(lora_policy(), rl, 0, ALONE), lora_policy()
    rollout = Rollout(
        latents=noise_for(twin.latent_shape, 0, "x0", range(16)),
        conditions=twin.encode([Prompt(text="a red circle"), Prompt(text="a blue square")]),
        rows=torch.arange(2).repeat_interleave(8),
        advantage=torch.linspace(-2, 2, 16),
        first=0,
        trained=torch.ones(16, dtype=torch.bool),
        stats={},
    )
    loop = Reference(twin, rl)
    everything = torch.arange(16)

    def ours(step: int) -> None:
        if on_policy:
            updater.sets.update_average("old", 0)
        updater._step(rollout, everything, 16, step, 0, on_policy)

    def reference(step: int) -> None:
        if on_policy:
            loop.refresh()
        batch = updater._batch(rollout, everything, step, 0)
        loop.step(batch.x0, batch.sigmas, batch.noise, batch.conditions, batch.r)

    steps = {"ours": count(), "reference": count()}
    result = interleaved(lambda: ours(next(steps["ours"])), lambda: reference(next(steps["reference"])), rounds=9)
    assert all(bool(p.any()) for p in loop.trainable), "a LoRA's B starts at 0"
    apart = max((a - b).abs().max().item() for a, b in zip(updater.sets.trainable, loop.trainable, strict=True))
    memory = peak_bytes(lambda: ours(10)) / peak_bytes(lambda: reference(10))
    name = f"update step, KL {kl_weight}{', on policy' if on_policy else ''}"
    show(name, {**result, "apart": apart, "memory": memory})
    assert apart < 1e-5
    assert result["ratio"] < bound
