"""Seeds. Randomness is passed, never global: every draw has a seed made of the run's seed and the draw's purpose."""

from __future__ import annotations

import hashlib
import json


def seed_for(seed: int, *purpose: str | int) -> int:
    """Seed in [0, 2**63) for one purpose, for example ``seed_for(0, "noise", epoch, index)``."""
    text = json.dumps([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
