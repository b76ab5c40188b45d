"""Training jobs and the launcher for this machine.

sft and rl do not train in their own process: they describe a job, and a launcher runs ``python -m <module>`` on one or
more workers. A worker gets one argument, the path of a JSON file with its request.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firm.config import LaunchConfig
from firm.records import UserError

ERROR_FILE = "error.json"


@dataclass(frozen=True)
class TrainingJob:
    """A job: ``module`` is the worker, ``request`` what it reads, ``folder`` where it works and writes."""

    name: str
    module: str
    request: dict[str, Any]
    folder: Path


def launch(job: TrainingJob, config: LaunchConfig) -> None:
    """Run a job to its end.

    Raises:
        UserError: The job failed; says what the worker said, or how it died.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    error_file = job.folder / ERROR_FILE
    error_file.unlink(missing_ok=True)
    request = job.folder / "request.json"
    request.write_text(json.dumps(job.request, indent=1, sort_keys=True))
    process = subprocess.Popen(_command(job.module, request, config.num_workers))
    code = _wait(process)
    if error_file.exists():
        raise UserError(**json.loads(error_file.read_text()))
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"the {job.name} job {how}", job.module, "see the log above; run again to resume")


def _command(module: str, request: Path, num_workers: int) -> Sequence[str]:
    if num_workers == 1:
        return [sys.executable, "-m", module, str(request)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_workers}"]
    return [sys.executable, *torchrun, "-m", module, str(request)]


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Wait; pass a termination on to the job, so that none is left behind."""
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def worker_request() -> tuple[dict[str, Any], Path]:
    """In a worker: the request and the job's folder."""
    path = Path(sys.argv[1])
    return json.loads(path.read_text()), path.parent


def report_failure(error: UserError, folder: Path) -> None:
    """In a worker: leave the error where the launcher finds it. Only the first rank to fail is heard."""
    if int(os.environ.get("RANK", "0")) == 0 or not (folder / ERROR_FILE).exists():
        fields = {"what": error.what, "where": error.where, "fix": error.fix, "usage": error.usage}
        (folder / ERROR_FILE).write_text(json.dumps(fields))
