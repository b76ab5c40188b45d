"""The run's own critic behind a server that lives as long as the stage that asks it (`critic.serve`)."""

from __future__ import annotations

import http.client
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from firm.config import CriticConfig
from firm.config.critic import CriticEndpoint, CriticServer
from firm.dist import Ranks, gather
from firm.images import ANY
from firm.locate import model_path
from firm.records import UserError

HOST = "127.0.0.1"
NAME = "critic"
"""Of the model, in the API and in the journals of answers: the same whatever the port."""
_QUESTIONS = ("--max-question-tokens", str(2**18), "--max-question-pixels", str(2 * ANY.max_pixels))
"""Its caller is the run itself, whose images are bounded already: an edit and its source, as large as may be."""
KEY = "FIRM_CRITIC_KEY"
"""Environment variable in which a stage keeps the key of its server: a new one each time, so that no other is asked."""
_READ = {"firm": "OPENAI_API_KEY", "vllm": "VLLM_API_KEY"}
"""Where each program looks for the key that requests must carry."""
TRIES = 4
"""As many time-outs as a judgement may take."""
GRACE_S = 10.0
_POLL_S = 0.2


@contextmanager
def served(config: CriticConfig, folder: Path | None, work: Path, ranks: Ranks | None = None) -> Iterator[CriticConfig]:
    """The critic as a stage asks it: as configured, or at a server that is there as long as the block.

    Args:
        config: The configured critic.
        folder: The trained model.
        work: Gets the server's log.
        ranks: The processes of a job, all of which take part: those of one machine share a server.

    Raises:
        UserError: The server does not start; the end of its log is quoted.
    """
    if config.serve is None:
        yield config
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    model = str(folder) if config.kind == "trained" else str(model_path(config.model, "critic.model"))
    with ExitStack() as stack:
        key = secrets.token_urlsafe()
        log = work / "critic-server.log"
        url = "" if local else stack.enter_context(_running(config, config.serve, model, log, key))
        if ranks is not None:
            url, key = gather([[url, key]], ranks)[ranks.rank - local]
        os.environ[KEY] = key
        stack.callback(os.environ.pop, KEY, None)
        yield _at(url, config, config.serve)


def _at(url: str, config: CriticConfig, server: CriticServer) -> CriticConfig:
    in_flight = server.concurrency or (2 * config.batch_size if server.program == "firm" else 64)
    endpoint = CriticEndpoint(
        base_url=url,
        model=NAME,
        api_key_env=KEY,
        max_tokens=config.max_new_tokens,
        timeout_s=server.timeout_s,
        deadline_s=TRIES * server.timeout_s,
        concurrency=max(1, in_flight // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
    )
    return config.model_copy(update={"kind": "endpoint", "endpoint": endpoint, "serve": None})


def command(config: CriticConfig, server: CriticServer, model: str, port: int) -> list[str]:
    """The command line of a server."""
    common = ["--host", HOST, "--port", str(port), "--served-model-name", NAME, "--dtype", config.dtype]
    if server.program == "vllm":
        return ["vllm", "serve", model, *common, "--max-logprobs", "20", *server.arguments]
    own = ["--answer-style", config.answer_style, "--batch-size", str(config.batch_size)]
    limits = ["--max-new-tokens", str(config.max_new_tokens), *_QUESTIONS]
    if config.max_pixels is not None:
        limits += ["--max-pixels", str(config.max_pixels)]
    return [sys.executable, "-m", "firm.cli", "serve", model, *common, *own, *limits, *server.arguments]


@contextmanager
def _running(config: CriticConfig, server: CriticServer, model: str, log: Path, key: str) -> Iterator[str]:
    """A server that demands a key and ends with this process however that ends; yields its URL when it answers."""
    with socket.create_server((HOST, 0)) as probe:
        port = probe.getsockname()[1]
    log.parent.mkdir(parents=True, exist_ok=True)
    keeper = [sys.executable, "-m", "firm.lifeline", str(os.getpid()), *command(config, server, model, port)]
    env = {**os.environ, **server.env, _READ[server.program]: key}
    with log.open("wb") as output:
        process = subprocess.Popen(keeper, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    try:
        _wait(process, port, key, server, log)
        yield f"http://{HOST}:{port}/v1"
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], port: int, key: str, server: CriticServer, log: Path) -> None:
    end = time.monotonic() + server.start_s
    while (code := process.poll()) is not None or not _answers(port, key):
        if code is None and time.monotonic() < end:
            time.sleep(_POLL_S)
            continue
        how = f"does not answer within {server.start_s:g} s" if code is None else f"ended with exit code {code}"
        said = log.read_text(errors="replace").strip().rpartition("\n")[2][:300]
        raise UserError(f"the critic's server {how}: {said or 'it has said nothing'}", "critic.serve", f"see {log}")


def _answers(port: int, key: str) -> bool:
    """Whether what listens there is ready and was given this key: it answers with it, and refuses without it."""
    known, unknown = HTTPStatus.OK, HTTPStatus.UNAUTHORIZED
    return _status(port, {"Authorization": f"Bearer {key}"}) == known and _status(port, {}) == unknown


def _status(port: int, headers: dict[str, str]) -> int:
    """Of an answer; 0 without one."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/v1/models", headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and all that it has started."""
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
