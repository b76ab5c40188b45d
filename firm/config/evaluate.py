"""Evaluation before and after RL."""

from __future__ import annotations

from pydantic import PositiveInt

from firm.config.section import Positive, Section


class EvaluateConfig(Section):
    """Held-out prompts before and after RL, with the same seeds."""

    suite: str = "held_out"  # a name in firm.evaluate.suite.SUITES
    num_images: PositiveInt = 256
    num_inference_steps: PositiveInt = 40
    guidance_scale: Positive = 1.0
    base_guidance_scale: Positive | None = None  # if set, the base is sampled with this guidance as well, as users do
    batch_size: PositiveInt = 8
    num_bootstrap: PositiveInt = 1000
