"""A chat that remembers its answers, so that no request is sent again after a restart."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import TypeAdapter

from firm.chat.messages import Chat, ChatMessage, Reply, Token
from firm.records import UserError
from firm.storage.files import disk_error

_TOKENS = TypeAdapter(tuple[Token, ...])


class Journal:
    """Wraps a `Chat` with an append-only JSONL file of answers.

    A line holds the SHA-256 of a request (judge, messages and options), the answer, whether it was truncated and its
    tokens, if there are any; only hashes and file offsets are kept in memory. What might have stood in the place of a
    token is kept for digits only: nobody reads the rest, which would make lines a hundred times longer. Failed requests
    are not recorded. Each line reaches the operating system before the answer is returned, so that ``kill -9`` loses at
    most requests in flight; a torn last line is dropped.

    Args:
        chat: Asked when the journal has no answer.
        path: The file; it and its folder are created if missing.

    Raises:
        UserError: Another process, or another Journal in this process, has the file open.
    """

    def __init__(self, chat: Chat, path: str | Path) -> None:
        self.name = chat.name
        self._path = path
        self._chat = chat
        self._lock = threading.Lock()
        self._offsets: dict[bytes, int] = {}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (open as long as the journal)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            fix = "wait for the other run to end, or give this one another name"
            raise UserError("the journal is in use by another run", str(path), fix) from error
        except OSError:
            pass  # some network file systems have no locks
        self._end = self._load(path)

    def __len__(self) -> int:
        return len(self._offsets)

    def complete(
        self, messages: Sequence[ChatMessage], *, max_tokens: int, temperature: float, seed: int | None
    ) -> Reply:
        """Answer from the journal, or ask and record; see `Chat.complete`."""
        options = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        request = json.dumps([self.name, list(messages), options], sort_keys=True).encode()
        key = hashlib.sha256(request).digest()
        if known := self._recorded(key):
            return known
        reply = self._chat.complete(messages, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return self._record(key, reply)

    def close(self) -> None:
        """Close the file and release its lock."""
        self._file.close()

    def _load(self, path: str | Path) -> int:
        """Index the lines; returns the offset of the next one."""
        offset = 0
        with open(path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    # Cut off in the middle by a crash. The next line must not be glued to it.
                    self._file.truncate(offset)
                    break
                if (entry := _parse(line)) is not None:
                    self._offsets[entry[0]] = offset
                offset += len(line)
        return offset

    def _recorded(self, key: bytes) -> Reply | None:
        offset = self._offsets.get(key)
        if offset is None:
            return None
        with self._lock:
            self._file.seek(offset)
            entry = _parse(self._file.readline())
        return entry[1] if entry and entry[0] == key else None

    def _record(self, key: bytes, reply: Reply) -> Reply:
        entry: dict[str, Any] = {"request": key.hex(), "text": reply.text, "truncated": reply.truncated}
        if reply.tokens:
            entry["tokens"] = [t if any(map(str.isdigit, t.text)) else (t.text, t.logprob) for t in reply.tokens]
        line = json.dumps(entry).encode() + b"\n"
        with self._lock:
            written = 0
            try:
                while written < len(line):  # a raw write may be short; append mode writes at the end
                    written += os.write(self._file.fileno(), line[written:])
            except OSError as error:
                raise disk_error(error, self._path) from error
            self._offsets[key] = self._end
            self._end += len(line)
        return reply


def _parse(line: bytes) -> tuple[bytes, Reply] | None:
    """A line's request hash and reply; None if it is damaged, in which case the request is sent again."""
    try:
        entry = json.loads(line)
        reply = Reply(entry["text"], entry["truncated"], _TOKENS.validate_python(entry.get("tokens", ())))
        key = bytes.fromhex(entry["request"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return (key, reply) if isinstance(reply.text, str) and isinstance(reply.truncated, bool) else None
