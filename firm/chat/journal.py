"""Chats that remember their answers, so that no judge is asked twice whatever happens to a stage in between."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

from pydantic import TypeAdapter

from firm.chat.client import open_chat
from firm.chat.messages import Chat, ChatMessage, Reply, RequestFailed, Token
from firm.config import ChatConfig
from firm.records import UserError
from firm.storage.files import disk_error
from firm.storage.lines import report_damage, seal, unseal

OpenChat = Callable[[str, ChatConfig], Chat]
"""(role of a judge, its configuration) -> the chat to ask, which may remember what it has answered."""
_TOKENS = TypeAdapter(tuple[Token, ...])


def forgetful(_role: str, config: ChatConfig) -> Chat:
    """An `OpenChat` without memory."""
    return open_chat(config)


class Journals:
    """An `OpenChat` that remembers: ``with Journals(folder) as open_chat``. It closes what it has opened.

    Args:
        folder: Keeps the answers of each role. Processes that work at the same time need folders of their own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: list[Journal] = []
        self._closing = ExitStack()

    def __call__(self, role: str, config: ChatConfig) -> Chat:
        """The chat of a role."""
        chat = open_chat(config)
        with ExitStack() as closing:
            closing.callback(chat.close)
            journal = Journal(chat, self._folder / f"{role}.jsonl")
            closing.pop_all()
        self._closing.callback(journal.close)
        self._closing.callback(chat.close)  # before its journal, which keeps what is still answered
        self._open.append(journal)
        return journal

    def forget(self) -> None:
        """Forget all answers, once a checkpoint has what was made of them; else journals grow with the run."""
        for journal in self._open:
            journal.forget()

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_error: object) -> None:
        self._closing.close()


class Journal:
    """Wraps a `Chat` with an append-only JSONL file of answers.

    A line holds a checksum, the SHA-256 of a request (judge, messages and options: the number of a sample or a try is
    their seed), the answer, whether it was truncated and its tokens, if there are any; only hashes and file offsets are
    kept in memory. What might have stood in the place of a
    token is kept for digits only: nobody reads the rest, which would make lines a hundred times longer. Failed requests
    are not recorded. Each line reaches the operating system before the answer is returned, so that ``kill -9`` loses at
    most requests in flight; a torn last line is dropped. A damaged line is dropped and counted, and what it answered is
    asked again.

    Args:
        chat: Asked when the journal has no answer.
        path: The file; it and its folder are created if missing.

    Attributes:
        dropped: How many damaged lines were found so far.

    Raises:
        UserError: Another process, or another Journal in this process, has the file open.
    """

    def __init__(self, chat: Chat, path: str | Path) -> None:
        self.name = chat.name
        self._path = path
        self._chat = chat
        self._lock = threading.Lock()
        self._offsets: dict[bytes, int] = {}
        self.dropped = 0
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
        report_damage(path, self.dropped)

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

    def forget(self) -> None:
        """Forget all answers."""
        with self._lock:
            self._offsets.clear()
            self._file.truncate(0)
            self._end = 0

    def close(self) -> None:
        """Close the file and release its lock; what is asked or answered from then on is a `RequestFailed`."""
        with self._lock:
            self._file.close()

    def _check_open(self) -> None:
        if self._file.closed:
            raise RequestFailed("the journal of answers is closed, as its stage has ended")

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
                else:
                    self.dropped += 1
                offset += len(line)
        return offset

    def _recorded(self, key: bytes) -> Reply | None:
        with self._lock:
            self._check_open()
            offset = self._offsets.get(key)
            if offset is None:
                return None
            self._file.seek(offset)
            entry = _parse(self._file.readline())
            if entry is None or entry[0] != key:  # damaged since it was read first
                self.dropped += self._offsets.pop(key, None) is not None
                return None
        return entry[1]

    def _record(self, key: bytes, reply: Reply) -> Reply:
        entry: dict[str, Any] = {"request": key.hex(), "text": reply.text, "truncated": reply.truncated}
        if reply.tokens:
            entry["tokens"] = [t if any(map(str.isdigit, t.text)) else (t.text, t.logprob) for t in reply.tokens]
        line = seal(json.dumps(entry).encode())
        with self._lock:
            self._check_open()
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
        entry = json.loads(unseal(line) or b"")
        reply = Reply(entry["text"], entry["truncated"], _TOKENS.validate_python(entry.get("tokens", ())))
        key = bytes.fromhex(entry["request"])
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return (key, reply) if isinstance(reply.truncated, bool) else None
