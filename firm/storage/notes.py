"""What the steps of a run on a cluster have come to, for `firm status`: one small object a step, in the run's store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from firm.records import UserError
from firm.storage.open import open_store

KFP_RUN = "FIRM_KFP_RUN"
"""Environment variable with the id of the run of Kubeflow Pipelines that a step belongs to."""
_FOLDER = "_steps"  # beside the runs: no run can be called so
Note = dict[str, str]


@contextmanager
def noted(store: str, step: str) -> Iterator[Note]:
    """Keep a note of how a step begins and ends; nothing is kept outside Kubeflow Pipelines.

    Args:
        store: URI of the run's store.
        step: Name of the step, such as ``curation`` or, in the second round, ``curation-2``.

    Yields:
        The note: ``state`` is "started" or "failed", unless the caller sets another when the step has succeeded, and
        then ``uri``, where its artifact is. ``message`` says why it failed.
    """
    note = {"state": "started"}
    _keep(store, step, note)
    try:
        yield note
    except Exception as error:
        note |= {"state": "failed", "message": str(error) or type(error).__name__}
        raise
    finally:
        _keep(store, step, note)


def _keep(store: str, step: str, note: Note) -> None:
    run = os.environ.get(KFP_RUN)
    if run:
        with suppress(UserError):  # a store that takes no note takes no artifact, of which the step itself tells
            open_store(store).put(f"{_FOLDER}/{run}/{step}.json", json.dumps(note).encode())


def notes_of(store: str, run: str) -> dict[str, Note]:
    """Notes of a run's steps by their name.

    Raises:
        UserError: The store cannot be read.
    """
    found = open_store(store)
    keys = [key for key, _ in found.list(f"{_FOLDER}/{run}/")]
    return {key.rpartition("/")[2].removesuffix(".json"): json.loads(found.get(key)) for key in keys}
