"""Stable Diffusion 3 family (SD3, SD3.5; tiny models of the same classes): SD3Transformer2DModel, rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from firm.config import PolicyConfig
from firm.locate import model_path
from firm.policies.pipe import JOINT_ATTENTION, check_pipe, load_denoiser, load_pipe, pixels, save_denoiser
from firm.policies.policy import Conditions
from firm.records import Prompt


class SD3:
    """The family's adapter; see :class:`firm.policies.policy.Family` for shapes."""

    edits = False
    lora_targets = JOINT_ATTENTION

    def __init__(self, config: PolicyConfig, device: torch.device) -> None:
        """Load a pipeline folder or hub id.

        Raises:
            UserError: Not a Stable Diffusion 3 pipeline.
        """
        from diffusers import StableDiffusion3Pipeline  # slow to import, and :meth:`check` does not need it

        path = Path(model_path(config.model, "policy.model"))
        has_t5 = not path.is_dir() or (path / "text_encoder_3").is_dir()
        absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
        self._pipe, self.encoders = load_pipe(StableDiffusion3Pipeline, config, device, encoders, **absent)
        self._device = device
        self._dtype = getattr(torch, config.dtype)
        self._tokens = config.max_sequence_length
        self.denoiser = self._pipe.transformer
        side = config.resolution // self._pipe.vae_scale_factor
        self.latent_shape: tuple[int, ...] = (self.denoiser.config.in_channels, side, side)

    @classmethod
    def check(cls, model: str, key: str) -> None:
        """Check the class named in a pipeline's folder."""
        check_pipe(model, key, "StableDiffusion3")

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """CLIP (and T5) embeddings of the prompts, without classifier-free guidance."""
        texts = [prompt.text for prompt in prompts]
        embeds, _, pooled, _ = self._pipe.encode_prompt(
            prompt=texts,
            prompt_2=texts,
            prompt_3=texts,
            do_classifier_free_guidance=False,
            max_sequence_length=self._tokens,
            device=self._device,
        )
        return Conditions({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def blank(self, number: int, tokens: int) -> Conditions:
        """Empty embeddings; prompts are padded to what CLIP and T5 take, whatever their ``tokens``."""
        config = self.denoiser.config
        length = self._pipe.tokenizer_max_length + self._tokens
        embeds = torch.empty(number, length, config.joint_attention_dim, dtype=self._dtype)
        pooled = torch.empty(number, config.pooled_projection_dim, dtype=self._dtype)
        return Conditions({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """One forward pass of the transformer; sigma in [0, 1] becomes the timestep in [0, 1000] here only."""
        dtype = self._dtype
        output: Tensor = self.denoiser(
            hidden_states=latents.to(dtype),
            timestep=sigma * 1000,
            encoder_hidden_states=conditions.tensors["prompt_embeds"].to(dtype),
            pooled_projections=conditions.tensors["pooled_prompt_embeds"].to(dtype),
            return_dict=False,
        )[0]
        return output.float()

    def guided(self, velocity: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance."""
        return negative + scale * (velocity - negative)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode clean latents to uint8 images."""
        vae = self._pipe.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor
        return pixels(vae.decode(scaled, return_dict=False)[0])

    def sigmas(self, num_inference_steps: int) -> Tensor:
        """Sigmas [num_inference_steps + 1] of the pipeline's scheduler, ending at 0."""
        scheduler = self._pipe.scheduler
        scheduler.set_timesteps(num_inference_steps, device=self._device)
        return scheduler.sigmas.to(self._device, torch.float32)

    def save(self, folder: Path) -> None:
        """Write the transformer, or its LoRA, as ``StableDiffusion3Pipeline`` reads it."""
        save_denoiser(self.denoiser, folder)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote."""
        load_denoiser(self._pipe, folder)
