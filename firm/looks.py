"""What can be seen of an image without a judge: whether it is empty, or a copy of what was to be edited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from firm.images import decode_image
from firm.intervals import Floats

SIDE = 32  # cells along the longer side of an image: their means are free of noise and of single pixels
DIFFERENT = 0.15  # of a channel's range: what a decoder loses of a cell is less, an edit more
COPY = 0.005  # share of the cells that may differ between an image and its copy: 5 in 32 x 32
BLANK = 0.01  # share of the cells that may differ from the commonest colour of an empty image


@lru_cache(maxsize=8)
def cells(png: bytes) -> Floats:
    """Mean colours [h, w, 3] in [0, 1] of the cells of an image; h and w are at most `SIDE`."""
    image = decode_image(png, "an image")
    scale = min(1.0, SIDE / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image if scale == 1 else image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64) / 255


def near_copy(source: Floats, image: Floats) -> bool:
    """Whether an image [h, w, 3] is its source [h, w, 3] but for noise; images of other shapes are none."""
    return source.shape == image.shape and _share(np.abs(source - image)) <= COPY


def near_blank(image: Floats) -> bool:
    """Whether an image [h, w, 3] is one colour but for noise and specks."""
    return _share(np.abs(image - np.median(image, (0, 1)))) <= BLANK


def _share(differences: Floats) -> float:
    """Share of the cells of [h, w, 3] in which a channel differs."""
    return float((differences.max(-1) > DIFFERENT).mean())


def look(images: Sequence[bytes]) -> dict[str, float]:
    """What can be seen of a sample without a judge, 1 or 0: ``blanks``, and ``copies`` of what was edited.

    Args:
        images: PNG images: the sample, for editing behind its source.
    """
    image = cells(images[-1])
    copied = {"copies": float(near_copy(cells(images[0]), image))} if len(images) > 1 else {}
    return {"blanks": float(near_blank(image)), **copied}
