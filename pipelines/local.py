"""Runs the full pipeline on this machine through Kubeflow Pipelines' own local runner."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from firm.config import RunConfig, stages_of
from firm.lifeline import LIFELINE
from firm.progress import PROGRESS_FILE
from firm.records import UserError
from firm.storage.files import disk_error
from firm.watcher import Watcher

KFP = "kfp"
"""Folder, in a run's, of what KFP's components leave."""


class StageFailed(UserError):
    """A stage ended with a message.

    Attributes:
        stage: Its name.
        message: What it said.
    """

    def __init__(self, stage: str, message: str, fix: str, usage: bool) -> None:
        super().__init__(f"{stage} failed: {message}", "", fix, usage)
        self.stage = stage
        self.message = message


def run_locally(config: RunConfig, folder: Path) -> Path:
    """Run the stages that a configuration describes in turn, showing progress; returns the report's path.

    Args:
        config: The run.
        folder: Local folder for the log, KFP's task outputs and the page.

    Raises:
        StageFailed: A stage ended with a message of its own.
        UserError: Something else failed.
    """
    from kfp import local

    from pipelines.full import pipeline_of

    stages = stages_of(config)
    log = folder / "run.log"
    os.environ |= {PROGRESS_FILE: str(folder / "progress.jsonl"), LIFELINE: str(os.getpid())}
    # Long spinning makes a run four times slower on a busy laptop; no spinning, a third slower on an idle one.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # glibc returns the memory of large tensors to the system; getting it back costs a fifth of each training step.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 * 2**20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))
    warnings.filterwarnings("ignore", module="kfp")
    expected = {str(stage): s for stage, s in config.expected_s.items()}
    watcher = Watcher(folder / "progress.jsonl", stages, expected, sys.stdout, config.rounds)
    failed = ""
    try:
        with watcher, _output_to(log):
            local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(folder / KFP))
            pipeline = pipeline_of(config.rounds, stages, on_cluster=False)
            for task in pipeline.pipeline_spec.root.dag.tasks.values():
                # Retries are for lost pods; here a failure is shown immediately and the user resumes.
                task.ClearField("retry_policy")
            pipeline(config=config.model_dump(mode="json", exclude_none=True))  # KFP has no null
    except RuntimeError as error:
        failed = str(error)
    except OSError as error:  # the log is on the disk that the stages have filled
        if watcher.failure is None:
            raise disk_error(error, error.filename or folder) from error
    if failed or watcher.failure:
        raise _failure(watcher, failed, log)
    page = folder / "report.html"
    page.write_bytes(newest(folder, "report*/page").read_bytes())
    return page


def newest(folder: Path, output: str) -> Path:
    """The newest output of a component in a run's folder, such as ``rl/policy``; ``*`` in it is anything."""
    return max((folder / KFP).glob(f"firm-*/{output}"), key=lambda path: path.stat().st_mtime)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what KFP and the stages print to a log file; the terminal belongs to the progress display."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _failure(watcher: Watcher, text: str, log: Path) -> UserError:
    event = watcher.failure
    if event is None:
        return UserError(f"the run failed: {text}", str(log), "look at the end of the log; run again to resume")
    fix = f"the log is {log}; run the same command again to resume"
    return StageFailed(event["stage"], event["message"], fix, usage=event["exit_code"] == 2)
