"""What images from outside may be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from firm.config.section import Section

if TYPE_CHECKING:
    from firm.images import Limits


class ImagesConfig(Section):
    """Limits of the images that files and functions give; one beyond them is refused by its name."""

    max_pixels: int = Field(default=2**24, ge=1, le=2**26)  # width times height
    max_aspect: float = Field(default=16.0, ge=1, le=200)  # longer side over shorter; critics' processors end at 200

    @property
    def limits(self) -> Limits:
        """For the functions that read images."""
        from firm.images import Limits

        return Limits(self.max_pixels, self.max_aspect)
