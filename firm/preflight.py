"""Checks before a run starts, so that a slip in the configuration costs seconds and not the first stages' time."""

from __future__ import annotations

from pathlib import Path

from firm.config import FilesSource, FunctionSource, GeneratedSource, PythonChat, RunConfig
from firm.critics.rubrics import load_rubric
from firm.locate import load_object, model_path
from firm.prompts import load_prompts
from firm.records import UserError


def check(config: RunConfig) -> None:
    """Look at everything the configuration names that can be looked at without loading a model.

    Raises:
        UserError: With exit code 2, naming the key.
    """
    load_prompts(config.prompts, "train")
    load_prompts(config.prompts, "test")
    _check_model(config.policy.model, "policy.model")
    if config.critic.kind == "trained":
        _check_model(config.critic.model, "critic.model")
    for i, source in enumerate(config.curation.sources):
        key = f"curation.sources.{i}"
        if isinstance(source, GeneratedSource):
            _check_model(source.policy.model, f"{key}.policy.model")
        elif isinstance(source, FunctionSource):
            load_object(source.function, f"{key}.function")
        elif isinstance(source, FilesSource) and not Path(source.path).is_file():
            raise UserError(f"there is no file {source.path}", f"{key}.path", "check the path", usage=True)
    for chat in (config.curation.planner, config.curation.evaluator, config.auditor.judge):
        if isinstance(chat, PythonChat):
            load_object(chat.target, "target")
    teacher = (judged.rubric for judged in config.curation.dimensions.values())
    for rubric in (config.curation.planner_rubric, *teacher, *config.critic.rubrics.values()):
        load_rubric(rubric)


def _check_model(model: str, key: str) -> None:
    folder = Path(model_path(model, key))
    if folder.is_dir() and not any((folder / name).is_file() for name in ("config.json", "model_index.json")):
        fix = "a model folder has config.json or model_index.json"
        raise UserError(f"{model} is not a model folder", key, fix, usage=True)
