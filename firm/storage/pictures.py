"""Images that users name: in files of this machine, in S3, on the hub, or in the name itself."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from firm.config.data_path import is_remote, split_pin
from firm.images import ANY, Limits, decode_image, encode_image, head_size
from firm.records import UserError
from firm.storage.files import sha256
from firm.storage.given import changed, open_remote


def read_image(image: Path | str, where: str, limits: Limits | None = None) -> bytes:
    """A user's image as PNG bytes.

    Args:
        image: Its path or URI (`firm.config.data_path`), or a data URL that holds it.
        where: Where it is named, for the message.
        limits: What it may be; without, the most that a configuration may allow.

    Raises:
        UserError: It cannot be read, is not what it is pinned to, or is no intact still image within the limits (exit
            code 2).
    """
    return encode_image(open_image(image, where, limits))


def open_image(image: Path | str, where: str, limits: Limits | None = None) -> Image.Image:
    """A user's image as a fully loaded RGB image; arguments and errors are those of :func:`read_image`."""
    limits = limits or ANY
    data = _read(image, where, limits)
    try:
        return decode_image(data, where, limits)
    except UserError as error:
        raise UserError(error.what, error.where, error.fix, usage=True) from error


def image_size(image: Path | str, where: str, limits: Limits | None = None) -> tuple[int, int]:
    """Width and height of a user's image, by the head of its file, before it is turned upright.

    Arguments and errors are those of :func:`read_image`.
    """
    with _open(image, where, limits) as file:
        return head_size(file, where, limits)


def _read(image: Path | str, where: str, limits: Limits | None) -> bytes:
    with _open(image, where, limits) as file:
        try:
            data = file.read()
        except OSError as error:
            raise _unreadable(error.strerror or str(error), where) from error
    if is_remote(str(image)) and (pin := split_pin(str(image)).sha256) and sha256(data) != pin:
        raise changed("the image", where)
    return data


def _open(image: Path | str, where: str, limits: Limits | None) -> BinaryIO:
    """The encoded image, of which nothing is read before its size is known."""
    head, _, data = str(image).partition(",")
    try:
        if head.startswith("data:image/") and head.endswith(";base64"):
            return io.BytesIO(base64.b64decode(data))
        file = open_remote(split_pin(str(image)).path) if is_remote(head) else _open_file(Path(image), where)
    except OSError as error:
        raise _unreadable(error.strerror or str(error), where) from error
    except ValueError as error:
        raise UserError(f"cannot decode a data URL: {error}", where, "replace this image", usage=True) from error
    max_bytes = (limits or ANY).max_bytes
    if (size := file.seek(0, io.SEEK_END)) > max_bytes:
        file.close()
        raise _unreadable(f"its file has {size} bytes, more than {max_bytes}", where)
    file.seek(0)
    return file


def _open_file(path: Path, where: str) -> BinaryIO:
    if not path.is_file():
        raise _unreadable("it is a folder or device" if path.exists() else "No such file or directory", where)
    return path.open("rb")


def _unreadable(why: str, where: str) -> UserError:
    return UserError(f"cannot read an image: {why}", where, "correct the path, or replace this image", usage=True)
