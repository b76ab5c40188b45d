"""GPUs: whether those are there that were asked for. Nothing that asks for a GPU falls back to the CPU in silence."""

from __future__ import annotations

import re

from firm.records import UserError

ASKED = "FIRM_GPUS"
"""Environment variable of a worker: how many GPUs its machine or pod is to have."""


def check_gpus(asked: int) -> None:
    """Check that so many GPUs can be seen and used from this process; more are fine, and 0 asks for none.

    Raises:
        UserError: They cannot; where the driver is too old for torch, both versions are named.
    """
    if not asked:
        return
    import torch

    where = f"{asked} GPU{'s' if asked > 1 else ''} asked for"
    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not seen:
        try:
            torch.cuda.init()  # says why
        except (RuntimeError, AssertionError) as error:
            raise _unusable(str(error), where) from error
    if seen < asked:
        fix = "ask for as many as there are, or look at CUDA_VISIBLE_DEVICES and `nvidia-smi`"
        raise UserError(f"only {seen} GPU{'s' if seen != 1 else ''} can be seen", where, fix)


def gpu_memory() -> int | None:
    """Bytes of memory of the first GPU; None where none can be used."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def _unusable(said: str, where: str) -> UserError:
    import torch

    built = torch.version.cuda or "no CUDA"
    if found := re.search(r"driver .*too old \(found version (\d+)\)", said):
        driver = f"{int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}"
        what = f"the GPU driver is one for CUDA {driver}, too old for torch of CUDA {built}"
        fix = "update the driver, or install torch for its CUDA (images: docs/operations.md)"
        return UserError(what, where, fix)
    reason = said.strip().partition("\n")[0]
    fix = "look at `nvidia-smi`; on a cluster, at the node's device plugin"
    return UserError(f"no GPU can be used: {reason} (torch is built for {built})", where, fix)
