"""Models of a hub: whether they are there and may be read, and how much of them is still to be downloaded.

The token is that of the environment (HF_TOKEN), as for the loaders. Where the hub does not answer, or refuses, what the
cache of this machine has is enough, if the weights are among it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from firm.model_folder import json_object
from firm.records import UserError

WEIGHTS = "*.safetensors"
TIMEOUT_S = 20.0
_TOKEN = "set HF_TOKEN to a token that may read it"


class OutOfReachError(UserError):
    """The hub does not answer, and the cache of this machine does not have the model."""


class Weights(NamedTuple):
    """Sizes in bytes.

    Attributes:
        files: Of each file of a model's weights, by its path in the model.
        missing: Of all those that are not on this machine.
    """

    files: Mapping[str, int]
    missing: int = 0

    def below(self, folder: str = "") -> int:
        """Of all files below a folder of the model; by default of all."""
        return sum(size for name, size in self.files.items() if name.startswith(folder))


def weights_here(folder: Path) -> Weights:
    """The weights in a model's folder."""
    return Weights({path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob(WEIGHTS)})


def weights_of_hub(model: str, file: str, where: str) -> Weights:
    """Find a model of a hub; of its files its configuration alone is downloaded.

    Args:
        model: Its id.
        file: Its configuration. That of a pipeline has its weights in folders beside it, any other beside it.
        where: Configuration key to name.

    Raises:
        UserError: There is no such model, it may not be read, or only a part of it is in reach.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    path = _configuration(model, file, f"{where}: {model}")
    try:
        files = HfApi().model_info(model, files_metadata=True, timeout=TIMEOUT_S).siblings or []
    except Exception as error:  # whatever keeps the hub from answering
        here = weights_here(path.parent)
        if not here.files:
            what = "the cache has a part of this model only, and the hub gives no more"
            fix = f"download it where there is a network, or {_TOKEN}"
            raise OutOfReachError(what, f"{where}: {model}", fix) from error
        return here
    folders = {"."} if file == "config.json" else json_object(path).keys()
    loaded = {f.rfilename: f.size or 0 for f in files if _is_loaded(Path(f.rfilename), folders)}
    missing = [size for name, size in loaded.items() if not isinstance(try_to_load_from_cache(model, name), str)]
    return Weights(loaded, sum(missing))


def _is_loaded(file: Path, folders: Collection[str]) -> bool:
    """Whether loaders want a file: one of weights in such a folder, and no variant, such as model.fp16.safetensors."""
    return file.match(WEIGHTS) and str(file.parent) in folders and "." not in file.stem


def _configuration(model: str, file: str, where: str) -> Path:
    from huggingface_hub import constants, errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, file, etag_timeout=TIMEOUT_S))
    except errors.GatedRepoError as error:
        what = "this model is gated, and its owner has not given the token of this environment access"
        fix = f"accept its conditions at {constants.ENDPOINT}/{model}, and {_TOKEN}"
        raise UserError(what, where, fix) from error
    except errors.RepositoryNotFoundError as error:
        fix = f"correct the id, give a model folder, or {_TOKEN}"
        raise UserError("the hub has no such model, or does not show it to everybody", where, fix, True) from error
    except (errors.LocalEntryNotFoundError, errors.HFValidationError) as error:
        what = f"{constants.ENDPOINT} cannot be reached, and the cache has no such model"
        fix = "give a model folder, fill the cache (HF_HOME) where there is a network, or set HF_ENDPOINT to a mirror"
        raise OutOfReachError(what, where, fix) from error
    except errors.EntryNotFoundError as error:
        fix = "give the folder or the hub id of one"
        raise UserError(f"this is not the right kind of model: it has no {file}", where, fix, usage=True) from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refuses: {str(error).partition(chr(10))[0]}", where, _TOKEN) from error
