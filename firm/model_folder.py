"""What a model's folder may hold: data alone. Nothing of a model is ever run, and a pickle would be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from firm.records import UserError
from firm.texts import parse_json, read_text

PIPELINE = "model_index.json"
"""Names the components of a pipeline, each a folder of its own."""
_LIBRARIES = (None, "diffusers", "transformers")
_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")
_KERNELS = ("attn_implementation", "experts_implementation")
"""Keys of a configuration whose value may name a kernel of a hub, `owner/name`."""
_CONVERT = "convert it to safetensors, for example with save_pretrained() where its origin is trusted"
_OWN_CODE = "give a model whose classes are part of transformers and diffusers"
_BLANK = ContextVar("models are made without their weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Inside, a loader makes a model as its configuration says, and reads no weights: for planning."""
    token = _BLANK.set(True)
    try:
        yield
    finally:
        _BLANK.reset(token)


def are_weights_read() -> bool:
    """Whether a loader reads weights, as it does outside `without_weights`."""
    return not _BLANK.get()


def check_model_folder(folder: Path) -> None:
    """Check the folder of a model, or of a pipeline with its components, before anything in it is loaded.

    Raises:
        UserError: It names code of its own or of a hub, has weights only as a pickle, or is an adapter of another
            model; the message names the file (exit code 2).
    """
    index = json_object(folder / PIPELINE)
    for component, value in index.items():
        if isinstance(value, list) and value[:1] and value[0] not in _LIBRARIES:
            what = f"this pipeline has code of its own, which is not run: {component} is in {value[0]!r}"
            raise UserError(what, str(folder / PIPELINE), _OWN_CODE, usage=True)
    for part in [p for p in folder.iterdir() if p.is_dir() and p.name in index] if index else [folder]:
        _check_part(part)


def _check_part(folder: Path) -> None:
    for path in sorted(folder.glob("*config.json")):
        config = json_object(path)
        if "auto_map" in config:
            raise UserError("this model has code of its own (auto_map), which is not run", str(path), _OWN_CODE, True)
        if kernel := _kernel(config):
            fix = "remove attn_implementation and experts_implementation from the file"
            raise UserError(
                f"this model asks for code of a hub, {kernel}, which is not run", str(path), fix, usage=True
            )
    if (path := folder / "adapter_config.json").exists():
        fix = "merge it into its base first: peft's merge_and_unload(), then save_pretrained()"
        raise UserError("this folder holds an adapter, not a model", str(path), fix, usage=True)
    names = {path.name for path in folder.iterdir()}
    pickles = [name for name in sorted(names) if name.endswith(_PICKLES)]
    if not any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        _refuse(folder, pickles)
    for path in folder.glob("*.index.json"):
        _refuse(folder, [name for name in _files(path) if not name.endswith(".safetensors")])


def _kernel(config: Mapping[str, Any]) -> str:
    """The kernel of a hub that a configuration, or a part of it, asks for; empty where none does."""
    rest: list[tuple[str, Any]] = [("", config)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += [(key if key.endswith(_KERNELS) else name, each) for name, each in value.items()]
        elif isinstance(value, list):
            rest += [(key, each) for each in value]
        elif key.endswith(_KERNELS) and "/" in str(value):
            return str(value)
    return ""


def _refuse(folder: Path, pickles: list[str]) -> None:
    if pickles:
        what = "these weights are a pickle, which can run code when it is read; only safetensors are"
        raise UserError(what, str(folder / pickles[0]), _CONVERT, usage=True)


def _files(index: Path) -> Iterator[str]:
    """Files that an index of weights names."""
    weights = json_object(index).get("weight_map")
    yield from sorted(set(map(str, weights.values()))) if isinstance(weights, dict) else ()


def json_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file; empty where it is missing or something else, which is for the loader to say."""
    try:
        value = parse_json(read_text(path, "a model"), "", "")
    except UserError:
        return {}
    return value if isinstance(value, dict) else {}


def cannot_load(what: str, model: str, kind: str, error: Exception) -> UserError:
    """What a loader's error means: ``what`` was to be loaded from ``model``, a folder or hub id, of some ``kind``."""
    said = str(error).strip()
    reason = "it has code of its own, which is not run" if "trust_remote_code" in said else said.partition("\n")[0]
    fix = f"give the folder of {kind}, or a hub id that this machine can reach"
    return UserError(f"cannot load {what}: {reason[:300] or type(error).__name__}", model, fix, usage=True)
