"""The tiny editor: built, saved, loaded by the ordinary loader, and the command that trains it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from PIL import Image

from firm.config import PolicyConfig
from firm.policies.policy import Policy
from firm.records import Split
from firm.shapes import pretrain, pretrain_editor
from firm.shapes.editor_models import build_editor, load_editor
from firm.shapes.generation import compose, draw_prompt
from firm.shapes.scene import COLOURS, Thing, render


def recolours(split: Split, count: int, seed: int) -> Iterator[pretrain_editor.Edit]:
    """Perfect edits of one kind."""
    rng = np.random.default_rng([seed, split == "train"])
    for _ in range(count):
        scene = replace(compose(draw_prompt(split, rng), rng), noise=0)
        first = scene.drawn[0]
        colour = str(rng.choice([c for c in COLOURS if c != first.thing.colour]))
        after = replace(scene, drawn=(replace(first, thing=Thing(colour, first.thing.shape)), *scene.drawn[1:]))
        pictures = [Image.fromarray(render(s, rng)) for s in (scene, after)]
        yield f"make the {first.thing} {colour}", pictures[0], pictures[1]


def test_an_untrained_editor_survives_the_disk(tmp_path: Path) -> None:
    pipe = build_editor(seed=3)
    pretrain.save(pipe, tmp_path)
    again = load_editor(tmp_path)
    assert isinstance(again, QwenImageEditPlusPipeline)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*")) < 5e6
    assert again.vae_scale_factor == 4
    for name in ("vae", "transformer", "text_encoder"):
        for a, b in zip(getattr(pipe, name).parameters(), getattr(again, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    assert again.tokenizer.get_vocab() == build_editor(seed=0).tokenizer.get_vocab()  # ids are the same in every run


def test_the_system_prompt_has_the_length_that_the_pipeline_cuts_off_and_every_word_is_a_token() -> None:
    pipe = build_editor(seed=0)
    before, after = pipe.prompt_template_encode.split("{}")
    assert len(pipe.tokenizer.tokenize(before)) == pipe.prompt_template_encode_start_idx
    assert pipe.tokenizer.tokenize(after) == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    for instruction, *_ in recolours("train", 20, 0):
        assert pipe.tokenizer.tokenize(instruction) == instruction.replace(" ", " Ġ").split()
    [image] = pipe.processor(text=["<|image_pad|>"], images=[Image.new("RGB", (32, 32))]).input_ids
    assert len(image) == 4


def test_an_autoencoder_of_single_frames_is_the_same() -> None:
    vae = build_editor(seed=0).vae
    clip = torch.rand(2, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = vae.encode(clip).latent_dist.mode()
        decoded = vae.decode(encoded).sample
        pretrain_editor.treat_as_pictures(vae)
        torch.testing.assert_close(vae.encode(clip).latent_dist.mode(), encoded, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(vae.decode(encoded).sample, decoded, atol=1e-5, rtol=1e-5)


def test_the_command_trains_what_a_policy_loads(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    pretrain_editor.pretrain(tmp_path, recolours, vae_steps=5, steps=5, num_edits=40)
    policy = Policy(PolicyConfig(family="qwen_image_edit", model=str(tmp_path), resolution=32), torch.device("cpu"))
    found = pretrain_editor.encode(policy, list(recolours("train", 40, 0)))[1]
    torch.testing.assert_close(found.mean(), torch.tensor(0.0), atol=0.1, rtol=0)
    torch.testing.assert_close(found.std(), torch.tensor(1.0), atol=0.1, rtol=0)
    untrained = build_editor(seed=pretrain_editor.SEED).transformer
    assert not torch.allclose(policy.family.denoiser.img_in.weight, untrained.img_in.weight, atol=1e-4)
    assert "distance" in caplog.text and str(tmp_path) not in (tmp_path / "transformer" / "config.json").read_text()


@pytest.mark.slow
def test_the_command_leaves_a_share_untouched(tmp_path: Path) -> None:
    for share in (0.0, 1.0):
        pretrain_editor.pretrain(tmp_path / str(share), recolours, vae_steps=2, steps=2, num_edits=40, untouched=share)
    every, none = (load_editor(tmp_path / str(share)) for share in (0.0, 1.0))
    assert torch.equal(every.vae.encoder.conv_in.weight, none.vae.encoder.conv_in.weight)
    assert not torch.equal(every.transformer.proj_out.weight, none.transformer.proj_out.weight)


def test_a_share_of_the_edits_is_left_untouched() -> None:
    edits = list(recolours("train", 40, 0))
    learned = pretrain_editor.leave_some(edits, 0.25, seed=0)
    assert [(text, source) for text, source, _ in learned] == [(text, source) for text, source, _ in edits]
    untouched = [target is source for _, source, target in learned]
    assert 4 <= sum(untouched) <= 16
    kept = [i for i, left in enumerate(untouched) if not left]
    assert all(learned[i] == edits[i] for i in kept)
    assert pretrain_editor.leave_some(edits, 0.0, seed=0) == edits


def test_flow_matching_lowers_the_loss(tmp_path: Path) -> None:
    pretrain.save(build_editor(seed=0), tmp_path)
    policy = Policy(PolicyConfig(family="qwen_image_edit", model=str(tmp_path), resolution=32), torch.device("cpu"))
    sets = policy.train(None, (), seed=0)
    conditions, latents = pretrain_editor.encode(policy, list(recolours("train", 16, 0)))
    optimizer = torch.optim.AdamW(sets.trainable, lr=2e-3)

    def loss() -> torch.Tensor:
        fixed = torch.Generator().manual_seed(0)
        return pretrain.flow_matching_loss(lambda x, s: policy.velocity(x, s, conditions), latents, fixed)

    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    losses = [value for _, value, _ in pretrain.descend(loss, optimizer, schedule, 8)]
    assert losses[-1] < 0.9 * losses[0]
