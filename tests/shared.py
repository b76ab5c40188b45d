"""What tests of several folders share; `from shared import ...` works because pytest has tests/ on its path."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3
import yaml

from firm.chat.messages import ChatMessage, Reply
from firm.config import PolicyConfig
from firm.config.loading import load_config
from firm.critics.judge import JudgeInput
from firm.dist import Ranks
from firm.images import decode_image
from firm.records import Assessment, Invalid, Judgement

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
BASE = "pkg://firm.shapes/weights/base"
TINY = PolicyConfig(model=BASE, resolution=32, max_sequence_length=1)

# ---- runs ------------------------------------------------------------------------------------------------------------

# Runs one stage: python -c STAGE name config inputs output, as `stage_command` writes it.
STAGE = """
import json, sys
from firm.stage import execute
stage, config, inputs, output = sys.argv[1:]
execute(stage, json.loads(config), json.loads(inputs), output)
"""


GENERATION, EDITING = "gen-shapes", "edit-shapes"
"""The presets of the two tasks, of which small runs are made."""
POLICIES = {
    GENERATION: {"family": "sd3", "model": BASE, "resolution": 32, "max_sequence_length": 1},
    EDITING: {"family": "qwen_image_edit", "model": "pkg://firm.shapes/weights/editor", "resolution": 32},
}
DIMENSIONS = {GENERATION: ("instruction_following", "quality"), EDITING: ("execution", "consistency")}


def rendered(num_images: int, task: str = GENERATION) -> dict[str, Any]:
    """A source of rendered images or edits."""
    function = f"firm.shapes.{'generation' if task == GENERATION else 'editing'}:candidate"
    return {"kind": "function", "name": "rendered", "function": function, "num_images": num_images}


def generated(num_images: int, num_inference_steps: int, task: str = GENERATION) -> dict[str, Any]:
    """A source of images of the task's tiny base policy."""
    policy = POLICIES[task]
    steps = {"num_images": num_images, "num_inference_steps": num_inference_steps}
    return {"kind": "generated", "name": "base", "policy": policy, **steps}


def small_run(*sources: Mapping[str, Any], task: str = GENERATION, **curation: Any) -> str:
    """The file of a run named small, the shapes run on these sources; other sections may be appended."""
    plain = {"base": task, "name": "small", "curation": {**curation, "sources": list(sources)}}
    return yaml.safe_dump(plain, sort_keys=False)


def gate(*rules: Mapping[str, Any], task: str = GENERATION) -> str:
    """A gate of these rules and no others, for a shapes run; what they leave out is accepted. Written as JSON."""
    gaps = [f"{d}.{what}" for d in DIMENSIONS[task] for what in ("skill_low", "pairwise")]
    return json.dumps({"rules": rules, "accept_gaps": gaps})


def paper_run(preset: str, **launch: Any) -> str:
    """The file of a run named small: a preset of the paper with tiny models in the place of the big ones.

    It changes what two cores and models of a million parameters cannot do as the paper does; all other keys are the
    preset's.

    Args:
        preset: Its name.
        launch: Keys of its section, beside two workers without GPUs.
    """
    has = load_config(preset)
    teacher = {"kind": "python", "target": "firm.shapes.teacher:PixelTeacher"}
    few = {"num_images": 8, "num_inference_steps": 2}
    rules = json.loads(gate({"metric": "coverage", "at_least": 0}))
    sources = [{"kind": "policy", "name": "policy", **few}] if has.policy else []
    sections: dict[str, dict[str, Any]] = {
        "policy": {"model": TINY.model, "resolution": 32, "max_sequence_length": 1},
        "curation": {"planner": teacher, "evaluator": teacher, "sources": [rendered(96)], "shard_size": 32},
        # It has not learned to reason: what it says first is read as its score.
        "critic": {"model": "pkg://firm.shapes/weights/critic", "answer_style": "score_first"},
        "sft": {"max_steps": 2},
        "bench": {"num_bootstrap": 20, "sources": sources, "gate": rules if has.policy else {"rules": rules["rules"]}},
        "rl": {"prompts_per_epoch": 2, "group_size": 4, "max_epochs": 2, "num_inference_steps": 3},
        "auditor": {"judge": teacher, "num_images": 8, "every": 1},
        "evaluate": {**few, "num_bootstrap": 20},
    }
    small = {key: section for key, section in sections.items() if getattr(has, key) is not None}
    small["prompts"] = {"function": "firm.shapes.generation:prompts"}
    small["launch"] = {"num_workers": 2, "gpus": 0, **launch}
    return yaml.safe_dump({"base": preset, "name": "small", **small})


