"""What families made of a diffusers pipeline share: its folder is checked and loaded, its denoiser saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from firm.config import PolicyConfig
from firm.locate import kind_of_model, model_path
from firm.model_folder import PIPELINE, are_weights_read, cannot_load, check_model_folder, json_object
from firm.policies.encoders import HOST, place, tensors_of
from firm.records import UserError

if TYPE_CHECKING:
    from peft import LoraConfig

TRANSFORMER = "transformer"  # the pipelines' name of the denoiser: a folder, and the prefix of a LoRA's parameters
JOINT_ATTENTION: tuple[str, ...] = (
    "attn.add_k_proj",
    "attn.add_q_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "attn.to_k",
    "attn.to_out.0",
    "attn.to_q",
    "attn.to_v",
)
"""Layers of attention over image and text together, under diffusers' names."""


def check_pipe(model: str, key: str, kind: str) -> None:
    """Check that ``model`` is the folder of a pipeline whose class starts with ``kind``; the loader checks a hub id.

    Raises:
        UserError: It is not; ``key`` is named.
    """
    found = kind_of_model(model, key, PIPELINE, "_class_name")
    if found is not None and not found.startswith(kind):
        fix = f"give the folder of a {kind}Pipeline, or set the family that the model is of"
        raise UserError(f"{model} is a {found}, not a {kind}Pipeline", key, fix, usage=True)


def load_pipe(
    pipeline: Any, config: PolicyConfig, device: torch.device, encoders: Sequence[str], **options: Any
) -> tuple[Any, tuple[nn.Module, ...]]:
    """Load ``config.model`` with a pipeline class of diffusers; returns it and those of its ``encoders`` that it has.

    All of it is on ``device``, but encoders are on the host where ``config.offload_encoders`` says so. ``options`` are
    for the class's ``from_pretrained``.

    Raises:
        UserError: It is no such pipeline, or cannot be reached.
    """
    from diffusers.utils import logging

    logging.disable_progress_bar()  # progress bars clutter a log
    path = model_path(config.model, "policy.model")
    try:
        if not Path(path).is_dir():
            path = pipeline.download(path, use_safetensors=True, trust_remote_code=False)
            check_model_folder(Path(path))
        dtype = getattr(torch, config.dtype)
        if not are_weights_read():
            pipe = _made(pipeline, Path(path), dtype)
            return pipe, _encoders(pipe, encoders)
        pipe = pipeline.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False, **options)
        found = _encoders(pipe, encoders)
        waiting = dict.fromkeys(tensors_of(found) if config.offload_encoders else ())
        parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        place(waiting, HOST)  # fails where a weight is missing, as the next line does
        place((tensor for tensor in tensors_of(parts) if tensor not in waiting), device)
    except UserError:
        raise
    except Exception as error:  # diffusers raises anything on a damaged folder
        raise cannot_load("a policy", config.model, f"a {pipeline.__name__}", error) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe, found


def _encoders(pipe: Any, names: Sequence[str]) -> tuple[nn.Module, ...]:
    parts = (attrgetter(name)(pipe) for name in names)
    return tuple(part for part in parts if part is not None)


def _made(pipeline: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The pipeline in a folder as its configurations say, without weights; what has no files there is None."""
    parts: dict[str, Any] = {}
    for name, value in json_object(folder / PIPELINE).items():
        if isinstance(value, list):
            kind = getattr(import_module(value[0]), value[1]) if (folder / name).is_dir() else None
            parts[name] = kind and _part(kind, folder / name, dtype)
    return pipeline(**parts)


def _part(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    if hasattr(kind, "load_config") and issubclass(kind, nn.Module):  # of diffusers
        return nn.Module.to(kind.from_config(kind.load_config(folder)), dtype)  # its own would warn
    if issubclass(kind, nn.Module):
        return kind._from_config(kind.config_class.from_pretrained(folder), dtype=dtype)
    return kind.from_pretrained(folder)


def pixels(images: Tensor) -> Tensor:
    """Images uint8 [B, H, W, 3] of a VAE's output [B, 3, H, W], nominally in [-1, 1]."""
    return ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def save_denoiser(denoiser: nn.Module, folder: Path) -> None:
    """Write what the pipelines' ``load_lora_weights`` reads, or the whole transformer as a folder."""
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

    lora = _lora(denoiser)
    if lora is None:
        denoiser.save_pretrained(folder / TRANSFORMER)  # type: ignore[operator]
        _forget_origin(folder / TRANSFORMER / "config.json")
        return
    card = {"r": lora.r, "lora_alpha": lora.lora_alpha, "target_modules": sorted(lora.target_modules)}
    # One entry: safetensors writes several in random order, and equal adapters must be equal files.
    metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps({f"{TRANSFORMER}.{k}": v for k, v in card.items()})}
    tensors = {f"{TRANSFORMER}.{name}": value.cpu().contiguous() for name, value in _trained(denoiser).items()}
    save_file(tensors, folder / LORA_WEIGHT_NAME_SAFE, metadata)


def load_denoiser(pipe: Any, folder: Path) -> None:
    """Read what :func:`save_denoiser` wrote into the transformer of ``pipe``, which has got its LoRA again.

    Raises:
        OSError, RuntimeError: The files are missing or damaged.
        ValueError: A parameter is missing, superfluous or of another shape.
    """
    if _lora(pipe.transformer) is None:
        saved = type(pipe.transformer).from_pretrained(folder, subfolder=TRANSFORMER, use_safetensors=True)
        weights = saved.state_dict()
    else:
        found = pipe.lora_state_dict(folder, use_safetensors=True)
        weights = {name.removeprefix(f"{TRANSFORMER}."): value for name, value in found.items()}
    targets = _trained(pipe.transformer)
    for name in sorted(weights.keys() | targets.keys()):
        if name not in weights or name not in targets or weights[name].shape != targets[name].shape:
            raise ValueError(f"parameter {name} does not fit the base model")
        targets[name].copy_(weights[name])


def _lora(denoiser: nn.Module) -> LoraConfig | None:
    """Peft's configuration of the denoiser's LoRA, None where it has none."""
    lora: LoraConfig | None = getattr(denoiser, "peft_config", {}).get("default")
    return lora


def _trained(denoiser: nn.Module) -> dict[str, Tensor]:
    """The LoRA's parameters or the whole denoiser's, under the names of their files; no copies."""
    from peft import get_peft_model_state_dict

    state: dict[str, Tensor] = denoiser.state_dict()
    return state if _lora(denoiser) is None else get_peft_model_state_dict(denoiser, state)


def _forget_origin(config: Path) -> None:
    """Remove the path that the model was loaded from: it is specific to this machine."""
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
