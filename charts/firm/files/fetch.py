"""Download a model from the object store: ``fetch.py URI FOLDER``.

URI is a critic's artifact, verified against its manifest, or any prefix that holds the files of a model.
"""

import sys
from pathlib import Path

from firm.records import ArtifactRef
from firm.storage.artifacts import MANIFEST
from firm.storage.files import sha256
from firm.storage.inputs import open_input
from firm.storage.open import open_store

CRITIC = "critic"  # the folder of an artifact that holds the model


def fetch(uri: str, folder: Path) -> None:
    """Make ``folder`` the model at ``uri``."""
    store = open_store(uri)
    if store.exists(MANIFEST):
        ref = ArtifactRef(uri=store.uri, sha256=sha256(store.get(MANIFEST)))
        folder.symlink_to(open_input(ref, folder.parent, only=f"{CRITIC}/") / CRITIC)
    else:
        for key, _ in store.list():
            store.fetch(key, folder / key)
    if not (folder / "config.json").is_file():
        sys.exit(f"there is no model (config.json) at {uri}")


if __name__ == "__main__":
    fetch(sys.argv[1], Path(sys.argv[2]))
