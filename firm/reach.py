"""What a run needs and its configuration cannot show: GPUs, models of hubs, endpoints that answer, room on the disk.

Checked before the first stage, so that what is missing costs seconds and not the stages before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from firm.chat.client import open_chat
from firm.chat.messages import ChatMessage, RequestFailed
from firm.config import CriticConfig, EndpointChat, PolicyConfig, RunConfig, StageName, stages_of
from firm.config.launch import LaunchConfig, LocalLaunch
from firm.config.loading import of_round, parse_config
from firm.critics.judge import JudgeInput, message_of
from firm.critics.rubrics import load_rubric
from firm.disk import Need, check_disk
from firm.gpus import check_gpus, gpu_memory
from firm.hub import OutOfReachError, Weights, weights_here, weights_of_hub
from firm.images import encode_image
from firm.launch.k8s.names import MODELS
from firm.locate import model_path
from firm.model_folder import PIPELINE
from firm.plan.assumptions import GB
from firm.plan.fits import check_fits
from firm.preflight import ask_critic, at_once
from firm.prompts import load_prompts, with_source
from firm.records import Prompt, UserError
from firm.stage import failing_with_a_message
from firm.storage.artifacts import MANIFEST
from firm.storage.checkpoint import KEPT
from firm.storage.files import temporary_folder
from firm.storage.open import open_store
from firm.storage.store import LocalStore

SFT_VALUES = 3
"""float32 values that a checkpoint of sft has for each parameter: the parameter and two moments."""
RL_VALUES = 7
"""The same of rl: policy, old policy, average, best, reference, and two moments."""
JOBS: set[StageName] = {"sft", "rl"}
"""Stages that hold the GPUs of the launch."""
WITHOUT_GPU: set[StageName] = {"gate", "report"}
TEACHERS = ("planner", "reporter", "evaluator")
JUDGED: set[StageName] = {"bench", "rl", "evaluate"}
"""Stages that ask critic and auditor."""


def check(config: RunConfig, stages: Sequence[StageName] = ()) -> None:
    """Check what is left of the run needs of this machine, hubs and endpoints.

    Args:
        config: The run.
        stages: Those that there will be; by default all that the configuration describes.

    Raises:
        UserError: Something is missing; names it and its configuration key.
    """
    left = _left(config, stages or stages_of(config))
    if isinstance(config.launch, LocalLaunch) and left & JOBS:
        check_gpus(config.launch.gpus)
    if left - WITHOUT_GPU and config.launch.gpus and (card := _card(config.launch)):
        check_fits(config, left, card)
    rounds = [of_round(config, number) for number in range(1, min(config.rounds, 2) + 1)]
    weights = {model: found for each in rounds for model, found in _models(each, left)}
    check_disk(_needs(config, weights, left))
    if left & JUDGED:
        ask_critic(config)
    asked: set[tuple[str, str, int]] = set()
    for each in rounds:
        _ask_all(each, left, asked)


def execute(config: Mapping[str, Any], stages: Sequence[StageName]) -> None:
    """Check what a run on a cluster needs, where its steps run. Body of the component `reach`.

    Raises:
        SystemExit: With code 1 or 2 after a message for people.
    """
    with failing_with_a_message("reach", "config"):
        check(parse_config(config), stages)


def _card(launch: LaunchConfig) -> float | None:
    """Bytes of memory of a GPU of the run; None where nobody has said it and none can be asked."""
    if launch.gpu_memory_gb:
        return launch.gpu_memory_gb * GB
    return gpu_memory() if isinstance(launch, LocalLaunch) else None


def _left(config: RunConfig, stages: Sequence[StageName]) -> set[StageName]:
    """Stages of which no run of this name has an artifact; of several rounds all, as each makes its own."""
    store = open_store(f"{config.store.rstrip('/')}/{config.name}")

    def is_done(stage: StageName) -> bool:
        return any(name.endswith(f"/{MANIFEST}") for name, _ in store.list(f"{stage}-"))

    return {stage for stage in stages if config.rounds > 1 or not is_done(stage)}


def _users(config: RunConfig, key: str) -> set[StageName]:
    """Stages that load or ask what the configuration has at ``key``."""
    users: set[StageName] = set(JUDGED)
    if key == "critic" and config.critic.kind == "trained":
        users = {"sft"}
    elif key.startswith("curation"):
        users = {"curation"}
    elif key == "policy":
        users = {"rl", "evaluate"}
    if config.bench and any(source.kind == "policy" for source in config.bench.sources):
        # whose images it samples, and has labelled
        users |= {"bench"} if key == "policy" or key.removeprefix("curation.") in TEACHERS else set()
    return users


def _models(config: RunConfig, left: set[StageName]) -> Iterator[tuple[str, Weights]]:
    """Each model that is still to be loaded, with its weights."""
    for key, section in config.walk(""):
        if not isinstance(section, PolicyConfig | CriticConfig) or not _users(config, key) & left:
            continue
        for named in section.named_files():
            where = f"{key}.{named.key}"
            folder = Path(model_path(named.path, where))
            file = PIPELINE if isinstance(section, PolicyConfig) else "config.json"
            try:
                yield named.path, weights_here(folder) if folder.is_dir() else weights_of_hub(named.path, file, where)
            except OutOfReachError:
                if _shares_cache(config):
                    raise  # else it may be in a cache that the jobs have, and steps have not


def _shares_cache(config: RunConfig) -> bool:
    """Whether the cache of models that is seen here is the one of the stages."""
    from huggingface_hub import constants

    return isinstance(config.launch, LocalLaunch) or Path(constants.HF_HUB_CACHE).is_relative_to(MODELS)


def _needs(config: RunConfig, weights: Mapping[str, Weights], left: set[StageName]) -> Iterator[Need]:
    """What is sure to be written on this machine: downloads, and checkpoints of whole models with one in the making."""
    from huggingface_hub import constants

    if _shares_cache(config):
        cache = Path(constants.HF_HUB_CACHE)
        yield from (Need(cache, f"download of {model}", found.missing) for model, found in weights.items())
    has_begun = left != set(stages_of(config))  # and has written some of it already
    if not isinstance(config.launch, LocalLaunch) or has_begun:
        return
    store = open_store(config.store)
    work = store.root if isinstance(store, LocalStore) else temporary_folder()
    if "sft" in left and config.critic.kind == "trained":
        critic = weights[config.critic.model].below()
        values = 0 if config.sft.lora else SFT_VALUES * _floats(critic, config.critic.dtype)
        yield Need(work, "the critic and its checkpoints", (KEPT + 1) * values + critic)
    if config.rl and config.policy and config.rl.lora is None:
        policy = weights[config.policy.model].below("transformer/")
        values = RL_VALUES * _floats(policy, config.policy.dtype)
        yield Need(work, "the policy and its checkpoints", (KEPT + 1) * values + policy)


def _floats(stored: int, dtype: str) -> int:
    """Bytes of weights as float32, if they are stored in the type in which they are used."""
    return stored if dtype == "float32" else 2 * stored


def _ask_all(config: RunConfig, left: set[StageName], asked: set[tuple[str, str, int]]) -> None:
    """Ask every judge behind an endpoint a question of its own, once, as if the first prompt's image were all gray.

    Those that only stages before have asked are left alone: they may be gone by then.
    """
    rubrics = _rubrics(config)
    for key, judge in config.walk(""):
        if not isinstance(judge, EndpointChat) or key not in rubrics or not _users(config, key) & left:
            continue
        rubric = load_rubric(rubrics[key])
        known = (judge.base_url, judge.model, rubric.images)
        if known not in asked:
            asked.add(known)
            _ask(key, judge, message_of(rubric, _gray(config, rubric.images)))


def _rubrics(config: RunConfig) -> dict[str, str]:
    """Key of each judge of the run -> a rubric that it is asked with."""
    found = {}
    if curation := config.curation:
        found["curation.planner"] = curation.planner_rubric
        found["curation.reporter"] = curation.reporter_rubrics[0]
        found["curation.evaluator"] = next(iter(curation.dimensions.values())).rubric
    if config.auditor:
        found["auditor.judge"] = next(iter(config.auditor.rubrics.values()))
    endpoint = config.critic.endpoint
    if config.critic.kind == "endpoint" and endpoint and not endpoint.logprobs:  # with them `ask_critic` has asked
        found["critic.endpoint"] = next(iter(config.critic.rubrics.values()))
    return found


def _gray(config: RunConfig, num_images: int) -> JudgeInput:
    """The run's first prompt; an edit of it that changed nothing, or a gray image."""
    prompt = load_prompts(config.prompts, "train")[0] if config.prompts.given else Prompt(text="a gray square")
    side = config.policy.resolution if config.policy else 256
    image = with_source(prompt, encode_image(Image.new("RGB", (side, side), "gray")))[0]
    return JudgeInput(prompt, [image] * num_images)


def _ask(key: str, judge: EndpointChat, message: ChatMessage) -> None:
    chat = open_chat(at_once(judge))
    try:
        chat.complete([message], max_tokens=8, temperature=0.0, seed=0)
    except RequestFailed as error:
        what = f"the judge does not answer a first question: {error.detail}"
        fix = "look at the server's log: does the model take so many images, and so long a text?"
        raise UserError(what, f"{key}: {judge.model} at {judge.base_url}", fix) from error
    finally:
        chat.close()
