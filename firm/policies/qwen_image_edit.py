"""Qwen-Image-Edit family (2509 and its successors; tiny models of the same classes): one source image, square pictures.

Source, edit and latents all have the configuration's resolution, so their tokens lie on one grid. The pipeline's own
``__call__`` encodes sources at 1024 x 1024 whatever is asked for, by a constant of its module: at 1024 both agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from firm.config import PolicyConfig
from firm.policies.pipe import JOINT_ATTENTION, check_pipe, load_denoiser, load_pipe, pixels, save_denoiser
from firm.policies.policy import Conditions
from firm.records import Prompt, UserError
from firm.storage.pictures import open_image

GRID = 32  # pixels; the pipeline rounds the sides of a source to multiples of it

_TEMPLATE_TOKENS = 12
"""What the pipeline's template adds to an instruction and its source, in Qwen2.5-VL's tokens, behind what it drops."""


class QwenImageEdit:
    """The family's adapter; see :class:`firm.policies.policy.Family` for shapes. Latents are packed, [B, L, C]."""

    edits = True
    lora_targets = JOINT_ATTENTION

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load a pipeline folder or hub id.

        Raises:
            UserError: Not a Qwen-Image-Edit pipeline, or one that cannot make pictures of this resolution.
        """
        from diffusers import QwenImageEditPlusPipeline  # slow to import, and :meth:`check` does not need it
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE

        if config.resolution % GRID:
            fix = f"set a multiple of {GRID}"
            raise UserError(f"no edits of {config.resolution} pixels", "policy.resolution", fix, usage=True)
        encoders = ("text_encoder", "vae.encoder")
        self._pipe, self.encoders = load_pipe(QwenImageEditPlusPipeline, config, device, encoders)
        self._device = device
        self._dtype = getattr(torch, config.dtype)
        self._resolution = config.resolution
        # What the text encoder is shown: the pipeline's size, or less where its processor takes no more.
        processor = self._pipe.processor  # none, where a model is made without its files
        most = processor.image_processor.size["longest_edge"] if processor else CONDITION_IMAGE_SIZE  # areas
        self._shown = isqrt(min(CONDITION_IMAGE_SIZE, most))
        self.denoiser = self._pipe.transformer
        self._side = config.resolution // self._pipe.vae_scale_factor // 2  # tokens
        self.latent_shape: tuple[int, ...] = (self._side**2, self.denoiser.config.in_channels)

    @classmethod
    def check(cls, model: str, key: str) -> None:
        """Check the class named in a pipeline's folder."""
        check_pipe(model, key, "QwenImageEditPlus")

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """Conditions of instructions and their sources, which are files or data URLs.

        An instruction without text is a blank, which is what the model's card has guidance move away from.

        Raises:
            UserError: A source cannot be read.
        """
        return self.conditions([prompt.text or " " for prompt in prompts], [_source(prompt) for prompt in prompts])

    def conditions(self, instructions: Sequence[str], sources: Sequence[Image.Image]) -> Conditions:
        """Embeddings of instructions [B] that see their source, a mask if any is padded, and latents of the sources."""
        shown = [self._pipe.image_processor.resize(source, self._shown, self._shown) for source in sources]
        # Given a list, the pipeline would show every picture to every instruction; of a tensor it is one each.
        embeds, mask = self._pipe.encode_prompt(
            list(instructions), image=torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2), device=self._device
        )
        masks = {} if mask is None else {"prompt_embeds_mask": mask}
        return Conditions({"prompt_embeds": embeds, "source_latents": self.latents(sources), **masks})

    def blank(self, number: int, tokens: int) -> Conditions:
        """Empty embeddings of instructions of ``tokens`` tokens, which see their source, and latents of sources."""
        vision = self._pipe.text_encoder.config.vision_config
        seen = round(self._shown / (vision.patch_size * vision.spatial_merge_size)) ** 2
        length = _TEMPLATE_TOKENS + seen + tokens
        embeds = torch.empty(number, length, self.denoiser.config.joint_attention_dim, dtype=self._dtype)
        source = torch.empty(number, *self.latent_shape, dtype=self._dtype)
        return Conditions({"prompt_embeds": embeds, "source_latents": source})

    def latents(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Clean latents [B, L, C] of square pictures; those of another size are resized."""
        side = self._resolution
        _, latents = self._pipe.prepare_latents(
            images=self._pipe.image_processor.preprocess(list(pictures), side, side).unsqueeze(2),
            batch_size=len(pictures),
            num_channels_latents=self._pipe.latent_channels,
            height=side,
            width=side,
            dtype=self._pipe.vae.dtype,
            device=self._device,
            generator=None,
            latents=torch.empty(0),  # noise is not asked for
        )
        packed: Tensor = latents
        return packed

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """One forward pass of the transformer over the tokens of edit and source; only the edit's have a velocity."""
        dtype = self._dtype
        grid = (1, self._side, self._side)
        output: Tensor = self.denoiser(
            hidden_states=torch.cat([latents.to(dtype), conditions.tensors["source_latents"].to(dtype)], 1),
            timestep=sigma,
            encoder_hidden_states=conditions.tensors["prompt_embeds"].to(dtype),
            encoder_hidden_states_mask=conditions.tensors.get("prompt_embeds_mask"),
            img_shapes=[[grid, grid]] * len(latents),
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]].float()

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """The pipeline's ``true_cfg_scale``: classifier-free guidance that keeps the length of a token's velocity."""
        moved = negative + scale * (velocity - negative)
        return moved * (velocity.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to uint8 images."""
        vae = self._pipe.vae
        unpacked = self._pipe._unpack_latents(latents, self._resolution, self._resolution, self._pipe.vae_scale_factor)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=vae.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return pixels(vae.decode(unpacked.to(vae.dtype) * std + mean, return_dict=False)[0][:, :, 0])

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Sigmas [num_inference_steps + 1] of the pipeline's scheduler, shifted for this resolution, ending at 0."""
        from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift

        scheduler = self._pipe.scheduler
        config = scheduler.config
        lengths = (self._side**2, config.base_image_seq_len, config.max_image_seq_len)
        scheduler.set_timesteps(
            sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps),
            mu=calculate_shift(*lengths, config.base_shift, config.max_shift),
            device=self._device,
        )
        return scheduler.sigmas.to(self._device, torch.float32)

    def save(self, folder: Path) -> None:
        """Write the transformer, or its LoRA, as ``QwenImageEditPlusPipeline`` reads it."""
        save_denoiser(self.denoiser, folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        load_denoiser(self._pipe, folder)


def _source(prompt: Prompt) -> Image.Image:
    assert prompt.image is not None, "checked by check_prompts"
    return open_image(prompt.image, f"{prompt.image[:200]}, prompt {prompt.text!r}")  # a data URL is long
