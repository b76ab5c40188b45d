"""The first step of a pipeline on a cluster: the whole configuration is checked before anything else starts.

It also finds out what the later steps need of this installation. Compiled pipelines name no Secret: the chart `firm`
says in its ConfigMap, which is this step's environment, how they are called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from firm import preflight
from firm.config import STAGES, RunConfig, StageName, for_stage, stages_of
from firm.config.loading import check_for_cluster, parse_config
from firm.launch.k8s.names import (
    ENDPOINTS_SECRET,
    ENDPOINTS_SECRET_KEY,
    GPU_TOLERATION,
    STORE_SECRET,
    STORE_SECRET_KEY,
)
from firm.records import UserError
from firm.stage import failing_with_a_message


class Installation(NamedTuple):
    """What later steps need to know.

    Attributes:
        store_secret: Secret with the keys of the object store.
        endpoints_secret: Secret with the keys of model servers and hubs; it need not exist.
        tolerations: Of the steps that run a model: none where they have no GPUs.
    """

    store_secret: str
    endpoints_secret: str
    tolerations: list[dict[str, str]]


def execute(config: Mapping[str, Any], gpus: str, rounds: int, stages: Sequence[StageName] = STAGES) -> Installation:
    """Check a run that was submitted to Kubeflow Pipelines. Body of the component `check`.

    Args:
        config: The run's configuration as plain JSON.
        gpus: GPUs of each step that runs a model itself, as text.
        rounds: Rounds of the pipeline; 0 where it is one of a single stage, which is given its inputs.
        stages: Of the pipeline.

    Raises:
        SystemExit: With code 1 or 2 after a message for people.
    """
    with failing_with_a_message("check", "config"):
        run = parse_config(config)
        _check_pipeline(run, gpus, rounds, stages)
        check_for_cluster(run)
        preflight.check(run, read_remote=False)  # this step has no keys: the first stage looks at what is elsewhere
    return Installation(
        store_secret=os.environ.get(STORE_SECRET_KEY) or STORE_SECRET,
        endpoints_secret=os.environ.get(ENDPOINTS_SECRET_KEY) or ENDPOINTS_SECRET,
        tolerations=[GPU_TOLERATION] if int(gpus) else [],
    )


def _check_pipeline(config: RunConfig, gpus: str, rounds: int, stages: Sequence[StageName]) -> None:
    if not (gpus.isascii() and gpus.isdigit()):
        raise UserError(
            f"{gpus!r} is no number of GPUs", "gpus", "give a whole number as text: gpus='\"1\"'", usage=True
        )
    if rounds and rounds != config.rounds:
        fix = f"set rounds to {rounds}, or submit the pipeline of that number of rounds (`make pipelines`)"
        what = f"the run has {config.rounds} round(s), and this pipeline {rounds}"
        raise UserError(what, "rounds", fix, usage=True)
    for stage in stages:
        for_stage(config, stage)
    if rounds and (described := stages_of(config)) != tuple(stages):
        what = f"the configuration describes {', '.join(described)}, and this pipeline runs {', '.join(stages)}"
        fix = "submit the pipeline of these stages (`make pipelines`), or add or leave out sections"
        raise UserError(what, "stages", fix, usage=True)
