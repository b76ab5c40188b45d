"""Ratios measured in one run on this machine, reference and ours side by side: `make bench` prints them."""

import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from shared import CPU, TINY
from torch import Tensor

from firm.config import CriticConfig, LoraConfig
from firm.config.loading import load_config
from firm.critics.judge import JudgeInput
from firm.critics.local import LocalCritic, load_processor
from firm.images import encode_image
from firm.policies.policy import Conditions, Policy
from firm.records import Prompt
from firm.rl.nft import branch_errors, kl_loss, policy_loss
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
    print(f"\n{name}: " + json.dumps({k: round(v, 4) for k, v in result.items()}))


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
    policy.train(LoraConfig(rank=32, alpha=64), ("old", "reference"), 0)
    return policy


@pytest.mark.parametrize(("kl_weight", "bound"), [(1e-4, 1.05), (0.0, 0.8)])
def test_update_against_the_reference_order(kl_weight: float, bound: float) -> None:
    """Forward passes of old, policy and reference by pointer swap, against peft adapters toggled as in NVlabs' loop.

    The reference is a re-statement of its order of calls: it always runs the reference forward, also without a KL.
    """
    policy = lora_policy()
    number = 8
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(number, *policy.latent_shape, generator=generator) for _ in range(2))
    sigma = torch.rand(number, generator=generator)
    x_t = (1 - sigma.view(-1, 1, 1, 1)) * x0 + sigma.view(-1, 1, 1, 1) * noise
    conditions = policy.encode([Prompt(text="a red circle")] * number)
    r = torch.rand(number, generator=generator)

    def loss_of(v: Tensor, v_old: Tensor, v_ref: Tensor | None) -> Tensor:
        loss = policy_loss(branch_errors(x0, x_t, sigma, v, v_old, 1.0), r, 1.0, 5.0).mean()
        return loss + kl_weight * kl_loss(v, v_ref).mean() if v_ref is not None else loss

    def ours() -> None:
        with policy.using("old"):
            v_old = policy.velocity(x_t, sigma, conditions)
        v = policy.velocity(x_t, sigma, conditions)
        v_ref = None
        if kl_weight:
            with policy.using("reference"):
                v_ref = policy.velocity(x_t, sigma, conditions)
        loss_of(v, v_old, v_ref).backward()

    twin = lora_policy()
    denoiser = twin.family.denoiser
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in denoiser.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:  # a second adapter in addition to "default", as the reference keeps the old policy
        for kind in (layer.lora_A, layer.lora_B):
            kind["old"] = deepcopy(kind["default"])
        layer.scaling["old"] = layer.scaling["default"]
        layer.r["old"] = 32
        layer.lora_alpha["old"] = 64
        layer.lora_dropout["old"] = torch.nn.Identity()
        layer.use_dora["old"] = False
    velocity = twin.velocity

    def adapter(name: str) -> None:
        for layer in layers:
            layer.set_adapter(name)

    def reference() -> None:
        adapter("old")
        with torch.no_grad():
            v_old = velocity(x_t, sigma, conditions)
        adapter("default")
        v = velocity(x_t, sigma, conditions)
        for layer in layers:
            layer.enable_adapters(False)
        with torch.no_grad():
            v_ref = velocity(x_t, sigma, Conditions(conditions.tensors))
        for layer in layers:
            layer.enable_adapters(True)
        adapter("default")
        loss_of(v, v_old, v_ref).backward()

    result = interleaved(ours, reference)
    show(f"update step, KL {kl_weight}", result)
    assert result["ratio"] < bound
