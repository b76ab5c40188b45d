"""A trained policy in diffusers alone, by the code of docs/bring-your-own.md, draws the same pixels."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shared import CPU, TINY

from firm.config import LoraConfig
from firm.images import decode_image
from firm.policies.generate import encode, generate, to_images
from firm.policies.policy import Policy, load_policy, save_policy
from firm.policies.sampler import noise_for
from firm.records import Prompt

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "bring-your-own.md").read_text()
SNIPPETS = dict(
    zip(("lora", "full"), re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE), strict=True)
)
NO_T5 = {"from_pretrained(base,": "from_pretrained(base, text_encoder_3=None, tokenizer_3=None,"}
TEXTS = ["a red circle", "a blue square", "a green triangle left of a red square"]
PROMPTS = [Prompt(text=text) for text in TEXTS]


@pytest.fixture(params=["lora", "full"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    """A policy whose values are far from the base's."""
    policy = Policy(TINY, CPU)
    sets = policy.train(LoraConfig(rank=4, alpha=8) if kind == "lora" else None, ("best",), seed=0)
    random = torch.Generator().manual_seed(1)
    for tensor in sets.sets["best"]:
        tensor.add_(torch.randn(tensor.shape, generator=random) * (0.1 if kind == "lora" else 0.03))
    with policy.using("best"):
        save_policy(tmp_path, policy)
    return tmp_path


def pixels(policy: Policy, noise: torch.Tensor) -> list[np.ndarray[Any, Any]]:
    found = generate(policy, encode(policy, PROMPTS), noise, num_inference_steps=6, batch_size=3)
    return [np.asarray(decode_image(png, "")) for png in to_images(policy, found.latents, 3)]


def test_diffusers_alone_draws_the_same_pixels(folder: Path, kind: str) -> None:
    ours = load_policy(folder, CPU)
    noise = noise_for(ours.latent_shape, 0, "test", range(3))
    expected = pixels(ours, noise)
    names: dict[str, Any] = {"base": str(ROOT / "firm" / "shapes" / "weights" / "base"), "folder": str(folder)}
    (old, new), snippet = *NO_T5.items(), SNIPPETS[kind]
    *setup, last = snippet.strip().splitlines()
    assert last.startswith("image = pipe(prompt,")
    exec("\n".join(setup).replace(old, new), names)
    images = names["pipe"](
        TEXTS,
        num_inference_steps=6,
        guidance_scale=1,
        max_sequence_length=1,
        height=32,
        width=32,
        latents=noise,
    ).images
    assert all(np.array_equal(np.asarray(a), b) for a, b in zip(images, expected, strict=True))
    untrained = pixels(Policy(ours.config, CPU), noise)
    assert all(np.abs(a.astype(int) - b).mean() > 2 for a, b in zip(untrained, expected, strict=True))


def test_the_folder_holds_the_pipelines_files_and_the_card(folder: Path, kind: str) -> None:
    files = {"lora": ["pytorch_lora_weights.safetensors"], "full": ["transformer"]}[kind]
    assert sorted(p.name for p in folder.iterdir()) == ["policy.json", *files]


def test_equal_policies_are_equal_files_wherever_they_were_trained(folder: Path, kind: str, tmp_path: Path) -> None:
    policy = load_policy(folder, CPU)
    written = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    copies = [tmp_path / "copy one", tmp_path / "copy two"]
    for copy in copies:
        save_policy(copy, policy)
    for name in written:
        content = (folder / name).read_bytes()
        assert [(copy / name).read_bytes() == content for copy in copies] == [True, True], name
        assert str(ROOT).encode() not in content, f"{name} names a folder of this machine"
