"""Checks before a run starts: a mistake in the configuration costs seconds instead of the first stages' time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

from PIL import Image

from firm.chat.client import open_chat
from firm.chat.messages import RequestFailed, user_message
from firm.config import (
    CurationConfig,
    EndpointChat,
    FilesSource,
    FunctionSource,
    GeneratedSource,
    PolicyConfig,
    PythonChat,
    RunConfig,
    ScoresSource,
)
from firm.config.data_path import is_remote
from firm.config.loading import of_round
from firm.critics.judge import question
from firm.critics.rubrics import check_rubrics, load_rubric
from firm.images import encode_image
from firm.locate import kind_of_model, load_object
from firm.prompts import Splits, load_prompts
from firm.records import SPLITS, Prompt, UserError

FIRST_ANSWER_S = 60.0
"""A server that gives no answer for so long before a run is not waited for any longer."""


def check(config: RunConfig, read_remote: bool = True) -> None:
    """Check everything the configuration names that can be checked without loading a model.

    Args:
        config: The run.
        read_remote: Whether data in S3 and on the hub is read, too.

    Raises:
        UserError: With exit code 2, naming the key.
    """
    for number in range(1, min(config.rounds, 2) + 1):  # all further rounds have the same configuration
        _check_round(of_round(config, number), number, read_remote)


def _check_round(config: RunConfig, number: int, read_remote: bool) -> None:
    def is_read(path: str | None) -> bool:
        return read_remote or not is_remote(path or "")

    splits = SPLITS if config.prompts.given and is_read(config.prompts.path) else ()
    prompts = [prompt for split in splits for prompt in load_prompts(config.prompts, split)]
    if config.policy:
        _check_policy(config, config.policy, "policy", prompts)
    if config.critic.kind != "endpoint":
        kind_of_model(config.critic.model, "critic.model", "config.json", "model_type")
    _check_server(config)
    check_rubrics(config)
    if config.curation:
        _check_curation(config, config.curation, number, prompts, is_read)
    _check_scores(config, is_read)
    _check_prompts(config, prompts)
    for key, section in config.walk(""):
        if isinstance(section, EndpointChat):
            open_chat(section)
        elif isinstance(section, PythonChat):
            load_object(section.target, f"{key}.target")
    _check_names(config)


def at_once(judge: EndpointChat) -> EndpointChat:
    """The same judge for a first question, for whose answer nobody waits long."""
    return judge.model_copy(update={"deadline_s": min(judge.deadline_s, FIRST_ANSWER_S), "patience_s": None})


def ask_critic(config: RunConfig) -> None:
    """Ask a served critic with logprobs for the first tokens of one answer.

    Raises:
        UserError: It cannot be asked, or its answer has no logprobs and only these can give the run's soft scores.
    """
    critic = config.critic
    if critic.kind != "endpoint" or critic.endpoint is None or not critic.endpoint.logprobs:
        return
    rubric = load_rubric(next(iter(critic.rubrics.values())))
    images = [encode_image(Image.new("RGB", (256, 256), "gray"))] * rubric.images
    message = user_message(question(rubric, Prompt(text="a gray square")), images)
    chat = open_chat(at_once(critic.endpoint))
    try:
        reply = chat.complete([message], max_tokens=8, temperature=0.0, seed=0)
    except RequestFailed as error:
        what = f"the critic's endpoint does not answer a question with logprobs: {error.detail}"
    else:
        needed = config.wants_distributions and critic.num_samples == 1
        if not needed or any(token.top for token in reply.tokens):
            return
        what = "the critic's endpoint answers without top_logprobs, so its scores have no distribution"
    fix = (
        "let the server give them (vLLM: --max-logprobs 20), or set critic.endpoint.logprobs to false and either "
        "critic.num_samples above 1, or reward.soft to false and bench.point_estimate to score"
    )
    raise UserError(what, f"critic.endpoint: {critic.endpoint.base_url}", fix)


def _check_server(config: RunConfig) -> None:
    """The program that will serve the critic, where its stages run on this machine."""
    serve = config.critic.serve
    if serve is not None and serve.program == "vllm" and config.launch.kind == "local" and not shutil.which("vllm"):
        fix = "install vllm, or let firm serve the critic"
        raise UserError("there is no program vllm on the PATH", "critic.serve.program", fix, usage=True)


def _check_names(config: RunConfig) -> None:
    from firm.critics.labeller import find_labeller  # imports httpx
    from firm.evaluate.suite import find_suite  # imports torch

    if config.curation:
        find_labeller(config.curation.labeller)
    find_suite(config.evaluate.suite)


def _check_prompts(config: RunConfig, prompts: Sequence[Prompt]) -> None:
    """Rubrics that judge edits need prompts with a source image, all others prompts without."""
    dimension, name = next(iter(config.critic.rubrics.items()))
    images = load_rubric(name).images
    for prompt in prompts:
        if images != 1 + (prompt.image is not None):
            what = (
                f"the rubric {name!r} judges {images} image(s), and a prompt has {'a' if prompt.image else 'no'} source"
            )
            fix = "use rubrics of edits for prompts with a source_image, and others for those without"
            raise UserError(what, f"critic.rubrics.{dimension}, prompt {prompt.text!r}", fix, usage=True)


def _check_curation(
    config: RunConfig, curation: CurationConfig, number: int, prompts: Sequence[Prompt], is_read: Callable[[str], bool]
) -> None:
    from firm.curation.sources import Files, count, no_candidates, no_kept_policy  # imports torch

    for i, source in enumerate(curation.sources):
        key = f"curation.sources.{i}"
        if isinstance(source, GeneratedSource):
            if source.policy != "kept":
                _check_policy(config, source.policy, f"{key}.policy", prompts)
            elif number == 1:
                raise no_kept_policy(f"{key}.policy")
        elif isinstance(source, FunctionSource):
            load_object(source.function, f"{key}.function")
        elif isinstance(source, FilesSource) and is_read(source.path):
            judged = next(iter(curation.dimensions.values()))
            Files(source, Splits(config.prompts), config.images.limits).check(load_rubric(judged.rubric).images)
    unread = any(isinstance(source, FilesSource) and not is_read(source.path) for source in curation.sources)
    for split in SPLITS if curation.sources and not unread else ():
        if not any(count(source, curation, config.prompts, split) for source in curation.sources):
            raise no_candidates(split)


def _check_scores(config: RunConfig, is_read: Callable[[str], bool]) -> None:
    from firm.bench.scores import ScoreFile  # imports scipy

    for scores in config.bench.sources if config.bench else ():
        if isinstance(scores, ScoresSource) and is_read(scores.path):
            wanted = {d: load_rubric(name).images for d, name in config.critic.rubrics.items()}
            ScoreFile(scores, wanted, None, config.images.limits).check(wanted)


def _check_policy(config: RunConfig, policy: PolicyConfig, key: str, prompts: Sequence[Prompt]) -> None:
    from firm.policies.policy import check_prompts, find_family  # imports torch

    find_family(policy.family, f"{key}.family").check(policy.model, f"{key}.model")
    check_prompts(prompts, policy.family, f"{key}.family", config.images.limits)
