"""From prompts to images: distinct prompts are encoded once, and neither that nor the batching changes an image."""

import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from shared import CPU, TINY

from firm.policies.generate import encode, generate, to_images
from firm.policies.policy import Conditions, Policy
from firm.policies.sampler import noise_for, sample
from firm.records import Prompt

PROMPTS = [
    Prompt(text=text) for text in ("a red circle", "a blue square", "a red circle", "a green triangle", "a blue square")
]


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(TINY, CPU)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_images_are_those_of_encoding_every_row(policy: Policy, guidance: float) -> None:
    noise = noise_for(policy.latent_shape, 3, "test", range(5))
    negative = policy.encode([Prompt(text="")] * 5)
    one_by_one = sample(policy, policy.encode(PROMPTS), noise, 4, guidance_scale=guidance, negative=negative)
    found = generate(
        policy,
        encode(policy, PROMPTS, guided=guidance != 1),
        noise,
        num_inference_steps=4,
        guidance_scale=guidance,
        batch_size=5,
    )
    assert to_images(policy, found.latents, 5) == to_images(policy, one_by_one, 5)


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_change_nothing(policy: Policy, batch_size: int) -> None:
    noise = noise_for(policy.latent_shape, 3, "test", range(5))
    whole = generate(policy, encode(policy, PROMPTS), noise, num_inference_steps=3, solver="dpm2", batch_size=5)
    parts = generate(
        policy, encode(policy, PROMPTS), noise, num_inference_steps=3, solver="dpm2", batch_size=batch_size
    )
    torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-4, atol=1e-4)


def test_distinct_prompts_are_encoded_once_and_rows_say_which(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def asking(prompts: Sequence[Prompt]) -> Conditions:
        asked.append([prompt.text for prompt in prompts])
        return type(policy).encode(policy, prompts)

    monkeypatch.setattr(policy, "encode", asking)
    found = encode(policy, PROMPTS)
    assert asked == [["a red circle", "a blue square", "a green triangle"]]
    assert found.rows.tolist() == [0, 1, 0, 2, 1] and found.negative is None
    assert encode(policy, PROMPTS, guided=True).negative is not None
    assert asked[1:] == [asked[0], [""]]


def test_images_are_png_of_what_is_decoded(policy: Policy) -> None:
    latents = noise_for(policy.latent_shape, 0, "test", range(3))
    pngs = to_images(policy, latents, 2)
    expected = torch.cat([policy.decode(latents[:2]), policy.decode(latents[2:])]).numpy()
    assert np.array_equal([np.asarray(Image.open(io.BytesIO(png))) for png in pngs], expected)
