"""Makes the shipped generators: `python -m firm.shapes.pretrain OUT` writes `OUT/base` and `OUT/strong`.

`base` is trained briefly, so that it still fails often enough for reinforcement learning to have something to do;
`strong` is trained for longer and is a second source of candidates for curation. About eight minutes on two cores.
"""

import argparse
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch.nn.functional import l1_loss, mse_loss

from firm.shapes.generation import compose, draw_prompt, prompts
from firm.shapes.models import build_generator, load_generator
from firm.shapes.scene import SIZE, render
from firm.shapes.teacher import instruction_following

VAE_STEPS = 1400
STEPS = {"base": 1200, "strong": 1900}
NUM_IMAGES = 20_000
SEED = 0

_log = logging.getLogger("firm.shapes.pretrain")


def main() -> None:
    """Trains and saves the two generators."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write base/ and strong/ into")
    out = parser.parse_args().out
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    texts, images = clean_renders(NUM_IMAGES, SEED)
    vae = build_generator(SEED).vae
    train_vae(vae, images, VAE_STEPS, SEED)
    some = encode(vae, images[:2000])
    vae.register_to_config(scaling_factor=1 / some.std().item(), shift_factor=some.mean().item())
    latents = encode(vae, images)
    for name, steps in STEPS.items():
        pipe = train_generator(vae, texts, latents, steps, SEED)
        save(pipe, out / name)
        mean, full = teacher_score(load_generator(out / name))
        _log.info("%s: teacher %.3f, full marks %.1f%%", name, mean, 100 * full)


def clean_renders(count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    """Returns train prompts and flawless pictures of them, [count, 3, 32, 32] in [-1, 1]."""
    rng = np.random.default_rng(seed)
    texts = [draw_prompt("train", rng) for _ in range(count)]
    pixels = np.stack([render(compose(text, rng), rng) for text in texts])
    return texts, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, seed: int, batch_size: int = 32) -> None:
    """Trains an autoencoder on pictures in [-1, 1] of the shape that it takes, and freezes it."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        batch = images[torch.randint(len(images), (batch_size,), generator=generator)]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        return l1_loss(decoded, batch) + 2 * mse_loss(decoded, batch) + 1e-5 * posterior.kl().mean()

    for step, value, seconds in descend(loss, optimizer, schedule, steps):
        if step % 200 == 0:
            _log.info("vae step %d/%d loss %.4f (%.0f s)", step, steps, value, seconds)
    vae.requires_grad_(False)


def descend(
    loss: Callable[[], torch.Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    steps: int,
) -> Iterator[tuple[int, float, float]]:
    """Takes steps with clipped gradients; yields after each its number from 1, its loss, and the seconds so far."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    start = time.monotonic()
    for step in range(1, steps + 1):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield step, value.item(), time.monotonic() - start


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Returns the shifted and scaled latents [N, 8, 8, 8] of pictures [N, 3, 32, 32]."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in images.split(500)])
    return (latents - vae.config.shift_factor) * vae.config.scaling_factor


def train_generator(
    vae: AutoencoderKL, texts: list[str], latents: torch.Tensor, steps: int, seed: int
) -> StableDiffusion3Pipeline:
    """Trains transformer and text encoders together by flow matching; returns the pipeline with averaged weights."""
    pipe = build_generator(seed)
    pipe.register_modules(vae=vae)
    pipe.set_progress_bar_config(disable=True)
    parameters = [p for m in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2) for p in m.parameters()]
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        rows = torch.randint(len(texts), (64,), generator=generator)
        dropped = torch.rand(64, generator=generator) < 0.1  # for guidance without a condition
        captions = ["" if drop else texts[row] for row, drop in zip(rows.tolist(), dropped.tolist(), strict=True)]
        return flow_matching_loss(partial(predict, pipe, captions), latents[rows], generator)

    def score() -> str:
        mean, full = teacher_score(pipe, rounds=3)
        return f"teacher {mean:.2f} full marks {full:.0%}"

    train_flow(parameters, loss, steps, 3e-3, score)
    return pipe


def train_flow(
    parameters: list[torch.nn.Parameter],
    loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    score: Callable[[], str],
) -> None:
    """Trains parameters and leaves their average in them; what `score` says of that on the way is logged."""
    ema = EMAModel(parameters, decay=0.99)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50, 0.05 + 1.9 * (1 - step / steps))
    )
    for step, value, seconds in descend(loss, optimizer, schedule, steps):
        ema.step(parameters)
        if step % 250 == 0 or step == steps:
            ema.store(parameters)
            ema.copy_to(parameters)
            _log.info("step %d/%d loss %.4f %s (%.0f s)", step, steps, value, score(), seconds)
            ema.restore(parameters)
    ema.copy_to(parameters)


def flow_matching_loss(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], latents: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Returns the mean squared error of the velocity (noise minus latents [B, ...]) at uniform times [B]."""
    noise = torch.randn(latents.shape, generator=generator)
    sigma = torch.rand(len(latents), generator=generator)
    noisy = torch.lerp(latents, noise, sigma.view(-1, *[1] * (latents.ndim - 1)))
    return mse_loss(velocity(noisy, sigma), noise - latents)


def predict(
    pipe: StableDiffusion3Pipeline, captions: list[str], noisy: torch.Tensor, sigma: torch.Tensor
) -> torch.Tensor:
    """Returns the velocity at latents [B, 8, 8, 8] and times [B] in [0, 1], with gradients for the text encoders."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        captions, captions, captions, do_classifier_free_guidance=False, max_sequence_length=1
    )
    return pipe.transformer(noisy, embeds, pooled, timestep=1000 * sigma, return_dict=False)[0]


def teacher_score(pipe: StableDiffusion3Pipeline, rounds: int = 8, seed: int = 1) -> tuple[float, float]:
    """Returns the teacher's mean score and share of fives over `rounds` pictures of every test prompt, unguided."""
    pipe.set_progress_bar_config(disable=True)
    asked = prompts("test") * rounds
    images = pipe(
        asked, num_inference_steps=10, guidance_scale=1.0, height=SIZE, width=SIZE, max_sequence_length=1,
        generator=torch.Generator().manual_seed(seed),
    ).images  # fmt: skip
    scores = [instruction_following(prompt, image) for prompt, image in zip(asked, images, strict=True)]
    return sum(scores) / len(scores), scores.count(5) / len(scores)


def save(pipe: DiffusionPipeline, folder: Path) -> None:
    """Saves the pipeline in half precision, see `load_generator` and `load_editor`."""
    pipe.to(torch.float16).save_pretrained(folder)
    pipe.to(torch.float32)


if __name__ == "__main__":
    main()
