"""Checks before a run starts: a mistake in the configuration costs seconds instead of the first stages' time."""

from __future__ import annotations

from firm.chat.client import open_chat
from firm.config import (
    EndpointChat,
    FilesSource,
    FunctionSource,
    GeneratedSource,
    PolicyConfig,
    PythonChat,
    RunConfig,
    ScoresSource,
)
from firm.critics.rubrics import check_rubrics
from firm.locate import kind_of_model, load_object
from firm.prompts import Splits, load_prompts
from firm.records import SPLITS


def check(config: RunConfig) -> None:
    """Check everything the configuration names that can be checked without loading a model.

    Raises:
        UserError: With exit code 2, naming the key.
    """
    for split in SPLITS:
        load_prompts(config.prompts, split)
    _check_policy(config.policy, "policy")
    if config.critic.kind == "trained":
        kind_of_model(config.critic.model, "critic.model", "config.json", "model_type")
    _check_sources(config)
    for key, section in config.walk(""):
        if isinstance(section, EndpointChat):
            open_chat(section)
        elif isinstance(section, PythonChat):
            load_object(section.target, f"{key}.target")
    _check_names(config)
    check_rubrics(config)


def _check_names(config: RunConfig) -> None:
    from firm.critics.labeller import find_labeller  # imports httpx
    from firm.evaluate.suite import find_suite  # imports torch

    find_labeller(config.curation.labeller)
    find_suite(config.evaluate.suite)


def _check_sources(config: RunConfig) -> None:
    from firm.bench.scores import ScoreFile  # imports scipy
    from firm.curation.sources import Files, count, no_candidates  # imports torch

    for i, source in enumerate(config.curation.sources):
        key = f"curation.sources.{i}"
        if isinstance(source, GeneratedSource):
            _check_policy(source.policy, f"{key}.policy")
        elif isinstance(source, FunctionSource):
            load_object(source.function, f"{key}.function")
        elif isinstance(source, FilesSource):
            Files(source, Splits(config.prompts)).check()
    for scores in config.bench.sources:
        if isinstance(scores, ScoresSource):
            ScoreFile(scores, config.critic.rubrics, Splits(config.prompts)).check()
    for split in SPLITS:
        if not any(count(source, config.curation, config.prompts, split) for source in config.curation.sources):
            raise no_candidates(split)


def _check_policy(policy: PolicyConfig, key: str) -> None:
    from firm.policies.policy import find_family  # imports torch

    find_family(policy.family, f"{key}.family").check(policy.model, f"{key}.model")
