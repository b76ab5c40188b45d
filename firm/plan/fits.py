"""Whether a run fits on the GPUs that it will get."""

from __future__ import annotations

from collections.abc import Collection

from firm.config import RunConfig, StageName
from firm.plan.assumptions import GB, Assumptions, StagePlan
from firm.plan.stages import Planner
from firm.progress import log_line
from firm.records import UserError

RESERVED = 2 * GB
"""What CUDA itself, its libraries and fragments want of a GPU beside the tensors that are planned."""


def check_fits(config: RunConfig, stages: Collection[StageName], card: float) -> None:
    """Check that every stage of the first round fits.

    A run that cannot be planned here is let through, with a line in the log.

    Args:
        config: The run.
        stages: Those that matter.
        card: Bytes of a GPU's memory.

    Raises:
        UserError: A stage needs more; names it, its fullest moment and what fills it.
    """
    try:
        plans = Planner(config, Assumptions()).stages()
    except Exception as error:  # a plan goes through classes of models, which raise anything, and is no reason to stop
        return log_line(f"not planned whether the run fits on its GPUs: {error}")
    for plan in plans:
        if plan.stage in stages and plan.bytes_a_gpu + RESERVED > card:
            raise _too_large(plan, card)


def _too_large(plan: StagePlan, card: float) -> UserError:
    assert plan.fullest is not None  # it has memory
    parts = sorted(plan.fullest.memory.items(), key=lambda part: -part[1])[:2]
    filled = ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)
    what = (
        f"{plan.stage} needs {plan.bytes_a_gpu / GB:.1f} GB of a GPU for tensors while {plan.fullest.name} ({filled}) "
        f"and {RESERVED / GB:.0f} for CUDA, and a GPU has {card / GB:.0f}"
    )
    fix = (
        "lower batch sizes, shard or checkpoint more (`firm plan` shows what helps), or set launch.gpu_memory_gb higher"
    )
    return UserError(what, "launch.gpu_memory_gb", fix, usage=True)
