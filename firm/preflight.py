"""Checks before a run starts, so that a slip in the configuration costs seconds and not the first stages' time."""

from __future__ import annotations

import json
from pathlib import Path

from firm.chat.client import open_chat
from firm.config import EndpointChat, FilesSource, FunctionSource, GeneratedSource, RunConfig
from firm.critics.rubrics import check_rubrics
from firm.locate import load_object, model_path
from firm.prompts import Splits, load_prompts
from firm.records import SPLITS, UserError


def check(config: RunConfig) -> None:
    """Look at everything the configuration names that can be looked at without loading a model.

    Raises:
        UserError: With exit code 2, naming the key.
    """
    for split in SPLITS:
        load_prompts(config.prompts, split)
    _check_generator(config.policy.model, "policy.model")
    if config.critic.kind == "trained":
        _kind_of_model(config.critic.model, "critic.model", "config.json", "model_type")
    _check_sources(config)
    curation, chats = config.curation, {"auditor.judge": config.auditor.judge}
    chats |= {"curation.planner": curation.planner, "curation.evaluator": curation.evaluator}
    if config.critic.endpoint is not None:
        chats["critic.endpoint"] = config.critic.endpoint
    for key, chat in chats.items():
        if isinstance(chat, EndpointChat):
            open_chat(chat)
        else:
            load_object(chat.target, f"{key}.target")
    check_rubrics(config)
    _check_gate(config)


def _check_sources(config: RunConfig) -> None:
    from firm.curation.sources import Files, count, no_candidates  # imports torch

    for i, source in enumerate(config.curation.sources):
        key = f"curation.sources.{i}"
        if isinstance(source, GeneratedSource):
            _check_generator(source.policy.model, f"{key}.policy.model")
        elif isinstance(source, FunctionSource):
            load_object(source.function, f"{key}.function")
        elif isinstance(source, FilesSource):
            Files(source, Splits(config.prompts)).check()
    for split in SPLITS:
        if not any(count(source, config.curation, config.prompts, split) for source in config.curation.sources):
            raise no_candidates(split)


def _check_gate(config: RunConfig) -> None:
    """Rules on what the bench will never measure would stop the run after the critic's training."""
    from firm.bench.agreement import METRICS  # imports scipy

    known: dict[str, list[str]] = {
        "metric": list(METRICS),
        "dimension": list(config.curation.dimensions),
        "source": [s.name for s in config.curation.sources],
    }
    for i, rule in enumerate(config.bench.gate):
        for field, values in known.items():
            if (value := getattr(rule, field)) not in (None, *values):
                fix = f"use one of {', '.join(values)}"
                raise UserError(f"unknown {field} {value!r}", f"bench.gate.{i}.{field}", fix, usage=True)


def _check_generator(model: str, key: str) -> None:
    kind = _kind_of_model(model, key, "model_index.json", "_class_name")
    if kind is not None and not kind.startswith("StableDiffusion3"):
        fix = "give the folder of a StableDiffusion3Pipeline"
        raise UserError(f"{model} is a {kind}, not a generator of the family sd3", key, fix, usage=True)


def _kind_of_model(model: str, key: str, file: str, field: str) -> str | None:
    """What a model folder says it holds; None for a hub id, which is left to the loader."""
    folder = Path(model_path(model, key))
    if not folder.is_dir():
        return None
    try:
        return str(json.loads((folder / file).read_text())[field])
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = f"{model} is not the right kind of model folder: it needs {file} with {field!r}"
        raise UserError(what, key, "give a model folder or a hub id", usage=True) from error
