"""Training jobs: what a stage asks for, and how a worker gets it.

sft and rl do not train in their own process: they describe a job, and a launcher runs ``python -m <module> <uri>`` on
one or more workers, here or on a cluster. The URI is where this attempt of the stage writes; ``work/job.json`` there
has the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firm.config.data_path import is_remote
from firm.records import ArtifactRef, UserError
from firm.storage.artifacts import WORK, Output
from firm.storage.files import DISK_FAULTS, disk_error, is_full, os_error
from firm.storage.inputs import Inputs
from firm.storage.open import open_store

JOB = f"{WORK}/job.json"
ERROR = f"{WORK}/error.json"
TERMINATED = 143
UNSAID = 74
"""Exit code of a worker whose error could not be written because the store is full; its log has it."""


def cannot_write(stage: str, where: str) -> UserError:
    """The error of a job that ended with `UNSAID`."""
    fix = "free some space and run again to resume"
    return UserError(f"disk full: the {stage} job cannot write, not even why", where, fix)


Train = Callable[[dict[str, Any], Mapping[str, Path], Output], None]


@dataclass(frozen=True)
class TrainingJob:
    """A job of one stage of a run.

    Attributes:
        run: Name of the run.
        stage: "sft" or "rl".
        module: The worker, run with ``python -m``.
        request: The worker's argument, plain JSON.
        inputs: Name -> artifact, fetched where the job runs.
        reads: Input -> start of the paths that are fetched of it, or several, where that is not all.
        streams: Inputs that are read where they are: of one in a remote store nothing is fetched.
    """

    run: str
    stage: str
    module: str
    request: dict[str, Any]
    inputs: Mapping[str, ArtifactRef]
    reads: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    streams: Sequence[str] = ()


def worker_error(uri: str) -> UserError | None:
    """The error that a worker of the job at ``uri`` left, if any."""
    store = open_store(uri)
    return UserError(**json.loads(store.get(ERROR))) if store.exists(ERROR) else None


def worker_main(train: Train) -> None:
    """Main function of a worker: runs ``train(request, inputs, out)`` and hands a UserError to the launcher.

    One process per machine opens the output and fetches the inputs; the others use the same folders. Only the first
    failing rank is reported, unless rank 0 fails too. It ends at once, though threads may store what is then of no use.
    """
    from firm import dist, lifeline  # torch: only workers pay for it

    uri = sys.argv[1]
    lifeline.exit_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # the first process of a container ignores it
    try:
        ranks = dist.start()
        out, request, inputs = _open(uri)
        train(request, inputs, out)
        if ranks.is_main:
            out.hand_over()
    except (Exception, SystemExit) as problem:
        code = 1
        try:
            code = _explain(problem, uri)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # Python itself would wait for a checkpoint's upload
    finally:
        dist.stop()


def _explain(problem: Exception | SystemExit, uri: str) -> int:
    """Say why a worker ends, to the launcher or in the log; returns the exit code."""
    if isinstance(problem, SystemExit):
        return problem.code if isinstance(problem.code, int) else 1
    if isinstance(problem, UserError):
        return _leave(problem, uri)
    traceback.print_exception(problem)
    fault = os_error(problem)
    if fault is None or fault.errno not in DISK_FAULTS:
        return 1
    return _leave(disk_error(fault, fault.filename or uri), uri)


def _leave(error: UserError, uri: str) -> int:
    """Leave an error for the launcher; returns the exit code."""
    store = open_store(uri)
    fields = {"what": error.what, "where": error.where, "fix": error.fix, "usage": error.usage}
    try:
        if int(os.environ.get("RANK", "0")) == 0 or not store.exists(ERROR):
            store.put(ERROR, json.dumps(fields).encode())
    except UserError as unsaid:
        sys.stderr.write(f"error: {error}\n")
        return UNSAID if is_full(os_error(unsaid)) else error.exit_code
    return error.exit_code


def _open(uri: str) -> tuple[Output, dict[str, Any], Inputs]:
    from firm import dist
    from firm.storage.parts import place_of

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0

    def open_here(out: Output) -> tuple[Output, dict[str, Any], Inputs]:
        job = json.loads((out.folder / JOB).read_text())
        refs = {name: ArtifactRef(**ref) for name, ref in job["inputs"].items()}
        nothing = {name: () for name in job["streams"] if is_remote(refs[name].uri)}
        reads = {name: start if isinstance(start, str) else tuple(start) for name, start in job["reads"].items()}
        inputs = Inputs(refs, {**reads, **nothing})
        for name in inputs:
            inputs[name]  # fetched and verified, of what is streamed the sizes
        return out, job["request"], inputs

    opened = open_here(Output.open(uri, left=lambda name: place_of(name) is not None)) if first else None
    dist.barrier()
    return opened or open_here(Output.attach(uri))
