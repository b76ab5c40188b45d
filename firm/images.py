"""Images as a person sees them: from files, generators and requests, to RGB and PNG."""

from __future__ import annotations

import base64
import io
import struct
import warnings
import zlib
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from firm.records import UserError

PIXELATED_BELOW = 128  # pixels; smaller images are shown as the pixels they are
FORMATS = ("PNG", "JPEG", "WEBP")  # PNG in our own shards, the others in users' files
_MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "PA", "RGBA", "RGBa")
# all that Pillow's decoders were seen to raise on damaged data
_FAULTS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `Limits` are ours


class Limits(NamedTuple):
    """What an image may be.

    Attributes:
        max_pixels: Most of its pixels.
        max_aspect: Most of the longer side over the shorter one.
    """

    max_pixels: int
    max_aspect: float

    @property
    def max_bytes(self) -> int:
        """Most of its file: what 16 bits a channel need uncompressed, and metadata."""
        return 8 * self.max_pixels + 2**24


class Picture(NamedTuple):
    """An image as a page carries it: a data URL, and whether its pixels are to be seen as such."""

    uri: str
    pixelated: bool


ANY = Limits(2**26, 200)  # the most that a configuration may allow


def decode_image(data: bytes, where: str, limits: Limits | None = None) -> Image.Image:
    """Decode bytes of PNG, JPEG or WebP to a fully loaded RGB image as a person sees it.

    It is upright (EXIF), 16 bits of gray are scaled to 8, and what is transparent is white. Colour profiles are not
    applied.

    Args:
        data: The encoded image.
        where: File and row the bytes come from, for the message.
        limits: Checked by the head of the image, before anything is decoded; None where it is one of our own.

    Raises:
        UserError: The bytes are not an intact still image within the limits.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, where, limits)
            return _seen(image)
    except _FAULTS as error:
        raise _damaged(error, where) from error


def encode_image(image: Image.Image, where: str = "an image", limits: Limits | None = None) -> bytes:
    """Encode as an RGB PNG what a person sees of an image; equal pixels give equal bytes, as metadata is dropped.

    Raises:
        UserError: It is beyond the limits, or of a mode that is not shown in one way (I, F, LAB).
    """
    _check(image, where, limits)
    if image.mode not in _MODES and not image.mode.startswith("I;16"):
        raise UserError(f"an image of mode {image.mode} has no one look", where, "convert it to RGB", usage=True)
    buffer = io.BytesIO()
    try:
        _seen(image).save(buffer, format="PNG")
    except (*_FAULTS, TypeError) as error:
        raise UserError(f"cannot show image: {error}", where, "convert it to RGB", usage=True) from error
    return buffer.getvalue()


def head_size(file: BinaryIO, where: str, limits: Limits | None) -> tuple[int, int]:
    """Width and height of an encoded image by its head, before it is turned upright.

    Raises:
        UserError: It is no image, moves, or is beyond the limits (exit code 2).
    """
    try:
        with Image.open(file, formats=FORMATS) as head:
            _check(head, where, limits)
            return head.size
    except _FAULTS as error:
        raise _damaged(error, where, usage=True) from error


def picture(data: bytes, where: str, max_side: int) -> Picture:
    """An image for a page: as it is, or shrunk where its longer side has more than ``max_side`` pixels."""
    image = decode_image(data, where)
    buffer = io.BytesIO()
    if max(image.size) <= max_side:
        image.save(buffer, format="PNG")
        kind = "png"
    else:
        image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
        image.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    text = base64.b64encode(buffer.getvalue()).decode()
    return Picture(f"data:image/{kind};base64,{text}", max(image.size) < PIXELATED_BELOW)


def _damaged(error: Exception, where: str, usage: bool = False) -> UserError:
    what = str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # its text is the name of an object
        what = "it is no PNG, JPEG or WebP"
    return UserError(f"cannot decode image: {what}", where, "replace or remove this image", usage)


def _check(image: Image.Image, where: str, limits: Limits | None) -> None:
    """Check what the head of an image says."""
    width, height = image.size
    if not (width and height):
        raise UserError(f"an image of {width} x {height} pixels", where, "replace or remove this image", usage=True)
    if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
        raise UserError("an image that moves", where, "give one of its frames as a file of its own", usage=True)
    if limits and width * height > limits.max_pixels:
        what = f"an image of {width} x {height} pixels, more than {limits.max_pixels} in all"
        raise UserError(what, where, "scale it down, or raise images.max_pixels", usage=True)
    if limits and max(width, height) > limits.max_aspect * min(width, height):
        what = f"an image of {width} x {height} pixels, whose sides differ by more than {limits.max_aspect:g} times"
        raise UserError(what, where, "crop it, or raise images.max_aspect", usage=True)


def _seen(image: Image.Image) -> Image.Image:
    """A new RGB image without metadata, as a person sees this one."""
    image.load()  # a PNG may have its EXIF behind the pixels
    if image.mode == "RGB" and not image.info:
        return image.copy()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        upright = _eight_bits(upright, image.info.get("transparency"))
    if upright.mode == "La":  # Pillow converts it to no other mode
        upright = upright.convert("LA")
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        white.alpha_composite(upright.convert("RGBA"))
        upright = white
    seen = upright.convert("RGB")
    seen.info = {}
    return seen


def _eight_bits(image: Image.Image, transparent: int | None) -> Image.Image:
    """Gray of 8 bits from gray of 16, of which one value may be transparent."""
    values = np.asarray(image).astype(np.uint32)
    gray = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if transparent is not None:
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray
