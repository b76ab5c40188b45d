"""Serves a critic of this project over HTTP, so that many jobs share one: the other half of an endpoint critic."""

from __future__ import annotations

import gc
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import ValidationError

from firm.chat.key import read_key
from firm.chat.server import ChatServer
from firm.config import CriticConfig
from firm.config.section import Section
from firm.config.serve import QuestionLimits, ServerLimits
from firm.critics.answers import AnswerStyle
from firm.critics.batching import BatchingChat
from firm.critics.local import LocalCritic
from firm.locate import model_path
from firm.records import UserError
from firm.storage.artifacts import MANIFEST
from firm.storage.claims import find
from firm.storage.inputs import open_input

TOKEN = "OPENAI_API_KEY"
"""Environment variable of the key that requests must carry: the one that clients send by default."""
CRITIC = "critic"  # the folder of an sft artifact that holds the model


def model_folder(model: str) -> str:
    """A model's local folder or hub id; an artifact of the sft stage, here or in S3, is fetched and verified first.

    Raises:
        UserError: There is no complete artifact at the URI.
    """
    remote = model.startswith(("s3://", "minio://"))
    if not remote and not (Path(model) / MANIFEST).is_file():
        return model_path(model, "critic.model")
    artifact = find(model)
    if artifact is None:
        fix = "give the prefix of a stage that has ended, such as s3://BUCKET/runs/NAME/sft-..."
        raise UserError("there is no critic", model, fix, usage=True)
    return str(open_input(artifact, only=f"{CRITIC}/") / CRITIC)


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str = "",
    answer_style: AnswerStyle = "reason_first",
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    batch_size: int = 8,
    max_new_tokens: int = 1024,
    max_pixels: int | None = None,
    no_key: bool = False,
    limits: Mapping[str, int] | None = None,
    grace_s: float = 30.0,
) -> None:
    """Serve a critic until SIGTERM or Ctrl-C; pending requests are still answered.

    Args:
        model: A model's folder, an sft stage's artifact (a folder, or s3://bucket/prefix), or a hub id.
        host: Address to listen on.
        port: Port to listen on.
        served_model_name: Name of the model in the API; default: ``model``.
        answer_style: ``score_first`` answers with the likeliest score alone, for critics trained in that style.
        dtype: Type of the weights.
        batch_size: Largest number of questions answered together.
        max_new_tokens: Limit of an answer, whatever the request says.
        max_pixels: Larger images are scaled down to as many pixels.
        no_key: Whether OPENAI_API_KEY, which requests must carry, may be empty though others reach the address.
        limits: What to set of `ServerLimits` and `QuestionLimits`.
        grace_s: How long a stop waits for answers.

    Raises:
        UserError: An option is wrong, there is no key, the model cannot be loaded, or the port is taken.
    """
    key = read_key(host, TOKEN, optional=no_key)
    config = _checked(CriticConfig, {
        "model": model, "rubrics": {}, "answer_style": answer_style, "dtype": dtype, "batch_size": batch_size,
        "max_new_tokens": max_new_tokens, "max_pixels": max_pixels,
    })  # fmt: skip
    callers = _checked(ServerLimits, limits or {})
    chat = _open(served_model_name or model, config, _checked(QuestionLimits, limits or {}))
    server = ChatServer(
        chat, host, port, token=key,
        at_once=8 * batch_size,  # of them the critic takes those whose turn it is
        limits=callers, gauges={"firm_queue_length": lambda: server.waiting() + chat.waiting()},
    )  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    sys.stderr.write(f"serving {chat.name} on {host}:{server.port} ({_device()})\n")
    server.serve(grace_s)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _open(name: str, config: CriticConfig, limits: QuestionLimits) -> BatchingChat:
    """A critic that is ready to be asked."""
    chat = BatchingChat(name, LocalCritic(Path(model_folder(config.model)), config, _device()), limits)
    try:
        chat.warm_up()
    except Exception as error:
        raise UserError(f"the critic cannot answer a small question: {error}", config.model) from error
    gc.freeze()  # what is here stays: looking through it again and again would take a quarter of a second each time
    return chat


Checked = TypeVar("Checked", bound=Section)


def _checked(section: type[Checked], settings: Mapping[str, Any]) -> Checked:
    """The section with those of the settings that are its own."""
    try:
        return section.model_validate({name: settings[name] for name in section.model_fields if name in settings})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0] if first["loc"] else "model").replace("_", "-")
        raise UserError(first["msg"], option, "see `firm serve --help`", usage=True) from error
