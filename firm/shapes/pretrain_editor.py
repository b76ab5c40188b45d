"""Makes the shipped editor: `python -m firm.shapes.pretrain_editor OUT` writes `OUT/editor`.

It learns briefly, and from perfect edits among which some leave the source as it is, so that reinforcement learning has
something to do: like real editors, it fails, and returns its source where it should not.
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from PIL import Image
from torch.nn.functional import conv2d

from firm.config import PolicyConfig
from firm.locate import load_object
from firm.policies.policy import Conditions, Policy
from firm.policies.qwen_image_edit import QwenImageEdit
from firm.policies.sampler import noise_for, sample
from firm.records import Split
from firm.shapes.editor_models import build_editor
from firm.shapes.pretrain import flow_matching_loss, save, train_flow, train_vae
from firm.shapes.scene import SIZE

VAE_STEPS = 4000
STEPS = 3000
NUM_EDITS = 16000
UNTOUCHED = 0.25
"""Share of the edits it learns from whose result is the untouched source."""
NUM_HELD_OUT = 96
BATCH = 32
SEED = 0

Edit = tuple[str, Image.Image, Image.Image]
"""An instruction, its source, and the perfect edit of it."""
Edits = Callable[[Split, int, int], Iterable[Edit]]
"""(split, count, seed) -> that many edits."""

_log = logging.getLogger("firm.shapes.pretrain_editor")


def main() -> None:
    """Trains and saves the editor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write editor/ into")
    parser.add_argument("--edits", default="firm.shapes.editing:perfect_edits", help="function that makes the edits")
    parser.add_argument("--untouched", default=UNTOUCHED, type=float, help="share of edits left as their source")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pretrain(arguments.out / "editor", load_object(arguments.edits, "--edits"), untouched=arguments.untouched)


def pretrain(
    folder: Path,
    edits: Edits,
    *,
    vae_steps: int = VAE_STEPS,
    steps: int = STEPS,
    num_edits: int = NUM_EDITS,
    untouched: float = UNTOUCHED,
    seed: int = SEED,
) -> None:
    """Trains an editor, first its autoencoder and then, on latents and embeddings that stay, its transformer."""
    known = list(edits("train", num_edits, seed))
    pipe = build_editor(seed)
    train_autoencoder(pipe.vae, [picture for _, *pair in known for picture in pair], vae_steps, seed)
    save(pipe, folder)
    policy = Policy(PolicyConfig(family="qwen_image_edit", model=str(folder), resolution=SIZE), torch.device("cpu"))
    policy.train(None, (), seed)
    train_transformer(policy, leave_some(known, untouched, seed), list(edits("test", NUM_HELD_OUT, seed)), steps, seed)
    pipe.transformer.load_state_dict(policy.family.denoiser.state_dict())
    save(pipe, folder)


def leave_some(edits: Iterable[Edit], share: float, seed: int) -> list[Edit]:
    """Edits of which about a share, drawn at random, have the source as their result."""
    rng = np.random.default_rng(seed)
    return [(text, source, source if rng.random() < share else target) for text, source, target in edits]


def train_autoencoder(vae: AutoencoderKLQwenImage, pictures: list[Image.Image], steps: int, seed: int) -> None:
    """Trains the autoencoder on pictures and sets mean and deviation of its latents."""
    treat_as_pictures(vae)
    pixels = _pixels(pictures).permute(0, 3, 1, 2).unsqueeze(2) / 127.5 - 1
    train_vae(vae, pixels, steps, seed, batch_size=16)
    latents = vae.encode(pixels[:2000]).latent_dist.mode()
    dimensions = (0, 2, 3, 4)
    mean, deviation = latents.mean(dimensions).tolist(), latents.std(dimensions).tolist()
    vae.register_to_config(latents_mean=mean, latents_std=deviation)


def treat_as_pictures(vae: AutoencoderKLQwenImage) -> None:
    """Makes an autoencoder of clips take single frames only: twice as fast, and to rounding the same."""
    for module in vae.modules():
        if isinstance(module, QwenImageCausalConv3d):
            module.forward = partial(_of_one_frame, module)


def _of_one_frame(conv: QwenImageCausalConv3d, clip: torch.Tensor, _: None = None) -> torch.Tensor:
    """Before the first frame there are zeros, so that of the weights in time only the last count."""
    width, _, height, *_ = conv._padding
    return conv2d(clip[:, :, 0], conv.weight[:, :, -1], conv.bias, conv.stride[1:], (height, width)).unsqueeze(2)


def train_transformer(policy: Policy, known: list[Edit], held_out: list[Edit], steps: int, seed: int) -> None:
    """Trains the policy by flow matching; batches are drawn once, since each is padded to its own longest instruction.

    What is logged on the way is how far edits are from the perfect ones, on the scale of an untouched source's 1.
    """
    assert policy.parameters is not None
    batches = [encode(policy, known[i : i + BATCH]) for i in range(0, len(known), BATCH)]
    conditions, _ = encode(policy, held_out)
    _, *pictures = zip(*held_out, strict=True)
    source, target = map(_pixels, pictures)
    noise = noise_for(policy.latent_shape, seed, "pretrain", range(len(held_out)))
    generator = torch.Generator().manual_seed(seed)

    def loss() -> torch.Tensor:
        conditions, latents = batches[torch.randint(len(batches), (), generator=generator)]
        return flow_matching_loss(partial(policy.velocity, conditions=conditions), latents, generator)

    def score() -> str:
        edited = policy.decode(sample(policy, conditions, noise, 10))
        return f"distance {((edited - target).abs().mean() / (source - target).abs().mean()).item():.3f}"

    train_flow(policy.parameters.trainable, loss, steps, 2e-3, score)


@torch.no_grad()
def encode(policy: Policy, edits: list[Edit]) -> tuple[Conditions, torch.Tensor]:
    """Conditions and perfect latents [B, 16, 32] of edits."""
    assert isinstance(policy.family, QwenImageEdit)
    instructions, sources, targets = zip(*edits, strict=True)
    return policy.family.conditions(instructions, sources), policy.family.latents(targets)


def _pixels(pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Values [N, 32, 32, 3] in [0, 255]."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float()


if __name__ == "__main__":
    main()
