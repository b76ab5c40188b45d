"""Download a model from the object store: ``fetch.py URI FOLDER``.

URI is a critic's artifact, verified against its manifest, or any prefix that holds the files of a model. What is more
than data, a pickle or code, is refused as in `firm serve`, whichever server is to load it.
"""

import sys
from pathlib import Path

from firm.model_folder import check_model_folder
from firm.records import ArtifactRef, UserError
from firm.storage.artifacts import MANIFEST
from firm.storage.files import sha256
from firm.storage.inputs import open_input
from firm.storage.open import open_store

CRITIC = "critic"  # the folder of an artifact that holds the model


def fetch(uri: str, folder: Path) -> None:
    """Make ``folder`` the model at ``uri``.

    Raises:
        UserError: There is none, or it holds more than data.
    """
    store = open_store(uri)
    if store.exists(MANIFEST):
        ref = ArtifactRef(uri=store.uri, sha256=sha256(store.get(MANIFEST)))
        folder.symlink_to(open_input(ref, folder.parent, only=f"{CRITIC}/") / CRITIC)
    else:
        for key, _ in store.list():
            store.fetch(key, folder / key)
    if not (folder / "config.json").is_file():
        raise UserError("there is no model (config.json)", uri, "set critic.model to one", usage=True)
    check_model_folder(folder)


if __name__ == "__main__":
    try:
        fetch(sys.argv[1], Path(sys.argv[2]))
    except UserError as error:
        sys.exit(f"error: {error}")
