"""The launcher for this machine: torchrun, or one process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from firm.config.launch import LocalLaunch
from firm.gpus import ASKED
from firm.launch.job import UNSAID, TrainingJob, cannot_write
from firm.records import UserError
from firm.storage.claims import held_locks


def run(job: TrainingJob, uri: str, config: LocalLaunch) -> None:
    """Run a job in processes of this machine.

    Raises:
        UserError: It failed; says how.
    """
    environment = os.environ | ({ASKED: str(config.gpus)} if config.gpus else {})
    process = subprocess.Popen(_command(job.module, uri, config.num_workers), env=environment, pass_fds=held_locks())
    if code := _wait(process):
        if code == UNSAID:
            raise cannot_write(job.stage, uri)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"the {job.stage} job {how}", job.module, "see the log above; run again to resume")


def _command(module: str, uri: str, num_workers: int) -> Sequence[str]:
    if num_workers == 1:
        return [sys.executable, "-m", module, uri]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    return [sys.executable, *torchrun, "-m", module, uri]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait; pass a termination on to the job, so that no process is left behind."""
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
