"""Shards that a stage publishes as it finishes them, so that the next attempt goes on where the sound ones end."""

from __future__ import annotations

from collections.abc import Sequence

from firm.progress import log_line
from firm.records import Record
from firm.storage.artifacts import WORK, Output
from firm.storage.files import atomic_write, sha256_file
from firm.storage.shards import ShardWriter

CHECKSUMS = f"{WORK}/checksums"


class PublishedShards:
    """Writes a stream of records as shards in a folder of a stage's output; resumes after the last sound one.

    A shard counts once its checksum is in ``work/checksums``. One that is not what was written is removed with a
    message, and all behind it: they are made again.

    Attributes:
        rows_done: Records in the shards of earlier attempts: the caller skips that many.
    """

    def __init__(self, out: Output, name: str, model: type[Record], rows_per_shard: int) -> None:
        self._out = out
        self._name = name
        self._remove_unsound()
        self._writer = ShardWriter(out.folder / name, model, rows_per_shard)
        self.rows_done = self._writer.rows_done

    def write(self, records: Sequence[Record]) -> None:
        """Add records, and publish the shards finished by them.

        Raises:
            UserError: A shard cannot be written or stored. Those finished before are kept.
        """
        self._publish(self._writer.write(records))

    def close(self) -> None:
        """Write and publish the remaining records, see `ShardWriter.close`."""
        self._publish(self._writer.close())

    def _publish(self, shards: Sequence[str]) -> None:
        for shard in shards:
            with atomic_write(self._out.folder / self._checksum(shard)) as file:
                file.write(self._hash(shard))
        self._out.publish(*map(self._checksum, shards))
        self._out.publish(*(f"{self._name}/{shard}" for shard in shards))

    def _remove_unsound(self) -> None:
        shards = sorted(path.name for path in (self._out.folder / self._name).glob("*.parquet"))
        for number, shard in enumerate(shards):
            if not self._is_sound(shard):
                log_line(f"{self._name}/{shard} is not what was written: it is made again, and all behind it")
                self._out.discard(*(f"{self._name}/{each}" for each in shards[number:]))
                return

    def _is_sound(self, shard: str) -> bool:
        checksum = self._out.folder / self._checksum(shard)
        return checksum.is_file() and checksum.read_bytes() == self._hash(shard)

    def _hash(self, shard: str) -> bytes:
        return sha256_file(self._out.folder / self._name / shard).encode()

    def _checksum(self, shard: str) -> str:
        return f"{CHECKSUMS}/{self._name}/{shard}.sha256"
