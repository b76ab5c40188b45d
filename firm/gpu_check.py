"""What a GPU makes of models of the real sizes, with random weights: `make gpu-check`.

One rollout and one update of each policy, one step of a critic's training, each once before it is measured. The result,
docs/gpu/DATE-DEVICE.json, is compared with what `firm plan` says of the same work.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from firm import __version__
from firm.config import RunConfig, SteeredRun
from firm.config.loading import load_config
from firm.dist import Ranks
from firm.gpus import check_gpus
from firm.model_folder import without_weights
from firm.pace import GB, memory
from firm.plan.assumptions import SIDE, Assumptions
from firm.plan.critic import Questions, example, training
from firm.plan.origins import configured
from firm.plan.policy import PolicyMeter
from firm.policies.policy import Conditions, Policy
from firm.policies.sampler import sample
from firm.progress import log_line
from firm.records import UserError
from firm.rl.rollout import Rollout
from firm.rl.train import COPIES
from firm.rl.update import Updater
from firm.sft.loss import only_answers
from firm.sft.train import prepare

POLICIES = {
    "SD3.5-Medium, 512 px, LoRA of rank 32": ("gen-sd35", ()),
    # Published for Qwen-Image on four H200, reward model included: 0.175 images a GPU and second (verl-omni's docs).
    "Qwen-Image-Edit-2509, 512 px, LoRA of rank 64": (
        "edit-qwen-image-edit-2509",
        ("policy.resolution=512", "rl.lora={rank: 64, alpha: 128}"),
    ),
}
CRITICS = {"Qwen3-VL-8B, LoRA of rank 64": ("critic-gen-8b-lora", ())}
VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate")
Numbers = dict[str, float]


def check_policy(config: SteeredRun, device: torch.device, given: Assumptions) -> dict[str, Numbers]:
    """A rollout of one batch, and an update with it, of a policy with random weights."""
    rl = config.rl.model_copy(update={"group_size": config.rl.batch_size})  # a batch is one group
    folder = configured(config.policy.model, "policy.model")
    settings = config.policy.model_copy(update={"model": str(folder)})
    planned = PolicyMeter(settings, given.prompt_tokens)
    with torch.device(device), without_weights():
        policy = Policy(settings, device)
    policy.train(rl.lora, COPIES, config.seed)
    if rl.gradient_checkpointing:
        policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    updater = Updater(policy, rl, config.seed, Ranks(0, 1, device))
    size = rl.batch_size
    with torch.device(device):
        blank = policy.family.blank(size, given.prompt_tokens).tensors
        conditions = Conditions({name: _filled(tensor) for name, tensor in blank.items()})
        noise = torch.randn(size, *policy.latent_shape)
        rows, advantage = torch.arange(size), torch.randn(size)

    def rolled() -> torch.Tensor:
        with policy.using("old"):
            latents = sample(policy, conditions, noise, rl.num_inference_steps, rl.solver)
        policy.decode(latents)
        return latents

    rollout = Rollout(rolled(), conditions, rows, advantage, 0, torch.ones(size, dtype=torch.bool), {})
    planned.train(rl)
    sampling, updating = planned.sampling(size, rl.num_inference_steps), planned.update(size)
    passes = max(int(rl.num_inference_steps * rl.timestep_fraction), 1)
    passes = (passes if rl.timesteps == "scheduler" else rl.num_timesteps) * rl.inner_epochs
    found = {
        "rollout": _measured(rolled, size, sampling.item.flops * size, sampling.memory, given),
        "update": _measured(
            lambda: updater.epoch(rollout, 0), size, updating.item.flops * size * passes, updating.memory, given
        ),
    }
    both = sum(part["seconds"] for part in found.values())
    return found | {"both": {"images_a_gpu_second": size / both}}


def check_critic(config: RunConfig, device: torch.device, given: Assumptions) -> dict[str, Numbers]:
    """A step of training on one batch of a critic with random weights."""
    sft = config.sft
    folder = configured(config.critic.model, "critic.model")
    critic = config.critic.model_copy(update={"model": str(folder)})
    questions = Questions.of(critic, folder, given.image_side or SIDE, given)
    planned = training(critic, sft, questions, given.answer_tokens, workers=1)
    with torch.device(device), without_weights():
        model = prepare(critic, sft, config.seed).train()
    only_answers(model)
    if sft.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=sft.learning_rate)
    batch = example(questions, model.config, sft.batch_size, given.answer_tokens)
    batch = {name: _filled(tensor).to(device) for name, tensor in batch.items()}

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=critic.dtype == "bfloat16"):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    flops = (planned.batch + planned.step).flops
    return {"sft step": _measured(step, sft.batch_size, flops, planned.memory, given)}


def _filled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.normal_() if tensor.is_floating_point() else tensor


def _measured(
    work: Callable[[], object], items: int, flops: float, planned: Mapping[str, int], given: Assumptions
) -> Numbers:
    """Seconds, speed, utilisation and peak memory of some work on ``items``, which is done once before."""
    work()
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    memory()
    start = time.monotonic()
    work()
    wait()
    seconds = time.monotonic() - start
    return {
        "items": items,
        "seconds": seconds,
        "items_a_gpu_second": items / seconds,
        "tflop": flops / 1e12,
        "mfu": flops / seconds / (given.tflops * 1e12),
        "planned_memory_gb": Counter(planned).total() / GB,
        **memory(),
    }


def main(folder: str, tflops: str = "") -> None:
    """Measure all cases, and write the result into a folder.

    Raises:
        UserError: There is no GPU that can be used.
    """
    check_gpus(1)
    given = Assumptions(tflops=float(tflops)) if tflops else Assumptions()
    device = torch.device("cuda", 0)
    name = torch.cuda.get_device_name(device)
    cases: dict[str, dict[str, Numbers]] = {}
    for case, (preset, changes) in POLICIES.items():
        config = load_config(preset, changes).having(SteeredRun, "the check")
        cases[case] = check_policy(config, device, given)
        torch.cuda.empty_cache()
    for case, (preset, changes) in CRITICS.items():
        cases[case] = check_critic(load_config(preset, changes), device, given)
    versions = {"firm": __version__, "cuda": torch.version.cuda} | {package: version(package) for package in VERSIONS}
    found = {"device": name, "tflops_assumed": given.tflops, "versions": versions, "cases": cases}
    path = Path(folder) / f"{datetime.now(UTC):%Y-%m-%d}-{name.replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + os.linesep)
    log_line(str(path))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