def whole_run(judge: Mapping[str, Any]) -> str:
    """The file of a run named small that has little to do in every stage; the judge is teacher and auditor."""
    few = {"num_images": 16, "num_inference_steps": 1}
    plain = {
        "base": "gen-shapes",
        "name": "small",
        "curation": {"sources": [rendered(64)], "evaluator": judge, "shard_size": 16, "batch_size": 16},
        "sft": {"batch_size": 8, "max_steps": 8, "checkpoint_steps": 2},
        "bench": {
            "num_bootstrap": 20,
            "sources": [{"kind": "policy", **few}],
            "gate": json.loads(gate({"metric": "coverage", "at_least": 0})),
        },
        "rl": {
            "prompts_per_epoch": 2, "group_size": 4, "max_epochs": 4, "checkpoint_epochs": 1, "num_inference_steps": 1,
        },
        "auditor": {"judge": judge, "num_images": 8, "every": 1},
        "evaluate": {**few, "batch_size": 8, "num_bootstrap": 20},
    }  # fmt: skip
    return yaml.safe_dump(plain, sort_keys=False)


def stage_command(stage: str, config: Mapping[str, Any], inputs: Mapping[str, str], output: Path | str) -> list[str]:
    """The command of a process that runs one stage, as a component of the pipeline does."""
    return [sys.executable, "-c", STAGE, stage, json.dumps(config), json.dumps(inputs), str(output)]


def python_path(*folders: Path) -> str:
    """PYTHONPATH of a process that finds modules in these folders first."""
    return os.pathsep.join(filter(None, [*map(str, folders), os.environ.get("PYTHONPATH")]))


def start(folder: Path, config: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "firm.cli", "run", str(config), "--set", f"store={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(folder: Path, config: Path) -> str:
    process = start(folder, config)
    output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output + (folder / "small" / "run.log").read_text()[-3000:]
    return output


def events(folder: Path) -> list[dict[str, object]]:
    path = folder / "small" / "progress.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in(folder: Path, config: Path, stage: str, done: int) -> None:
    """Start a run and kill -9 the command, and nothing else, once a stage has done so much."""
    process = start(folder, config)
    deadline = time.monotonic() + 600
    while not any(e["stage"] == stage and int(str(e.get("done", 0))) >= done for e in events(folder)):
        assert process.poll() is None and time.monotonic() < deadline, f"never got to {stage} {done}"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


# ---- judges and chats ------------------------------------------------------------------------------------------------


class Redness:
    """A judge of how red an image is; ``asked`` holds every item.

    Args:
        sign: -1 likes the opposite.
        failing: Positions, in a call, of the items that are not judged.
        dimensions: Each gets the same judgement.
    """

    def __init__(
        self,
        sign: float = 1.0,
        failing: Collection[int] = (),
        dimensions: Sequence[str] = ("instruction_following",),
    ) -> None:
        self.sign = sign
        self.failing = failing
        self.dimensions = dimensions
        self.asked: list[JudgeInput] = []

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        self.asked += items
        return [dict.fromkeys(self.dimensions, self._one(i, item.images[0])) for i, item in enumerate(items)]

    def _one(self, index: int, png: bytes) -> Judgement | Invalid:
        if index in self.failing:
            return Invalid(reason="unparsable")
        red, green, blue = np.asarray(decode_image(png, "")).reshape(-1, 3).mean(0) / 255
        high = float(np.clip(0.5 + self.sign * (red - (green + blue) / 2), 0, 1))
        return Judgement(score=5 if high > 0.5 else 1, distribution=(1 - high, 0, 0, 0, high))


class Scripted:
    """A chat that gives its replies in turn and raises those that are exceptions; ``calls`` holds what it is asked.

    Asked more often than it has replies, it raises IndexError.
    """

    name = "scripted"

    def __init__(self, *script: str | Reply | Exception) -> None:
        self.script = list(script)
        self.calls: list[dict[str, Any]] = []

    def complete(self, messages: Sequence[ChatMessage], **options: Any) -> Reply:
        self.calls.append({"messages": messages, **options})
        reply = self.script.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Reply(reply) if isinstance(reply, str) else reply


# ---- servers ---------------------------------------------------------------------------------------------------------


class HTTPRequest(BaseHTTPRequestHandler):
    """A request that a test answers: the standard library's handler, which has read the body."""

    protocol_version = "HTTP/1.1"
    body = b""

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        """Headers are named with _ for -, and replace Content-Length where they name it."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def relay(request: HTTPRequest, server: str) -> None:
    """Answer with what another server says."""
    headers = dict(request.headers)
    answer = urllib3.request(request.command, server + request.path, body=request.body, headers=headers, redirect=False)
    kept = ("Content-Type", "ETag", "Last-Modified", "Content-Length")
    said = {name.replace("-", "_"): answer.headers[name] for name in kept if name in answer.headers}
    request.reply(answer.status, answer.data, **said)


@contextmanager
def serving(answer: Callable[[HTTPRequest], None]) -> Iterator[str]:
    """Address of a server on this machine that calls ``answer`` with every request, each in a thread."""

    class Handler(HTTPRequest):
        def do_POST(self) -> None:
            self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer(self)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_POST

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64  # who does not fit in tries again after a second

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
