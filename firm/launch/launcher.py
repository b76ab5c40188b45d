"""Chooses where a training job runs, and runs it to its end."""

from __future__ import annotations

import json

from firm.config.launch import LaunchConfig, LocalLaunch
from firm.launch import local
from firm.launch.job import ERROR, JOB, TrainingJob, worker_error
from firm.records import UserError
from firm.storage.artifacts import Output
from firm.storage.files import atomic_write


def launch(job: TrainingJob, out: Output, config: LaunchConfig) -> None:
    """Run a job to completion, unless it has completed already; then its files are part of ``out``.

    Raises:
        UserError: The job failed; carries the worker's message, or says how it died.
    """
    if out.take_over():
        return
    out.discard(ERROR)
    inputs = {name: ref.model_dump() for name, ref in job.inputs.items()}
    written = {"request": job.request, "inputs": inputs, "reads": dict(job.reads), "streams": list(job.streams)}
    with atomic_write(out.folder / JOB) as file:
        file.write(json.dumps(written, indent=1, sort_keys=True).encode())
    out.publish(JOB)
    try:
        if isinstance(config, LocalLaunch):
            local.run(job, out.uri, config)
        else:
            from firm.launch.k8s import pytorchjob  # imports the Kubernetes client

            pytorchjob.run(job, out.uri, config)
    except UserError as error:
        raise worker_error(out.uri) or error from None
    if not out.take_over():
        raise UserError(f"the {job.stage} job ended without leaving its work", out.uri, "run again to resume")
