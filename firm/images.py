"""PNG bytes to RGB images and back."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from firm.records import UserError

FORMATS = ("PNG", "JPEG", "WEBP")  # PNG in our own shards, the others in users' files
# all that Pillow's decoders were seen to raise on damaged data
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def decode_image(png: bytes, where: str) -> Image.Image:
    """Decode bytes to a fully loaded RGB image. Reads JPEG and WebP as well.

    Args:
        png: The encoded image.
        where: File and row the bytes come from, for the message.

    Raises:
        UserError: The bytes are not an intact image.
    """
    try:
        with Image.open(io.BytesIO(png), formats=FORMATS) as image:
            return image.convert("RGB")
    except _FAULTS as error:
        what = "no data" if not png else str(error) or type(error).__name__
        raise UserError(f"cannot decode image: {what}", where, "replace or remove this image") from error


def encode_image(image: Image.Image) -> bytes:
    """Encode as an RGB PNG; equal pixels give equal bytes, as metadata (profiles, dates) are dropped."""
    plain = image.convert("RGB").copy()
    plain.info = {}
    buffer = io.BytesIO()
    plain.save(buffer, format="PNG")
    return buffer.getvalue()


def read_image(image: Path | str, where: str) -> bytes:
    """A user's image as PNG bytes.

    Args:
        image: Its file, or a data URL that holds it.
        where: Where it is named, for the message.

    Raises:
        UserError: It cannot be read, or is not an intact image (exit code 2).
    """
    return encode_image(open_image(image, where))


def open_image(image: Path | str, where: str) -> Image.Image:
    """A user's image as a fully loaded RGB image; arguments and errors are those of :func:`read_image`."""
    with _open(image, where) as file:
        data = file.read()
    try:
        return decode_image(data, where)
    except UserError as error:
        raise UserError(error.what, error.where, error.fix, usage=True) from error


def image_size(image: Path | str, where: str) -> tuple[int, int]:
    """Width and height of a user's image, by the head of its file; arguments and errors are those of `read_image`."""
    with _open(image, where) as file:
        try:
            with Image.open(file, formats=FORMATS) as head:
                return head.size
        except _FAULTS as error:
            what = f"cannot decode image: {str(error) or type(error).__name__}"
            raise UserError(what, where, "replace or remove this image", usage=True) from error


def _open(image: Path | str, where: str) -> BinaryIO:
    head, _, data = str(image).partition(",")
    in_url = head.startswith("data:image/") and head.endswith(";base64")
    try:
        return io.BytesIO(base64.b64decode(data)) if in_url else Path(image).open("rb")
    except OSError as error:
        raise UserError(f"cannot read an image: {error.strerror}", where, "correct the path", usage=True) from error
    except binascii.Error as error:
        raise UserError(f"cannot decode a data URL: {error}", where, "replace this image", usage=True) from error
