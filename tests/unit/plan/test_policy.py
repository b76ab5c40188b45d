"""Planned costs of a policy against what is measured when it really samples and is updated, on a CPU."""

import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from PIL import Image
from shared import ALONE, CPU, POLICIES
from torch import nn
from unit.plan.measured import flops_of, medium_policy, most_allocated, near, slowly

from firm.config import LoraConfig, PolicyConfig, RLConfig
from firm.images import encode_image
from firm.plan.policy import PolicyMeter
from firm.policies.encoders import tensors_of
from firm.policies.generate import to_images
from firm.policies.policy import Policy
from firm.policies.sampler import noise_for, sample
from firm.records import Prompt, UserError
from firm.rl.rollout import Rollout
from firm.rl.train import COPIES
from firm.rl.update import Updater
from firm.shapes.models import WEIGHTS
from firm.storage.checkpoint import optimizer_tensors, save_state

BATCH, STEPS = 4, 3
SIZES = ("tiny", "tiny editor", "medium", "medium in bfloat16")
TEXT = "make the red circle blue"


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PolicyConfig]:
    medium = medium_policy(tmp_path_factory.mktemp("models") / "policy")
    return {
        "tiny": PolicyConfig(**POLICIES["gen-shapes"]),
        "tiny editor": PolicyConfig(**POLICIES["edit-shapes"]),
        "medium": medium,
        "medium in bfloat16": medium.model_copy(update={"dtype": "bfloat16"}),
    }


def prompts_of(policy: Policy, tmp_path: Path) -> list[Prompt]:
    """A prompt for each sample; an editor's have a source."""
    source = tmp_path / "source.png"
    source.write_bytes(encode_image(Image.new("RGB", (32, 32), "gray")))
    image = str(source) if policy.family.edits else None
    return [Prompt(text=f"{TEXT}{'.' * i}"[: len(TEXT) + 1], image=image) for i in range(BATCH)]


def weights_of(policy: Policy) -> int:
    parts = [part for part in vars(policy.family)["_pipe"].components.values() if isinstance(part, nn.Module)]
    tables = (t for part in parts for m in part.modules() for t in vars(m).values() if isinstance(t, torch.Tensor))
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers())) + sum(
        t.nbytes for t in tables
    )


@pytest.mark.parametrize(
    ("size", "guidance"),
    [
        ("tiny editor", 3.0),
        *slowly(case for case in product(SIZES, [1.0, 3.0]) if case != ("tiny editor", 3.0)),
    ],
)
def test_sampling(policies: dict[str, PolicyConfig], size: str, guidance: float, tmp_path: Path) -> None:
    policy = Policy(policies[size], CPU)
    prompts = prompts_of(policy, tmp_path)
    conditions = policy.encode(prompts)
    meter = PolicyMeter(policies[size], _instruction(policy, conditions.tensors["prompt_embeds"].shape[1]))
    planned = meter.sampling(BATCH, STEPS, guidance)
    noise = noise_for(policy.latent_shape, 0, "test", range(BATCH))

    def draw() -> None:
        latents = sample(policy, conditions, noise, STEPS, guidance_scale=guidance, negative=conditions)
        to_images(policy, latents, BATCH)

    name = f"sampling, {size}, guidance {guidance:g}"
    near(f"{name}: bytes of weights", planned.memory["weights"], weights_of(policy))
    near(f"{name}: FLOPs", planned.item.flops * BATCH, flops_of(draw))
    near(f"{name}: bytes", planned.memory.total(), weights_of(policy) + most_allocated(draw))


def _instruction(policy: Policy, length: int) -> int:
    """Tokens of an instruction, of the whole length of its embeddings; only an editor's count."""
    return length - policy.family.blank(1, 0).tensors["prompt_embeds"].shape[1] if policy.family.edits else 1


UPDATES = {
    "LoRA": {"lora": LoraConfig(rank=8, alpha=16)},
    "LoRA, checkpointed": {"lora": LoraConfig(rank=8, alpha=16), "gradient_checkpointing": True},
    "whole": {},
    "whole without KL": {"kl_weight": 0},
}


QUICK = ("tiny", "LoRA, checkpointed")


