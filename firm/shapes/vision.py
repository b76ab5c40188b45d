"""What is seen in a picture of coloured shapes: its objects, and how clean it is."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from firm.shapes.scene import COLOURS, SHAPES, SIZE, Thing

VOCABULARY = (
    *COLOURS, *SHAPES, "blob", "clear", "fair", "rough", "top", "middle", "bottom", "left", "center", "right",
    ";", "nothing",
)  # fmt: skip
"""Every word that a caption can contain."""

_PALETTE = np.array(list(COLOURS.values()), np.float32)  # [4, 3]
_NEAR = 0.30  # a pixel within this distance of a palette colour has that colour
_MIN_AREA = 14  # pixels; smaller specks are not seen
_MAX_SEEN = 5  # in a noisy picture only the largest specks are reported


@dataclass(frozen=True)
class Seen:
    """One object in a picture; its shape may be "blob".

    Attributes:
        colour: One of the palette.
        shape: What it looks most like.
        clearness: Of its shape, in [0, 1].
        x: Of its centre of mass, in pixels; `y` likewise.
        size: Radius in pixels of a circle of its area, with fractions of pixels at its edge.
        box: Its rows and columns.
    """

    colour: str
    shape: str
    clearness: float
    x: float
    y: float
    size: float
    box: tuple[slice, slice]

    @property
    def thing(self) -> Thing:
        """Its colour and shape."""
        return Thing(self.colour, self.shape)

    @property
    def middle(self) -> tuple[float, float]:
        """The middle (x, y) of its box in pixels: of equal meaning for all shapes, unlike the centre of mass."""
        rows, columns = self.box
        return (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2

    @property
    def where(self) -> str:
        """The cell of a 3 x 3 grid it lies in, such as "top left"."""
        return f"{('top', 'middle', 'bottom')[_third(self.y)]} {('left', 'center', 'right')[_third(self.x)]}"

    def __str__(self) -> str:
        if self.shape == "blob":
            return f"{self.colour} blob {self.where}"
        word = "clear" if self.clearness > 0.8 else "fair" if self.clearness > 0.5 else "rough"
        return f"{self.colour} {word} {self.shape} {self.where}"


@dataclass(frozen=True)
class Observation:
    """What is seen in a picture.

    `seen` is in scan order. `noise` and `stain` are the standard deviations of the background between neighbouring
    pixels and between regions, `murk` the share of unclear pixels around the objects, `impurity` the mean distance of
    the objects' colour to the palette; all in [0, 1], except that `murk` may be larger in a noisy picture.
    """

    seen: tuple[Seen, ...]
    noise: float
    stain: float
    murk: float
    impurity: float


def pixels_of(image: Image.Image) -> np.ndarray:
    """Returns the pixels [32, 32, 3] in [0, 1] of a picture of any size and mode."""
    if image.mode != "RGB":
        image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def observe(image: Image.Image) -> Observation:
    """Finds the objects of a picture (any size and mode) and measures how clean it is; about half a millisecond."""
    pixels = pixels_of(image)
    distance = np.sqrt(((pixels[..., None, :] - _PALETTE) ** 2).sum(-1))  # [32, 32, 4]
    nearest = distance.argmin(-1)
    nearness = distance.min(-1)
    near = nearness < _NEAR
    level = np.median(pixels[~near], 0) if not near.all() else np.zeros(3)
    found: list[tuple[int, Seen]] = []
    solid = np.zeros_like(near)
    for index, colour in enumerate(COLOURS):
        mask = near & (nearest == index)
        if mask.sum() < _MIN_AREA:
            continue
        labels, _ = ndimage.label(mask)
        areas = np.bincount(labels.ravel())
        for label, box in enumerate(ndimage.find_objects(labels), start=1):
            if areas[label] >= _MIN_AREA:
                part = labels[box] == label
                solid[box] |= part
                found.append((int(areas[label]), _recognise(colour, part, box, pixels - level)))
    found = sorted(found, key=lambda item: -item[0])[:_MAX_SEEN]
    seen = sorted((item[1] for item in found), key=lambda s: (_third(s.y), s.x))
    return Observation(tuple(seen), *_cleanness(pixels, solid, nearness))


def coloured(pixels: np.ndarray, colour: str) -> np.ndarray:
    """Where [32, 32] a picture has a colour of the palette."""
    near: np.ndarray = np.sqrt(((pixels - _PALETTE[list(COLOURS).index(colour)]) ** 2).sum(-1)) < _NEAR
    return near


def blocks(values: np.ndarray) -> np.ndarray:
    """Means [8, 8, C] of the blocks of an array [32, 32, C]: noise averages out, stains do not."""
    return values.reshape(8, SIZE // 8, 8, SIZE // 8, -1).mean((1, 3))


def caption(observation: Observation) -> str:
    """Describes what was seen in scan order: "red clear circle top left ; blue blob middle right", or "nothing"."""
    return " ; ".join(map(str, observation.seen)) or "nothing"


def _third(position: float) -> int:
    return min(2, int(3 * position / SIZE))


@cache
def _templates(height: int, width: int) -> np.ndarray:
    """The three shapes [3, height, width] filling a bounding box."""
    v = ((np.arange(height) + 0.5) * 2 / height - 1)[:, None]
    u = ((np.arange(width) + 0.5) * 2 / width - 1)[None]
    triangle = abs(u) <= (v + 1) / 2 + 1 / width
    return np.stack([u**2 + v**2 <= 1, np.ones((height, width), bool), triangle])


def _recognise(colour: str, part: np.ndarray, box: tuple[slice, slice], contrast: np.ndarray) -> Seen:
    """Names the shape that overlaps best with a part of the picture [height, width]."""
    height, width = part.shape
    templates = _templates(height, width)
    union = (templates | part).sum((1, 2))
    overlap = (templates & part).sum((1, 2)) / union
    best = int(overlap.argmax())
    stretch = max(width / height, height / width)
    # Graded on purpose: a small critic cannot learn a sharp threshold of the overlap.
    clearness = np.clip((overlap[best] - 0.55) / 0.33, 0, 1) * np.clip((1.9 - stretch) / 0.4, 0, 1)
    ys, xs = part.nonzero()
    x = xs.mean() + 0.5 + box[1].start
    y = ys.mean() + 0.5 + box[0].start
    shape = SHAPES[best] if clearness > 0.25 else "blob"
    return Seen(colour, shape, float(clearness), float(x), float(y), _size(part, box, contrast), box)


def _size(part: np.ndarray, box: tuple[slice, slice], contrast: np.ndarray) -> float:
    """Radius of a circle of a part's area; pixels at its edge count as much as they are covered."""
    edge = np.zeros(contrast.shape[:2], bool)
    edge[box] = part
    edge = ndimage.binary_dilation(edge, np.ones((3, 3), bool))
    full = contrast[box][part].mean(0)
    covered = contrast[edge] @ full / max(float(full @ full), 1e-6)
    return float(np.sqrt(covered.clip(0, 1).sum() / np.pi))


def _cleanness(pixels: np.ndarray, solid: np.ndarray, nearness: np.ndarray) -> tuple[float, float, float, float]:
    """Measures noise, stain, murk and impurity, see `Observation`."""
    around = ndimage.binary_dilation(solid, iterations=3)
    ground = pixels[~around]  # [N, 3]
    level = np.median(ground, 0) if len(ground) else np.full(3, 0.5, np.float32)
    flat = np.where(around[..., None], level, pixels)
    pairs = ~(around[:, 1:] | around[:, :-1])
    steps = (pixels[:, 1:] - pixels[:, :-1])[pairs]
    noise = float(steps.std() / 2**0.5) if len(steps) else 0.0
    stain = float(np.sqrt(((blocks(flat) - level) ** 2).mean()))
    # The first pixel outside an object may be half covered by its edge; what is unclear beyond it is blur or smear.
    beyond = around & ~ndimage.binary_dilation(solid)
    unclear = beyond & (nearness > _NEAR) & (np.sqrt(((pixels - level) ** 2).sum(-1)) > 0.12 + 2.5 * noise)
    murk = float(unclear.sum() / max(solid.sum(), 1))
    impurity = float(nearness[solid].mean()) if solid.any() else 1.0
    return noise, stain, murk, impurity
