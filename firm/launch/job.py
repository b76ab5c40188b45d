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
from collections.abc import Callable, Sequence
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


def work(train: Callable[[dict[str, Any], Path], None]) -> None:
    """Main function of a worker: ``train(request, folder)``, its UserError handed to the launcher.

    Only the first rank to fail is heard, unless rank 0 fails too.
    """
    from firm import dist, lifeline  # torch: only workers pay for it

    path = Path(sys.argv[1])
    lifeline.hold()
    try:
        train(json.loads(path.read_text()), path.parent)
    except UserError as error:
        failure = path.parent / ERROR_FILE
        if int(os.environ.get("RANK", "0")) == 0 or not failure.exists():
            fields = {"what": error.what, "where": error.where, "fix": error.fix, "usage": error.usage}
            failure.write_text(json.dumps(fields))
        raise SystemExit(error.exit_code) from error
    finally:
        dist.stop()
