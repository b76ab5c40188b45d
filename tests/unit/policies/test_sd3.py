"""The Stable Diffusion 3 family on a tiny pipeline of the real classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shared import CPU

from firm.config import LoraConfig, PolicyConfig
from firm.policies.policy import FAMILIES, Policy, load_policy, save_policy
from firm.policies.sampler import noise_for, sample
from firm.records import Prompt, UserError
from firm.shapes.models import build_generator, load_generator

LORA = LoraConfig(rank=2, alpha=4)
TEXTS = ["a red circle", "a blue square left of a red circle"]
PROMPTS = [Prompt(text=text) for text in TEXTS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generator")
    build_generator(seed=0).save_pretrained(path)
    return path


def config(folder: Path) -> PolicyConfig:
    return PolicyConfig(model=str(folder), resolution=32, max_sequence_length=1)


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy(config(folder), CPU)


def velocity(policy: Policy) -> torch.Tensor:
    noise = noise_for(policy.latent_shape, 0, "test", range(2))
    with torch.no_grad():
        return policy.velocity(noise, torch.tensor([1.0, 0.3]), policy.encode(PROMPTS))


def velocity_of(policy: Policy, name: str) -> torch.Tensor:
    with policy.using(name):
        return velocity(policy)


def test_shapes_and_types(policy: Policy) -> None:
    assert policy.latent_shape == (8, 8, 8)
    conditions = policy.encode(PROMPTS)
    assert {len(t) for t in conditions.tensors.values()} == {2}
    swapped = conditions.select(torch.tensor([1, 0, 1])).tensors
    assert all(torch.equal(swapped[k], torch.stack([t[1], t[0], t[1]])) for k, t in conditions.tensors.items())
    v = velocity(policy)
    assert v.shape == (2, 8, 8, 8) and v.dtype == torch.float32
    images = policy.decode(v)
    assert images.shape == (2, 32, 32, 3) and images.dtype == torch.uint8
    assert not any(p.requires_grad for p in policy.family.denoiser.parameters())


def test_conditions_do_not_depend_on_the_other_prompts(policy: Policy) -> None:
    together, alone = policy.encode(PROMPTS), policy.encode(PROMPTS[1:])
    for key, tensor in together.tensors.items():
        torch.testing.assert_close(tensor[1:], alone.tensors[key])
    assert not torch.allclose(together.tensors["prompt_embeds"][0], together.tensors["prompt_embeds"][1])


def test_sigmas_are_those_of_the_scheduler(policy: Policy, folder: Path) -> None:
    scheduler = load_generator(folder).scheduler
    scheduler.set_timesteps(7)
    assert torch.equal(policy.sigmas(7), scheduler.sigmas.float())
    assert policy.sigmas(7)[0] == 1 and policy.sigmas(7)[-1] == 0 and len(policy.sigmas(7)) == 8


def test_a_shifted_scheduler_is_respected(folder: Path, tmp_path: Path) -> None:
    pipe = load_generator(folder)
    pipe.register_modules(scheduler=type(pipe.scheduler)(shift=3.0))
    pipe.save_pretrained(tmp_path)
    pipe.scheduler.set_timesteps(4)
    shifted = Policy(config(tmp_path), CPU).sigmas(4)
    assert torch.equal(shifted, pipe.scheduler.sigmas) and shifted[2] > 0.55


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_euler_gives_the_pipelines_own_images(policy: Policy, folder: Path, guidance: float) -> None:
    noise = noise_for(policy.latent_shape, 3, "test", range(2))
    pipe = load_generator(folder)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(
        TEXTS, num_inference_steps=5, guidance_scale=guidance, height=32, width=32, max_sequence_length=1,
        latents=noise, output_type="np",
    ).images  # fmt: skip
    negative = policy.encode([Prompt(text="")] * 2)
    latents = sample(policy, policy.encode(PROMPTS), noise, 5, guidance_scale=guidance, negative=negative)
    ours = policy.decode(latents).numpy()
    assert np.abs(ours - theirs * 255).max() <= 4
    assert ours.std() > 0


def test_a_lora_changes_nothing_at_first_and_trains_alone(policy: Policy) -> None:
    base, names = velocity(policy), {n for n, _ in policy.family.denoiser.named_parameters()}
    sets = policy.train(LORA, ("old",), seed=0)
    assert torch.equal(velocity(policy), base)
    trainable = {n for n, p in policy.family.denoiser.named_parameters() if p.requires_grad}
    assert trainable == set(sets.names) and all("lora_" in n for n in trainable)
    assert len(names) + len(trainable) == len(list(policy.family.denoiser.parameters()))
    with torch.no_grad():
        for parameter in sets.trainable:
            parameter.add_(0.1)
    assert not torch.equal(velocity(policy), base)
    with policy.using("old"):
        assert torch.equal(velocity(policy), base)


def test_a_lora_depends_on_the_seed_and_leaves_global_randomness_alone(folder: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = [Policy(config(folder), CPU).train(LORA, (), seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.rand(1), expected)
    a, b, c = (torch.cat([p.detach().flatten() for p in sets.trainable]) for sets in made)
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_trained_policy_survives_the_disk(policy: Policy, tmp_path: Path, lora: LoraConfig | None) -> None:
    base = velocity(policy)
    sets = policy.train(lora, ("ema",), seed=4)
    with torch.no_grad():
        for tensor in sets.sets["ema"]:
            tensor.add_(torch.randn_like(tensor) * 0.05)
    live = [p.detach().clone() for p in sets.trainable]
    with policy.using("ema"):
        expected = velocity(policy)
        save_policy(tmp_path / "p", policy)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(live, sets.trainable, strict=True))
    again = load_policy(tmp_path / "p", CPU)
    assert not torch.allclose(expected, base, atol=1e-2)
    loaded = dict(again.family.denoiser.named_parameters())
    assert all(torch.equal(loaded[name], t) for name, t in zip(sets.names, sets.sets["ema"], strict=True))
    assert not any(p.requires_grad for p in again.family.denoiser.parameters())
    for name in sets.names:  # on some CPUs the order of a sum depends on it
        loaded[name].requires_grad_()
    assert torch.equal(velocity(again), expected)


def test_sets_are_not_mixed_within_a_callers_autocast(folder: Path) -> None:
    policy = Policy(config(folder).model_copy(update={"dtype": "bfloat16"}), CPU)
    sets = policy.train(None, ("old",), seed=4)
    with torch.no_grad():
        for tensor in sets.sets["old"]:
            tensor.mul_(0.5)
    apart = [velocity_of(policy, name) for name in ("old", "policy")]
    with torch.autocast("cpu", torch.bfloat16):
        together = [velocity_of(policy, name) for name in ("old", "policy")]
    assert not torch.allclose(apart[0], apart[1], atol=0.1)
    torch.testing.assert_close(together, apart)


def test_a_wrong_model_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    for model, word in ((tmp_path, "cannot load"), (tmp_path / "absent", "no model folder")):
        with pytest.raises(UserError, match=word) as caught:
            Policy(config(model), CPU)
        assert caught.value.exit_code == 2 and str(model) in str(caught.value)


@pytest.mark.parametrize("broken", ["empty", "garbage"])
def test_damaged_weights_are_named(folder: Path, tmp_path: Path, broken: str) -> None:
    pipe = load_generator(folder)
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"" if broken == "empty" else weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load") as caught:
        Policy(config(tmp_path), CPU)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no trained policy"):
        load_policy(tmp_path, CPU)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_training_goes_on_from_a_trained_policy(
    policy: Policy, folder: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    sets = policy.train(lora, (), seed=4)
    with torch.no_grad():
        for tensor in sets.trainable:
            tensor.add_(torch.randn_like(tensor) * 0.05)
    save_policy(tmp_path / "first", policy)
    second = Policy(config(folder), CPU)
    again = second.train(lora, ("old", "reference"), seed=5, start=tmp_path / "first")
    assert torch.equal(velocity(second), velocity(policy))
    for values in (again.trainable, *again.sets.values()):
        assert all(torch.equal(a, b) for a, b in zip(values, sets.trainable, strict=True))
    other = LoraConfig(rank=2, alpha=3) if lora else LORA
    with pytest.raises(UserError, match="another base or LoRA") as caught:
        Policy(config(folder), CPU).train(other, (), seed=5, start=tmp_path / "first")
    assert str(tmp_path / "first") in str(caught.value)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_policy_of_another_base_is_named(
    policy: Policy, folder: Path, tmp_path: Path, lora: LoraConfig | None
) -> None:
    policy.train(lora, (), seed=0)
    save_policy(tmp_path / "p", policy)
    pipe = load_generator(folder)
    changed = {**pipe.transformer.config, "num_layers": pipe.transformer.config.num_layers + 1}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(changed))
    pipe.save_pretrained(tmp_path / "other")
    card = tmp_path / "p" / "policy.json"
    card.write_text(card.read_text().replace(str(folder), str(tmp_path / "other")))
    with pytest.raises(UserError, match="parameter transformer_blocks.* does not fit") as caught:
        load_policy(tmp_path / "p", CPU)
    assert str(tmp_path / "p") in str(caught.value)


@pytest.mark.parametrize("damage", ["parameter gone", "another shape", "cut short", "no file"])
def test_a_damaged_lora_is_named(policy: Policy, tmp_path: Path, damage: str) -> None:
    policy.train(LORA, (), seed=0)
    save_policy(tmp_path, policy)
    [file] = tmp_path.glob("*.safetensors")
    weights = load_file(file)
    name = sorted(weights)[3]
    if damage == "parameter gone":
        save_file({k: t for k, t in weights.items() if k != name}, file)
    elif damage == "another shape":
        save_file({**weights, name: torch.zeros(3, 3)}, file)
    elif damage == "cut short":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    with pytest.raises(UserError, match="cannot load") as caught:
        load_policy(tmp_path, CPU)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_family_is_named_with_the_known_ones(folder: Path) -> None:
    with pytest.raises(UserError, match="unheard-of") as caught:
        Policy(config(folder).model_copy(update={"family": "unheard-of"}), CPU)
    assert caught.value.exit_code == 2 and caught.value.where == "policy.family"
    assert all(family in str(caught.value) for family in FAMILIES)


def test_a_check_reads_no_weights_and_imports_no_diffusers() -> None:
    code = (
        "import sys; from firm.policies.policy import FAMILIES, find_family\n"
        "assert all(find_family(name, '') for name in FAMILIES)\n"
        "find_family('sd3', '').check('pkg://firm.shapes/weights/base', '')\n"
        "assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_prompt_with_a_source_image_is_refused(policy: Policy) -> None:
    with pytest.raises(UserError, match="generates and does not edit") as caught:
        policy.encode([*PROMPTS, Prompt(text="make it red", image="cat.png")])
    assert caught.value.exit_code == 2 and "'make it red'" in str(caught.value)
