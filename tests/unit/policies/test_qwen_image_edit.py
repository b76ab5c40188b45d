"""The Qwen-Image-Edit family on a tiny pipeline of the real classes: it makes what the pipeline makes."""

import base64
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from shared import ALONE, BASE, CPU

from firm.config import LoraConfig, PolicyConfig, PromptsConfig, RLConfig
from firm.policies.generate import encode, generate
from firm.policies.policy import Policy, find_family, load_policy, save_policy
from firm.policies.sampler import noise_for
from firm.prompts import load_prompts
from firm.records import Prompt, UserError
from firm.rl.rollout import sample_groups, with_advantages
from firm.rl.update import Updater
from firm.shapes.editor_models import build_editor, load_editor

LORA = LoraConfig(rank=2, alpha=4)
# The scheduler of Qwen-Image-Edit-2509.
DYNAMIC = {
    "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("editor")
    pipe = build_editor(seed=0)
    pipe.vae.register_to_config(latents_mean=[0.1 * i for i in range(8)], latents_std=[0.5 + 0.1 * i for i in range(8)])
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    """Instructions of different lengths, the first twice with different sources; the last source is larger."""
    path = tmp_path_factory.mktemp("sources")
    texts = ["make the circle blue"] * 2 + ["remove everything but the red square, then turn it green"]
    random = np.random.default_rng(0)
    for i, side in enumerate((32, 32, 50)):
        Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return [Prompt(text=text, image=str(path / f"{i}.png")) for i, text in enumerate(texts)]


def config(folder: Path | str, **changes: Any) -> PolicyConfig:
    return PolicyConfig(**{"family": "qwen_image_edit", "model": str(folder), "resolution": 32, **changes})


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy(config(folder), CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline's sizes of sources, which are constants, are those of the tiny model."""
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, 32 * 32)


def noise(policy: Policy, number: int = 3) -> torch.Tensor:
    return noise_for(policy.latent_shape, 0, "test", range(number))


def velocity(policy: Policy, prompts: list[Prompt]) -> torch.Tensor:
    with torch.no_grad():
        return policy.velocity(noise(policy, len(prompts)), torch.full([len(prompts)], 0.7), policy.encode(prompts))


def edits(policy: Policy, prompts: list[Prompt], guidance: float = 1.0) -> torch.Tensor:
    """Clean latents."""
    steps: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": guidance, "batch_size": 3}
    encoded = encode(policy, prompts, guided=guidance != 1)
    return generate(policy, encoded, noise(policy), **steps).latents


def pipelines_edits(pipe: Any, prompts: list[Prompt], noise: torch.Tensor, output: str, guidance: float = 1.0) -> Any:
    """By the pipeline's own code, which takes one instruction at a time; output is "latent" or "np"."""
    pipe.set_progress_bar_config(disable=True)
    negative = None if guidance == 1 else " "
    options = {"height": 32, "width": 32, "num_inference_steps": 5, "true_cfg_scale": guidance, "output_type": output}
    asked = zip(prompts, noise, strict=True)
    images = [pipe(Image.open(p.image), p.text, negative, latents=x[None], **options).images for p, x in asked]
    return np.concatenate(images)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("dynamic", [False, True], ids=["plain", "dynamic"])
@pytest.mark.usefixtures("small")
def test_it_makes_the_pipelines_own_edits(
    folder: Path, prompts: list[Prompt], tmp_path: Path, guidance: float, dynamic: bool
) -> None:
    pipe = load_editor(folder)
    if dynamic:
        pipe.register_modules(scheduler=type(pipe.scheduler)(**DYNAMIC))
    pipe.save_pretrained(tmp_path)
    policy = Policy(config(tmp_path), CPU)
    theirs = torch.from_numpy(pipelines_edits(pipe, prompts, noise(policy), "latent", guidance))
    torch.testing.assert_close(edits(policy, prompts, guidance), theirs, atol=1e-4, rtol=0)
    assert torch.equal(policy.sigmas(5), pipe.scheduler.sigmas)
    assert policy.sigmas(5)[-2].item() == pytest.approx(0.02 if dynamic else 0.2)


@pytest.mark.usefixtures("small")
def test_conditions_and_velocities_are_the_pipelines(policy: Policy, folder: Path, prompts: list[Prompt]) -> None:
    pipe = load_editor(folder)
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []
    pipe.transformer.register_forward_hook(lambda _, a, kw, out: seen.append((kw, out[0])), with_kwargs=True)
    pipelines_edits(pipe, prompts, noise(policy), "latent")
    conditions = policy.encode(prompts)
    assert len(seen) == 3 * 5
    for i, (kw, output) in enumerate(seen):
        row = conditions.select(torch.tensor([i // 5]))
        embeds = kw["encoder_hidden_states"]
        torch.testing.assert_close(row.tensors["prompt_embeds"][:, : embeds.shape[1]], embeds, atol=1e-5, rtol=0)
        assert row.tensors["prompt_embeds_mask"].sum() == embeds.shape[1]
        tokens = kw["hidden_states"]
        torch.testing.assert_close(row.tensors["source_latents"], tokens[:, 16:], atol=1e-5, rtol=0)
        with torch.no_grad():
            found = policy.velocity(tokens[:, :16], kw["timestep"], row)
        torch.testing.assert_close(found, output[:, :16], atol=1e-5, rtol=0)


def test_shapes_and_types(policy: Policy, prompts: list[Prompt]) -> None:
    assert policy.latent_shape == (16, 32)
    found = velocity(policy, prompts)
    assert found.shape == (3, 16, 32) and found.dtype == torch.float32
    images = policy.decode(found)
    assert images.shape == (3, 32, 32, 3) and images.dtype == torch.uint8


def test_padding_changes_nothing(policy: Policy, prompts: list[Prompt]) -> None:
    together, alone = policy.encode(prompts), policy.encode(prompts[:1])
    assert "prompt_embeds_mask" in together.tensors and "prompt_embeds_mask" not in alone.tensors
    assert together.tensors["prompt_embeds"].shape[1] > alone.tensors["prompt_embeds"].shape[1]
    x, sigma = noise(policy, 1), torch.tensor([0.4])
    with torch.no_grad():
        padded = policy.velocity(x, sigma, together.select(torch.tensor([0])))
        torch.testing.assert_close(padded, policy.velocity(x, sigma, alone), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(velocity(policy, prompts)[:2], velocity(policy, prompts[:2]), atol=1e-5, rtol=1e-5)


def test_two_sources_of_one_instruction_stay_apart(policy: Policy, prompts: list[Prompt], tmp_path: Path) -> None:
    """The released trainers pooled them: their groups are keyed by the decoded instruction."""
    rows = [f'{{"prompt": "{p.text}", "source_image": "{p.image}"}}\n' for p in prompts[:2]]
    (tmp_path / "prompts.jsonl").write_text("".join(rows * 2))
    asked = load_prompts(PromptsConfig(path=str(tmp_path / "prompts.jsonl"), test_share=1e-9), "train")
    assert asked == prompts[:2]
    policy.train(None, ("old",), seed=0)
    rl = RLConfig(prompts_per_epoch=2, group_size=3, max_epochs=1, num_inference_steps=2, batch_size=6)
    groups = sample_groups(policy, asked, rl, 0, 0, ALONE)
    assert groups.generated.encoded.rows.tolist() == [0, 0, 0, 1, 1, 1]
    first, second = groups.generated.encoded.conditions.tensors["source_latents"]
    assert not torch.allclose(first, second)
    rewards = torch.tensor([0.5, 0.75, 1.0, 0.0, 0.25, 0.5])  # pooled, those of the first source would be good
    advantage = with_advantages(groups, rewards, torch.ones(6, dtype=torch.bool), [{}] * 6, rl, ALONE).advantage
    assert advantage.view(2, 3).sign().tolist() == [[-1, 0, 1]] * 2


def test_the_picture_reaches_instruction_and_velocity(policy: Policy, prompts: list[Prompt]) -> None:
    conditions = policy.encode(prompts[:2]).tensors
    assert not torch.allclose(*conditions["prompt_embeds"], atol=1e-3)
    same = noise(policy, 1).expand(2, -1, -1)
    with torch.no_grad():
        moved = policy.velocity(same, torch.full([2], 0.5), policy.encode(prompts[:2]))
    assert not torch.allclose(*moved, atol=1e-3)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_velocity_is_differentiable(policy: Policy, prompts: list[Prompt], lora: LoraConfig | None) -> None:
    sets = policy.train(lora, (), seed=0)
    assert policy.encode(prompts).tensors["prompt_embeds"].requires_grad is False
    x = noise(policy).requires_grad_()
    policy.velocity(x, torch.rand(3), policy.encode(prompts)).square().mean().backward()
    assert x.grad is not None and x.grad.abs().amax((1, 2)).min() > 0
    gradients = {name: p.grad for name, p in zip(sets.names, sets.trainable, strict=True) if p.grad is not None}
    assert all(g.isfinite().all() for g in gradients.values()) and any(g.any() for g in gradients.values())
    if lora:
        assert len(sets.names) == 2 * 8 * 4  # two matrices for each target of each layer


def test_an_update_trains_it(policy: Policy, prompts: list[Prompt]) -> None:
    sets = policy.train(LORA, ("old", "ema", "reference"), seed=0)
    policy.family.denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    before = [p.detach().clone() for p in sets.trainable]
    rl = RLConfig(
        prompts_per_epoch=3, group_size=4, max_epochs=1, num_inference_steps=2, batch_size=4, num_timesteps=1,
    )  # fmt: skip
    groups = sample_groups(policy, prompts, rl, 0, 0, ALONE)
    rollout = with_advantages(groups, torch.rand(12), torch.ones(12, dtype=torch.bool), [{}] * 12, rl, ALONE)
    values = Updater(policy, rl, 0, ALONE).epoch(rollout, 0)
    assert all(value is not None and np.isfinite(value) for value in values.values()) and values["grad_norm"]
    assert any(not torch.equal(a, b) for a, b in zip(before, sets.trainable, strict=True))


def test_it_computes_in_half_precision(folder: Path, prompts: list[Prompt]) -> None:
    whole, half = (velocity(Policy(config(folder, dtype=dtype), CPU), prompts) for dtype in ("float32", "bfloat16"))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, whole, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
@pytest.mark.usefixtures("small")
def test_a_trained_policy_survives_the_disk_and_is_the_pipelines(
    policy: Policy, folder: Path, prompts: list[Prompt], tmp_path: Path, lora: LoraConfig | None
) -> None:
    base = velocity(policy, prompts)
    sets = policy.train(lora, (), seed=4)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in sets.trainable:
            tensor.add_(torch.randn(tensor.shape, generator=random) * (0.1 if lora else 0.03))
    save_policy(tmp_path, policy)
    again = load_policy(tmp_path, CPU)
    trained = dict(again.family.denoiser.named_parameters())
    assert all(torch.equal(trained[name], t) for name, t in zip(sets.names, sets.trainable, strict=True))
    for name in sets.names:  # on some CPUs the order of a sum depends on it
        trained[name].requires_grad_()
    assert torch.equal(velocity(again, prompts), velocity(policy, prompts))
    again.family.denoiser.requires_grad_(False)
    assert not torch.allclose(velocity(again, prompts), base, atol=1e-2)
    pipe = load_editor(folder)
    if lora:
        pipe.load_lora_weights(tmp_path)
    else:
        pipe.register_modules(transformer=QwenImageTransformer2DModel.from_pretrained(tmp_path / "transformer"))
    theirs = pipelines_edits(pipe, prompts, noise(policy), "np") * 255
    assert np.abs(again.decode(edits(again, prompts)).numpy() - theirs).max() <= 1
    assert theirs.std() > 10


def test_what_cannot_be_edited_is_named(policy: Policy, prompts: list[Prompt], tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (32, 40)).save(tmp_path / "tall.png")
    wrong = {None: "needs a source", "absent.png": "No such file", "text.png": "cannot decode", "tall.png": "32 x 40"}
    for name, words in wrong.items():
        prompt = Prompt(text="make it red", image=None if name is None else str(tmp_path / name))
        with pytest.raises(UserError, match=words) as caught:
            policy.encode([*prompts, prompt])
        assert caught.value.exit_code == 2
        assert "'make it red'" in str(caught.value) and (name or "") in str(caught.value)
    with pytest.raises(UserError, match="cannot decode a data URL") as caught:
        policy.encode([Prompt(text="make it red", image="data:image/png;base64,A" + "AAAA" * 500)])
    assert caught.value.exit_code == 2 and len(str(caught.value)) < 400


def test_a_source_may_be_a_data_url(policy: Policy, prompts: list[Prompt]) -> None:
    written = base64.b64encode(Path(str(prompts[0].image)).read_bytes()).decode()
    found = policy.encode([Prompt(text=prompts[0].text, image=f"data:image/png;base64,{written}")])
    expected = policy.encode(prompts[:1])
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in found.tensors.items())


def test_a_folder_of_another_model_is_named(folder: Path, tmp_path: Path) -> None:
    family = find_family("qwen_image_edit", "")
    family.check(str(folder), "policy.model")
    with pytest.raises(UserError, match="is a StableDiffusion3Pipeline, not a QwenImageEditPlusPipeline") as caught:
        family.check(BASE, "policy.model")
    assert caught.value.exit_code == 2 and caught.value.where == "policy.model"
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    for model in (BASE, tmp_path / "copy"):
        with pytest.raises(UserError, match="cannot load") as caught:
            Policy(config(model), CPU)
        assert str(model) in str(caught.value)


def test_a_resolution_that_the_pipeline_would_round_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="48 pixels") as caught:
        Policy(config(folder, resolution=48), CPU)
    assert caught.value.exit_code == 2 and caught.value.where == "policy.resolution"
    assert Policy(config(folder, resolution=64), CPU).latent_shape == (64, 32)
