"""Runs one stage of a pipeline: finds its artifact, resumes or reuses it, and reports.

A stage's artifact lives at ``{store}/{run name}/{stage}-{key}``, where the key is a hash of the stage's configuration
sections and inputs. The same work is therefore found again after a kill, on a retry and in the next run. What travels
through the pipeline is a small pointer file (:class:`firm.records.ArtifactRef`); see docs/decisions/0002.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Protocol

from firm import __version__, lifeline
from firm.config import RunConfig, StageName, fingerprint, for_stage
from firm.config.data_path import is_remote
from firm.config.launch import LocalLaunch, for_pod
from firm.config.loading import check_for_cluster, data_files, of_round, parse_config
from firm.config.section import NamedFile, Section
from firm.critics.rubrics import check_rubrics, load_rubric
from firm.gpus import check_gpus
from firm.locate import model_path, source_of
from firm.progress import ROUND, emit
from firm.records import ArtifactRef, Stage, Summary, UserError
from firm.storage.artifacts import TIMING, WORK, Output
from firm.storage.claims import claim
from firm.storage.digests import content_hash
from firm.storage.files import atomic_write, disk_error
from firm.storage.given import given
from firm.storage.inputs import Inputs, open_input, read_ref, write_ref
from firm.storage.notes import noted
from firm.storage.open import open_store

SUMMARY = "summary.json"


class Run(Protocol):
    """What ``firm.<stage>.run`` provides."""

    STAGE: Stage

    def run(self, config: RunConfig, inputs: Inputs, out: Output) -> Summary:
        """Do the stage's work: read input folders, write into ``out.folder``."""


def execute(
    stage: StageName,
    config: Mapping[str, Any],
    inputs: Mapping[str, str | None],
    output: str,
    log_metric: Callable[[str, float], None] | None = None,
    copies: Mapping[str, str] | None = None,
    log_matrix: Callable[[list[str], list[list[int]]], None] | None = None,
    pod: Mapping[str, Any] | None = None,
    number: int = 1,
    gpus: str = "0",
) -> None:
    """Run ``firm.<stage>.run`` unless its artifact exists already. Body of every pipeline component.

    Args:
        stage: Package of the stage, such as "curation".
        config: The run's configuration as plain JSON.
        inputs: Name -> pointer file of each input artifact, None for one that there is not.
        output: Where to write the pointer file of this stage's artifact.
        log_metric: Called with each headline number, for the KFP UI.
        copies: File of the artifact -> path to copy it to, for the KFP UI.
        log_matrix: Called with the categories and counts of the stage's confusion matrix, for the KFP UI.
        pod: Resources and scheduling requested of KFP, for the pods of the stage's job (`kfp.dsl.TaskConfig`).
        number: The round, counted from 1.
        gpus: GPUs that this step has asked for, as text.

    Raises:
        SystemExit: With code 1 or 2 after a message for people; nothing already written is lost.
    """
    lifeline.exit_with_parent()
    os.environ[ROUND] = str(number)
    emit(stage=stage, state="started")
    with failing_with_a_message(stage, output):
        check_gpus(int(gpus))
        run = _config(stage, config, number, pod or {})
        with noted(run.store, stage if number == 1 else f"{stage}-{number}") as note:
            folder, state, uri = _execute(_module(stage), run, inputs, Path(output), tuple(copies or ()))
            note |= {"state": state, "uri": uri}
        summary = read_summary(folder)
        for name, path in (copies or {}).items():
            shutil.copyfile(folder / name, path)
    if log_metric:
        for name, value in summary.metrics.items():
            log_metric(name, value)
    if log_matrix and summary.confusion:
        log_matrix(summary.confusion.categories, summary.confusion.counts)
    emit(stage=stage, state=state, metrics=summary.metrics)


@contextmanager
def failing_with_a_message(stage: str, where: str) -> Iterator[None]:
    """Turn a failure of a step into its message in the log and in the run's progress.

    Raises:
        SystemExit: With code 1 or 2, for a `UserError` or OSError; ``where`` stands for a file that the latter lacks.
    """
    try:
        yield
    except (UserError, OSError) as problem:
        error = disk_error(problem, problem.filename or where) if isinstance(problem, OSError) else problem
        emit(stage=stage, state="failed", message=str(error), exit_code=error.exit_code)
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(error.exit_code) from problem
    except Exception:
        emit(stage=stage, state="failed", message=traceback.format_exc(limit=-3), exit_code=1)
        raise


def _module(stage: str) -> Run:
    module: Run = importlib.import_module(f"firm.{stage}.run")
    return module


