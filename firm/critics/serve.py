"""Serves a critic of this project over HTTP, so that many jobs share one: the other half of an endpoint critic.

Requests that come at the same time are answered as one batch, because a batch of eight costs little more than one.
"""

from __future__ import annotations

import base64
import binascii
import math
import os
import queue
import secrets
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from firm.chat.messages import IMAGE_MARK, ChatMessage, Reply, RequestFailed, Token
from firm.chat.server import ChatServer
from firm.config import CriticConfig
from firm.critics.answers import SCORE_PREFIX, AnswerStyle
from firm.critics.local import LocalCritic, question_seed
from firm.images import decode_image
from firm.locate import model_path
from firm.records import SCORES, ArtifactRef, UserError
from firm.storage.artifacts import MANIFEST
from firm.storage.files import sha256
from firm.storage.inputs import open_input
from firm.storage.open import open_store

TOKEN = "OPENAI_API_KEY"
"""Environment variable of the key that requests must carry: the one that clients send by default."""
MAX_CHARS = 100_000
"""Longest text of a request: an endless text would take the memory of all other requests."""
CRITIC = "critic"  # the folder of an sft artifact that holds the model


def model_folder(model: str) -> str:
    """A model's local folder or hub id; an artifact of the sft stage, here or in S3, is fetched and verified first.

    Raises:
        UserError: There is no complete artifact at the URI.
    """
    remote = model.startswith(("s3://", "minio://"))
    if not remote and not (Path(model) / MANIFEST).is_file():
        return model_path(model, "critic.model")
    store = open_store(model)
    if not store.exists(MANIFEST):
        fix = "give the prefix that holds manifest.json, such as s3://BUCKET/runs/NAME/sft-..."
        raise UserError("there is no critic", store.uri, fix, usage=True)
    return str(open_input(ArtifactRef(uri=store.uri, sha256=sha256(store.get(MANIFEST))), only=f"{CRITIC}/") / CRITIC)


@dataclass(frozen=True)
class Asked:
    """A question that waits for its answer; ``top_logprobs`` is None where no tokens are asked for."""

    text: str
    images: Sequence[bytes]
    max_tokens: int
    temperature: float
    seed: int
    top_logprobs: int | None
    reply: Future[Reply] = field(default_factory=Future)


