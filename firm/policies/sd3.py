"""Stable Diffusion 3 family (SD3, SD3.5; tiny models of the same classes): SD3Transformer2DModel, rectified flow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from firm.config import PolicyConfig
from firm.locate import kind_of_model, model_path
from firm.policies.policy import Conditions
from firm.records import Prompt, UserError

if TYPE_CHECKING:
    from peft import LoraConfig

TRANSFORMER = "transformer"  # the pipeline's name of the denoiser: a folder, and the prefix of a LoRA's parameters


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
        from diffusers import StableDiffusion3Pipeline  # slow to import, and :meth:`check` does not need it
        from diffusers.utils import logging

        path = model_path(config.model, "policy.model")
        has_t5 = not Path(path).is_dir() or (Path(path) / "text_encoder_3").is_dir()
        absent = {} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}
        logging.disable_progress_bar()  # progress bars clutter a log
        try:
            pipe = StableDiffusion3Pipeline.from_pretrained(path, dtype=getattr(torch, config.dtype), **absent)
        except (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            fix = "give a StableDiffusion3Pipeline folder or a hub id that this machine can reach"
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"cannot load a generator: {reason}", config.model, fix, usage=True) from error
        pipe.set_progress_bar_config(disable=True)
        self._pipe = pipe.to(device)
        self._device = device
        self._tokens = config.max_sequence_length
        self.denoiser = pipe.transformer
        side = config.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.transformer.config.in_channels, side, side)

    @classmethod
    def check(cls, model: str, key: str) -> None:
        """Check the class named in a pipeline's folder; a hub id is left to the loader."""
        kind = kind_of_model(model, key, "model_index.json", "_class_name")
        if kind is not None and not kind.startswith("StableDiffusion3"):
            fix = "give the folder of a StableDiffusion3Pipeline"
            raise UserError(f"{model} is a {kind}, not a generator of the family sd3", key, fix, usage=True)

    def encode(self, prompts: Sequence[Prompt]) -> Conditions:
        """CLIP (and T5) embeddings of the prompts, without classifier-free guidance.

        Raises:
            UserError: A prompt has a source image, which this family does not support.
        """
        if edits := [prompt for prompt in prompts if prompt.image is not None]:
            fix = "leave source_image out of the prompts, or choose a family of editors"
            raise UserError("the family sd3 generates and does not edit", f"prompt {edits[0].text!r}", fix, usage=True)
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
        scheduler.set_timesteps(num_inference_steps, device=self._device)
        return scheduler.sigmas.to(self._device, torch.float32)

    def save(self, folder: Path) -> None:
        """Write what ``StableDiffusion3Pipeline.load_lora_weights`` reads, or the whole transformer as a folder."""
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

        lora = self._lora()
        if lora is None:
            self.denoiser.save_pretrained(folder / TRANSFORMER)
            _forget_origin(folder / TRANSFORMER / "config.json")
            return
        card = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules)}
        # One entry: safetensors writes several in random order, and equal adapters must be equal files.
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{TRANSFORMER}.{k}": v for k, v in card.items()})}
        tensors = {f"{TRANSFORMER}.{name}": value.cpu().contiguous() for name, value in self._trained().items()}
        save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata)

    def load(self, folder: Path) -> None:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: A parameter is missing, superfluous or of another shape.
        """
        if self._lora() is None:
            saved = type(self.denoiser).from_pretrained(folder, subfolder=TRANSFORMER, use_safetensors=True)
            weights = saved.state_dict()
        else:
            found = self._pipe.lora_state_dict(folder, use_safetensors=True)
            weights = {name.removeprefix(f"{TRANSFORMER}."): value for name, value in found.items()}
        targets = self._trained()
        for name in sorted(weights.keys() | targets.keys()):
            if name not in weights or name not in targets or weights[name].shape != targets[name].shape:
                raise ValueError(f"parameter {name} does not fit the base model")
            targets[name].copy_(weights[name])

    def _lora(self) -> LoraConfig | None:
        """Peft's configuration of the denoiser's LoRA, None where it has none."""
        lora: LoraConfig | None = getattr(self.denoiser, "peft_config", {}).get("default")
        return lora

    def _trained(self) -> dict[str, Tensor]:
        """The LoRA's parameters or the whole denoiser's, under the names of their files; no copies."""
        from peft import get_peft_model_state_dict

        state: dict[str, Tensor] = self.denoiser.state_dict()
        return state if self._lora() is None else get_peft_model_state_dict(self.denoiser, state)


def _forget_origin(config: Path) -> None:
    """Remove the path that the model was loaded from: it is specific to this machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
