"""Where the configuration of a model is: in its folder, the hub's cache, or among those of releases shipped here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from firm.locate import model_path
from firm.model_folder import check_model_folder
from firm.records import UserError

RELEASED = Path(__file__).parent / "released"
"""Configurations of releases that the presets name, by their hub id."""


def configured(model: str, key: str) -> Path:
    """The folder with the configuration files of a model; weights need not be there.

    Raises:
        UserError: There is none on this machine; ``key`` names the model.
    """
    folder = Path(model_path(model, key))
    if folder.is_dir():
        return folder
    try:
        folder = Path(snapshot_download(model, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        folder = RELEASED / model
    if not folder.is_dir():
        known = ", ".join(sorted(f"{path.parent.name}/{path.name}" for path in RELEASED.glob("*/*")))
        fix = f"give a folder with its configuration files (weights are not needed); known without one: {known}"
        raise UserError(f"the configuration of {model} is not on this machine", key, fix, usage=True)
    check_model_folder(folder)
    return folder


@contextmanager
def going_through(model: str, key: str) -> Iterator[None]:
    """Inside, a model is gone through without content.

    Raises:
        UserError: That is more than its classes or configuration files allow; ``key`` names the model.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a model's classes raise anything
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        fix = "check its configuration files; planned are dense critics of Qwen-VL's kind, and policies of each family"
        raise UserError(f"cannot plan with {model}: {reason}", key, fix, usage=True) from error