class BatchingChat:
    """A critic in this process as a `firm.chat.messages.Chat`: one thread answers the requests of many.

    Args:
        name: Its name in the API.
        critic: The critic; its configuration sets the answer style and the batch size.
        patience_s: How long a batch waits for more questions after its first.
    """

    gives_logprobs = True

    def __init__(self, name: str, critic: LocalCritic, patience_s: float = 0.005) -> None:
        self.name = name
        self.batches = 0
        self._critic = critic
        self._patience_s = patience_s
        self._waiting: queue.Queue[Asked] = queue.Queue()
        threading.Thread(target=self._work, name="critic", daemon=True).start()

    def complete(
        self,
        messages: Sequence[ChatMessage],
        *,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        top_logprobs: int | None = None,
    ) -> Reply:
        """Answer the messages; with a seed always in the same way, whatever else is in the batch.

        Raises:
            RequestFailed: The messages are not a question with images that a critic understands.
        """
        text, images = read_question(messages)
        seed = question_seed(secrets.randbits(63) if seed is None else seed, text, images)
        asked = Asked(text, images, max_tokens, temperature, seed, top_logprobs)
        self._waiting.put(asked)
        return asked.reply.result()

    def waiting(self) -> int:
        """How many questions no batch has taken yet."""
        return self._waiting.qsize()

    def _work(self) -> None:
        while True:
            groups: dict[tuple[int, float, int | None], list[Asked]] = defaultdict(list)
            for asked in self._collect():
                groups[asked.max_tokens, asked.temperature, asked.top_logprobs].append(asked)
            for (max_tokens, temperature, top_logprobs), group in groups.items():
                self.batches += 1
                try:
                    replies = self._answer(group, max_tokens, temperature, top_logprobs)
                except Exception as error:  # the callers get the error; the thread continues for others
                    for asked in group:
                        asked.reply.set_exception(error)
                else:
                    for asked, reply in zip(group, replies, strict=True):
                        asked.reply.set_result(reply)

    def _collect(self) -> list[Asked]:
        batch = [self._waiting.get()]
        end = time.monotonic() + self._patience_s
        while len(batch) < self._critic.config.batch_size:
            try:
                batch.append(self._waiting.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                break
        return batch

    def _answer(
        self, batch: Sequence[Asked], max_tokens: int, temperature: float, top_logprobs: int | None
    ) -> list[Reply]:
        config = self._critic.config
        encoder = self._critic.encoder
        inputs = encoder.questions([asked.text for asked in batch], [asked.images for asked in batch])
        if config.answer_style == "score_first":
            return [_score_first(row, top_logprobs) for row in self._critic.score(inputs)]
        seeds = [asked.seed for asked in batch]
        return self._critic.write(inputs, min(max_tokens, config.max_new_tokens), top_logprobs, temperature, seeds)


def _score_first(probabilities: Sequence[float], top_logprobs: int | None) -> Reply:
    """The likeliest score; a critic whose numbers have become NaN must not seem to have one.

    Its tokens are the forced prefix and the score, with the five scores for all that might stand in its place.
    """
    if not all(map(math.isfinite, probabilities)):
        return Reply(f"{SCORE_PREFIX} nan")
    logprobs = [(f" {s}", math.log(p) if p else -9999.0) for s, p in zip(SCORES, probabilities, strict=True)]
    likely = sorted(logprobs, key=lambda token: -token[1])
    best, logprob = likely[0]
    if top_logprobs is None:
        return Reply(SCORE_PREFIX + best)
    prefix = Token(SCORE_PREFIX, 0.0, ((SCORE_PREFIX, 0.0),)[:top_logprobs])
    return Reply(SCORE_PREFIX + best, tokens=(prefix, Token(best, logprob, tuple(likely[:top_logprobs]))))


def read_question(messages: Sequence[ChatMessage]) -> tuple[str, list[bytes]]:
    """Text with ``<image>`` marks, and the images, of one user message: undoes `firm.chat.messages.user_message`.

    Raises:
        RequestFailed: The messages are of another form, or an image cannot be decoded.
    """
    if len(messages) != 1 or not isinstance(messages[0], Mapping) or messages[0].get("role") != "user":
        raise RequestFailed("messages must be one message of the role user: a critic holds no conversation")
    content = messages[0].get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list) or not parts:
        raise RequestFailed("the message has no content")
    texts = []
    images = []
    for i, part in enumerate(parts):
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text.replace(IMAGE_MARK, "< image >"))
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                texts.append(IMAGE_MARK)
                images.append(_image(url, f"content part {i}"))
            case _:
                raise RequestFailed(f"content part {i} is neither a text nor an image_url")
    text = "".join(texts)
    if not images:
        raise RequestFailed("the message has no image: a critic judges images")
    if len(text) > MAX_CHARS:
        raise RequestFailed(f"the text has {len(text)} characters, more than {MAX_CHARS}")
    return text, images


def _image(url: str, where: str) -> bytes:
    head, _, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64")):
        raise RequestFailed(f"{where}: images must be data URIs such as data:image/png;base64,...")
    try:
        image = base64.b64decode(data, validate=True)
        decode_image(image, where)  # here, so that it fails this request alone and not its batch
    except (binascii.Error, UserError) as error:
        raise RequestFailed(f"{where}: {error}") from error
    return image


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
    grace_s: float = 30.0,
) -> None:
    """Serve a critic until SIGTERM or Ctrl-C; pending requests are still answered.

    With OPENAI_API_KEY in the environment, requests must carry it as bearer token.

    Args:
        model: A model's folder, an sft stage's artifact (a folder, or s3://bucket/prefix), or a hub id.
        host: Address to listen on.
        port: Port to listen on.
        served_model_name: Name of the model in the API; default: ``model``.
        answer_style: ``score_first`` answers with the likeliest score alone, for critics trained in that style.
        dtype: Type of the weights.
        batch_size: Largest number of questions answered together.
        max_new_tokens: Limit of an answer, whatever the request says.
        grace_s: How long a stop waits for answers.

    Raises:
        UserError: An option is wrong, the model cannot be loaded, or the port is taken.
    """
    settings = {
        "answer_style": answer_style,
        "dtype": dtype,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    try:
        config = CriticConfig.model_validate({"model": model, "rubrics": {}, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0] if first["loc"] else "model").replace("_", "-")
        raise UserError(first["msg"], option, "see `firm serve --help`", usage=True) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chat = BatchingChat(served_model_name or model, LocalCritic(Path(model_folder(model)), config, device))
    token = os.environ.get(TOKEN, "").strip()
    server = ChatServer(chat, host, port, token=token, gauges={"firm_queue_length": chat.waiting})
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    sys.stderr.write(f"serving {chat.name} on {host}:{server.port} ({device})\n")
    server.serve(grace_s)