@pytest.mark.parametrize(
    ("size", "settings"), [QUICK, *slowly(case for case in product(SIZES, UPDATES) if case != QUICK)]
)
def test_update(policies: dict[str, PolicyConfig], size: str, settings: str, tmp_path: Path) -> None:
    few = {"prompts_per_epoch": 1, "group_size": BATCH, "max_epochs": 1, "num_inference_steps": STEPS}
    rl = RLConfig(**{**few, "batch_size": BATCH, "timesteps": "uniform", "num_timesteps": 2, **UPDATES[settings]})
    policy = Policy(policies[size], CPU)
    prompts = prompts_of(policy, tmp_path)
    conditions = policy.encode(prompts)
    meter = PolicyMeter(policies[size], _instruction(policy, conditions.tensors["prompt_embeds"].shape[1]))
    meter.train(rl)
    planned = meter.update(BATCH)
    sets = policy.train(rl.lora, COPIES, 0)
    updater = Updater(policy, rl, 0, ALONE)
    if rl.gradient_checkpointing:
        policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    rows = torch.arange(BATCH)
    latents = noise_for(policy.latent_shape, 0, "x0", range(BATCH))
    rollout = Rollout(latents, conditions, rows, torch.linspace(-1, 1, BATCH), 0, rows >= 0, {})
    name = f"update, {size}, {settings}"
    near(f"{name}: FLOPs", planned.item.flops * BATCH * 2, flops_of(lambda: updater.epoch(rollout, 0)))
    copies = sum(t.nbytes for values in sets.sets.values() for t in values)
    states = sum(t.nbytes for state in updater.optimizer.state.values() for t in state.values())
    near(f"{name}: bytes of states", planned.memory["states"], copies + states)
    updater.optimizer.zero_grad(set_to_none=True)
    held = weights_of(policy) + copies + states
    near(f"{name}: bytes", planned.memory.total(), held + most_allocated(lambda: updater.epoch(rollout, 1)))
    save_state(tmp_path / "saved", {**sets.tensors(), **optimizer_tensors(updater.optimizer, sets.names)}, {})
    near(f"{name}: bytes of a checkpoint", meter.checkpoint, (tmp_path / "saved/tensors.safetensors").stat().st_size)


@pytest.mark.parametrize("size", ["tiny", "tiny editor"])
def test_encoders_that_wait_are_left_out_but_for_encoding(policies: dict[str, PolicyConfig], size: str) -> None:
    config = policies[size]
    plain, waiting = (PolicyMeter(config.model_copy(update={"offload_encoders": wait}), 8) for wait in (False, True))
    tensors = tensors_of(Policy(config, CPU).family.encoders)
    assert plain.encoders == {} and waiting.encoders == {"weights": sum(t.nbytes for t in tensors)}
    rl = RLConfig(prompts_per_epoch=1, group_size=2, max_epochs=1, lora=LoraConfig(rank=2, alpha=4))
    for meter in (plain, waiting):
        meter.train(rl)
    for before, after in (
        (plain.sampling(2, 2).memory, waiting.sampling(2, 2).memory),
        (plain.update(2).memory, waiting.update(2).memory),
        (plain.saving, waiting.saving),
    ):
        assert before == after + waiting.encoders


@pytest.mark.parametrize("size", ["tiny", "tiny editor"])
def test_a_rank_that_shares_the_base_holds_its_share_and_two_blocks(
    policies: dict[str, PolicyConfig], size: str
) -> None:
    meter = PolicyMeter(policies[size], 8)
    meter.train(RLConfig(prompts_per_epoch=1, group_size=2, max_epochs=1, lora=LoraConfig(rank=2, alpha=4)))
    denoiser = Policy(policies[size], CPU).family.denoiser
    blocks = [sum(p.nbytes for p in block.parameters()) for block in denoiser.transformer_blocks]
    whole = sum(p.nbytes for p in denoiser.parameters())
    shared = meter.shared(4)
    assert len(blocks) > 1 and shared["buckets"] == 2 * max(blocks)
    assert whole + shared["weights"] == pytest.approx(whole / 4 + (whole - sum(blocks)), abs=1)


def test_what_is_blank_has_the_shapes_of_what_is_encoded(policies: dict[str, PolicyConfig], tmp_path: Path) -> None:
    for name in ("tiny", "tiny editor"):
        policy = Policy(policies[name], CPU)
        real = policy.encode(prompts_of(policy, tmp_path)).tensors
        blank = policy.family.blank(BATCH, 5).tensors
        for key in blank.keys() | (real.keys() - {"prompt_embeds_mask"}):
            mine, theirs = blank[key].shape, real[key].shape
            assert (mine[0], mine[2:]) == (theirs[0], theirs[2:]) and blank[key].dtype == real[key].dtype
            assert abs(mine[1] - theirs[1]) <= 2, f"{name}, {key}: {mine} for {theirs}"


def test_no_weights_are_read(tmp_path: Path) -> None:
    """Planning needs configuration files alone."""
    meter = PolicyMeter(_without_weights(tmp_path), 8)
    assert meter.sampling(2, 2).item.flops > 0


def test_a_policy_that_cannot_be_gone_through_is_named(tmp_path: Path) -> None:
    config = _without_weights(tmp_path)
    shutil.rmtree(tmp_path / "base/transformer")
    with pytest.raises(UserError, match=r"cannot plan with .*/base: AttributeError: .* \(policy\.model\)"):
        PolicyMeter(config, 8)


def _without_weights(tmp_path: Path) -> PolicyConfig:
    folder = tmp_path / "base"
    shutil.copytree(WEIGHTS / "base", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return PolicyConfig(model=str(folder), resolution=32, max_sequence_length=1)
