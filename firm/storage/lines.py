"""Journals: files of JSON lines that a kill may cut and a disk may damage; each line has the checksum of its record."""

from __future__ import annotations

import re

from firm.progress import log_line
from firm.storage.files import sha256

_SEALED = re.compile(rb'\{"sha256": "([0-9a-f]{64})", "record": (.*)\}\n', re.DOTALL)


def seal(record: bytes) -> bytes:
    """The line of a record, which is JSON without line breaks."""
    return b'{"sha256": "%s", "record": %s}\n' % (sha256(record).encode(), record)


def unseal(line: bytes) -> bytes | None:
    """The record of a line; None where it is not what was written."""
    match = _SEALED.fullmatch(line)
    return match[2] if match and sha256(match[2]).encode() == match[1] else None


def report_damage(path: object, number: int) -> None:
    """Say that records of a journal were dropped, if any were; what they held is asked or made again."""
    if number:
        log_line(f"{path}: {number} damaged records were dropped; what they answered is asked again")
