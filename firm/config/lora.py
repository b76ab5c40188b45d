"""Low-rank adapters."""

from __future__ import annotations

from pydantic import PositiveInt

from firm.config.section import Section


class LoraConfig(Section):
    """Low-rank adapter."""

    rank: PositiveInt = 32
    alpha: PositiveInt = 64
