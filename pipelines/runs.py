"""A run's local folder: its log, progress and page; one process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from firm.config import RunConfig
from firm.records import UserError
from firm.storage.files import disk_error
from firm.storage.open import open_store
from firm.storage.store import LocalStore


@dataclass(frozen=True)
class RunFolder:
    """``path`` is local even where the run's artifacts are in S3; ``config`` has an absolute store."""

    path: Path
    config: RunConfig

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig) -> Iterator[RunFolder]:
        """Lock the run's folder.

        Raises:
            UserError: It cannot be written, or another process is working on this run.
        """
        store = open_store(config.store)
        path = (store.root if isinstance(store, LocalStore) else Path("runs").absolute()) / config.name
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise disk_error(error, path) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it, or give this run another name with --set name=..."
                raise UserError("another process is working on this run", str(path), fix) from error
            yield cls(path, config.model_copy(update={"store": store.uri}))
