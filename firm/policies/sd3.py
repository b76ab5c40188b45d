"""Stable Diffusion 3 family (SD3, SD3.5; tiny models of the same classes): SD3Transformer2DModel, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging
from torch import Tensor

from firm.config import PolicyConfig
from firm.locate import model_path
from firm.policies.policy import Conditions
from firm.records import UserError


class SD3:
    """The family's adapter; see :class:`firm.policies.policy.Family` for shapes."""

    lora_targets = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load a pipeline folder or hub id.

        Raises:
            UserError: Not a Stable Diffusion 3 pipeline.
        """
        path = model_path(config.model, "policy.model")
        has_t5 = not Path(path).is_dir() or (Path(path) / "text_encoder_3").is_dir()
        absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        logging.disable_progress_bar()  # a log is no place for a bar that redraws itself
        try:
            pipe = StableDiffusion3Pipeline.from_pretrained(path, dtype=getattr(torch, config.dtype), **absent)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            fix = "give a StableDiffusion3Pipeline folder or a hub id that this machine can reach"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"cannot load a generator: {reason}", config.model, fix, usage=True) from error
        pipe.set_progress_bar_config(disable=True)
        self._pipe, self.device, self._tokens = pipe.to(device), device, config.max_sequence_length
        self.denoiser = pipe.transformer
        side = config.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.transformer.config.in_channels, side, side)

    def encode(self, prompts: Sequence[str]) -> Conditions:
        """CLIP (and T5) embeddings of the prompts, without classifier-free guidance."""
        embeds, _, pooled, _ = self._pipe.encode_prompt(
            prompt=list(prompts),
            prompt_2=list(prompts),
            prompt_3=list(prompts),
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
            device=self.device,
        )
        return Conditions({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """One forward pass of the transformer; sigma in [0, 1] becomes the timestep in [0, 1000] here only."""
        dtype = self.denoiser.dtype
        output: Tensor = self.denoiser(
            hidden_states=latents.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=conditions.tensors["prompt_embeds"].to(dtype),
            pooled_projections=conditions.tensors["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to uint8 images."""
        vae = self._pipe.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        images: Tensor = vae.decode(scaled, return_dict=False)[0]
        return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Sigmas [num_inference_steps + 1] of the pipeline's scheduler, ending at 0."""
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(num_inference_steps, device=self.device)
        return scheduler.sigmas.to(self.device, torch.float32)
