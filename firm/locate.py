"""Where configured things are: dotted names of Python objects, folders of models."""

from __future__ import annotations

import importlib
from importlib import resources
from pathlib import Path
from typing import Any

from firm.records import UserError


def load_object(name: str, where: str) -> Any:
    """Import ``package.module:object``.

    Raises:
        UserError: The name is malformed or nothing is there; ``where`` is the configuration key to blame.
    """
    module, separator, attribute = name.partition(":")
    try:
        if not separator:
            raise ImportError("a dotted name looks like package.module:object")
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"cannot import {name!r}: {error}", where, "check the dotted name", usage=True) from error


def model_path(model: str, where: str) -> str:
    """Resolve ``pkg://package/path`` and check folders; anything else is left to the hub loader.

    Raises:
        UserError: A folder is named that does not exist.
    """
    if model.startswith("pkg://"):
        package, _, path = model.removeprefix("pkg://").partition("/")
        folder = Path(str(resources.files(package))) / path
    elif model.startswith(("/", "./", "../", "~")):
        folder = Path(model).expanduser()
    else:
        return model
    if not folder.is_dir():
        raise UserError(f"there is no model folder {model}", where, "give a model folder or a hub id", usage=True)
    return str(folder)