def _config(stage: StageName, plain: Mapping[str, Any], number: int, pod: Mapping[str, Any]) -> RunConfig:
    """The configuration as a stage sees it in a round, with what was requested of KFP for the pods of a job."""
    config = parse_config(plain)
    if not _module(stage).STAGE.compares:
        config = of_round(config, number)
    config = for_stage(config, stage)
    check_rubrics(config)
    return config.model_copy(update={"launch": for_pod(config.launch, pod)})


def _execute(
    module: Run, config: RunConfig, inputs: Mapping[str, str | None], output: Path, copied: tuple[str, ...]
) -> tuple[Path, Literal["finished", "reused"], str]:
    """Make or find the artifact of a stage; returns a local folder with what is read here, which of both, and the URI.

    All files are there and as long as they were; what is read has the right hash. Who reads the rest checks that, too.
    """
    refs = {name: read_ref(Path(path)) for name, path in inputs.items() if path}
    if "KFP_POD_NAME" in os.environ:
        check_for_cluster(config)
        if not refs:
            _find_data(config)
    key = stage_key(module.STAGE, config, refs)
    uri = f"{config.store.rstrip('/')}/{config.name}/{module.STAGE.name}-{key[:12]}"
    launches = module.STAGE.worker is not None
    with claim(uri, in_place=launches and not isinstance(config.launch, LocalLaunch)) as place:
        if (ref := place.artifact) is None:
            out = Output.open(place.uri, small_only=launches)
            ref = place.settle(_make(module, config, refs, key, out))
    Output.attach(ref.uri).discard(WORK)
    folder = open_input(ref, only=(SUMMARY, *copied))
    write_ref(ref, output)
    return folder, "reused" if place.artifact else "finished", ref.uri


def _find_data(config: RunConfig) -> None:
    """Look for all data that a run names in S3 or on the hub, so that what is missing ends it in its first stage."""
    for _, file in data_files(config):
        if is_remote(file.path):
            given(file.path).fetch()


def _make(module: Run, config: RunConfig, refs: Mapping[str, ArtifactRef], key: str, out: Output) -> ArtifactRef:
    start = time.monotonic()
    summary = module.run(config, Inputs(refs, module.STAGE.reads), out)
    with atomic_write(out.folder / SUMMARY) as file:
        file.write(summary.model_dump_json(indent=1).encode())
    hashes = {source: ref.sha256 for source, ref in refs.items()}
    ref = out.commit(module.STAGE.name, key, hashes, {"version": __version__}, out.files())
    seconds = round(time.monotonic() - start, 1)
    open_store(out.uri).put(TIMING, json.dumps({"seconds": seconds}).encode())
    return ref


def stage_key(stage: Stage, config: RunConfig, refs: Mapping[str, ArtifactRef]) -> str:
    """Hash of everything the stage's result depends on: its sections, the user's files they name, its inputs."""
    plain = config.model_dump(mode="json")
    parts = dict[str, Any]()
    rubrics = dict[str, str]()
    files = dict[str, str]()
    for name in stage.sections:
        *above, last = name.split(".")
        parent: Section | None = reduce(getattr, above, config)
        if parent is None:
            parts[name] = None
            continue
        value = getattr(parent, last)
        within = reduce(lambda node, key: node[key], above, plain)
        parts[name] = within.get(last, value)  # a property, such as reward.dimensions
        if not isinstance(value, Section):
            rubrics |= _rubrics(parent)
            continue
        for key, section in value.walk(name):
            rubrics |= _rubrics(section)
            files |= {f"{key}.{file.key}": _content(file, f"{key}.{file.key}") for file in section.named_files()}
    inputs = {name: ref.sha256 for name, ref in refs.items()}
    return fingerprint([stage.name, __version__, parts, files, rubrics, inputs])


def _rubrics(section: Section) -> dict[str, str]:
    """Name -> version, which changes with every edit."""
    return {rubric.name: load_rubric(rubric.name).version for rubric in section.named_rubrics()}


def _content(file: NamedFile, key: str) -> str:
    """Hash of the content of a file or folder; a hub id and the name of code without a source stand for themselves."""
    if file.is_code:
        source = source_of(file.path)
        return content_hash(source, suffix=".py") if source else file.path
    if not file.is_model:
        return given(file.path).content_hash(file.follow)
    path = model_path(file.path, key)
    return content_hash(Path(path)) if Path(path).is_dir() else path


def read_summary(folder: Path) -> Summary:
    """The summary in an artifact's folder."""
    return Summary.model_validate_json((folder / SUMMARY).read_text())
