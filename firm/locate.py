"""Resolves what a configuration names: dotted names of Python objects, and folders of models."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from firm.model_folder import check_model_folder, json_object
from firm.records import UserError


def load_object(name: str, where: str) -> Any:
    """Import ``package.module:object``.

    Raises:
        UserError: The name is malformed or nothing is there; ``where`` is the configuration key to name.
    """
    module, separator, attribute = name.partition(":")
    try:
        if not separator:
            raise ImportError("a dotted name looks like package.module:object")
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything while it is imported
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        what = f"cannot import {name!r}: {kind}{error}"
        raise UserError(what, where, "check the dotted name and the module", usage=True) from error


def source_of(name: str) -> Path | None:
    """The folder of the package of ``package.module:object``, or the file of a module that is in none.

    None where there is no source, or nothing is found.
    """
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except Exception:  # whatever a user's package raises while it is imported
        return None
    if not spec or not spec.origin or not Path(spec.origin).is_file():
        return None
    return Path(spec.origin).parent if spec.parent else Path(spec.origin)


def load_named(table: Mapping[str, str], name: str, where: str) -> Any:
    """The object that a table of dotted names has under ``name``.

    Raises:
        UserError: The name is unknown; ``where`` is the configuration key to name.
    """
    if name not in table:
        known = ", ".join(sorted(table))
        raise UserError(f"there is no {name!r}", where, f"use one of {known}", usage=True)
    return load_object(table[name], where)


def model_path(model: str, where: str) -> str:
    """Resolve ``pkg://package/path`` and check folders; anything else is left to the hub loader.

    Raises:
        UserError: A folder is named that does not exist, or holds more than data (`check_model_folder`).
    """
    if model.startswith("pkg://"):
        package, _, path = model.removeprefix("pkg://").partition("/")
        try:
            folder = Path(str(resources.files(package))) / path
        except (ImportError, ValueError, TypeError) as error:
            fix = "write pkg://PACKAGE/PATH with a package that is installed"
            raise UserError(f"no package for the model {model}: {error}", where, fix, usage=True) from error
    else:
        folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        if not model.startswith(("pkg://", "/", "./", "../", "~")):
            return model
        raise UserError(f"there is no model folder {model}", where, "give a model folder or a hub id", usage=True)
    check_model_folder(folder)
    return str(folder)


def kind_of_model(model: str, where: str, file: str, field: str) -> str | None:
    """``field`` of the JSON ``file`` in a model's folder; None for a hub id, left to the loader.

    Raises:
        UserError: The folder does not exist or lacks the field.
    """
    folder = Path(model_path(model, where))
    if not folder.is_dir():
        return None
    value = json_object(folder / file).get(field)
    if not isinstance(value, str):
        what = f"{model} is not the right kind of model folder: it needs {file} with {field!r}"
        raise UserError(what, where, "give a model folder or a hub id", usage=True)
    return value
