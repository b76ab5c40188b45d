"""Text and JSON from outside: read within limits, refused by name where it is not what it should be."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from firm.records import UserError

MAX_BYTES = 2**27
"""Most that a file of prompts or candidates may hold: it is read as a whole."""
MAX_VALUES = 2**19
"""Most lines of such a file, and most values of a JSON text: an empty list, of three bytes, takes eighty in memory."""
MAX_CHARS = 10_000
"""Most characters of a prompt."""
_JSON_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")  # control characters, half surrogate pairs


def read_text(path: Path, what: str, fix: str = "check the path", name: str = "") -> str:
    """Text of a user's file of ``what``, without a byte order mark.

    ``name`` is how messages call the file, where that is not its path.

    Raises:
        UserError: It cannot be read, has too many bytes or lines, or is no UTF-8 text (exit code 2).
    """
    name = name or str(path)
    try:
        if not path.is_file():  # a pipe or a device might never end
            fault = "it is a folder or device" if path.exists() else "No such file or directory"
            raise UserError(f"cannot read {what}: {fault}", name, fix, usage=True)
        if (size := path.stat().st_size) > MAX_BYTES:
            fault = f"the file has {size} bytes, more than {MAX_BYTES}"
            raise UserError(f"cannot read {what}: {fault}", name, "give a smaller file", usage=True)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {what}: {error.strerror}", name, fix, usage=True) from error
    except UnicodeDecodeError as error:
        raise UserError("the file is not UTF-8 text", name, "save it as UTF-8", usage=True) from error
    if text.count("\n") > MAX_VALUES:
        fault = f"the file has more than {MAX_VALUES} lines"
        raise UserError(f"cannot read {what}: {fault}", name, "give a smaller file", usage=True)
    if "\0" in text:
        raise UserError("the file holds zero bytes, so it is not UTF-8 text", name, "save it as UTF-8", usage=True)
    return text


def most_values(text: str | bytes | bytearray) -> int:
    """How many values JSON can have, before any is made: each is the first of all, of a list or object, or has a comma.

    Commas and brackets within strings count as well.
    """
    if isinstance(text, str):
        return 1 + sum(map(text.count, ",[{"))
    return 1 + sum(map(text.count, b",[{"))


def parse_json(text: str, where: str, fix: str) -> Any:
    """The value of a JSON text.

    Raises:
        UserError: It is none, too deeply nested, or has too many values or a number of too many digits (exit code 2).
    """
    if most_values(text) > MAX_VALUES and most_values(_JSON_STRING.sub("", text)) > MAX_VALUES:
        raise UserError(
            f"JSON of more than {MAX_VALUES} values", where, "give less, or JSONL of more lines", usage=True
        )
    try:
        return json.loads(text)
    except RecursionError as error:
        raise UserError("not valid JSON: it is nested too deeply", where, fix, usage=True) from error
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where, fix, usage=True) from error


def check_text(text: str, where: str) -> None:
    """Check that a text is one for people, such as a prompt.

    Raises:
        UserError: It is very long, or has control characters or half a surrogate pair (exit code 2).
    """
    if len(text) > MAX_CHARS:
        what = f"a text of {len(text)} characters, more than {MAX_CHARS}: {text[:60]!r}..."
        raise UserError(what, where, "shorten it; if it is several, give one a line", usage=True)
    if found := _NO_TEXT.search(text):
        what = f"a text with the character {found[0]!r}, which is none for people"
        raise UserError(what, where, "remove it", usage=True)
