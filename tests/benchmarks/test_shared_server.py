"""Good callers of a shared critic, with and without hostile ones beside them, in turns: `make bench` prints the ratio.

Each caller is a process with an address of its own. Seven are good: eight questions at once, the next one when an
answer is there, as the endpoint client does. Three are hostile, as the table `HOSTILE` says, with 64 connections each.
They are nice, because on a network their own work would be done by other machines.
"""

import base64
import contextlib
import http.client
import io
import itertools
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

PATH = "/v1/chat/completions"
CRITIC = Path(__file__).parents[2] / "firm" / "shapes" / "weights" / "critic"
NUM_GOOD, AT_ONCE, ROUNDS, ROUND_S = 7, 8, 4, 15.0


def body(text: str, image: bytes, **options: object) -> bytes:
    url = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
    return json.dumps({"messages": [{"role": "user", "content": content}], **options}).encode()


def picture(size: tuple[int, int], mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


SMALL = picture((32, 32))


def refused() -> list[bytes]:
    """What costs a server much that does not look at it first."""
    return [
        body("quality", picture((1, 300))),
        body("quality", picture((13_000, 13_000), "1")),
        body("x " * 49_500, SMALL),
        body("quality", SMALL, temperature=1e-45),
        b"[%s]" % (b"[]," * 6_000_000),
        b"x" * (21 * 2**20),
    ]


def dear() -> list[bytes]:
    """What costs as much as may be: the longest question, the largest image, the longest answer, a full body."""
    return [
        body("red " * 990, SMALL),
        body("quality", picture((2048, 2048))),
        body("quality", SMALL, temperature=10, max_tokens=4096, logprobs=True, top_logprobs=20),
        body("quality", SMALL, padding="x" * (20 * 2**20 - 2000)),
    ]


def ask(port: int, address: str, bodies: Iterator[bytes]) -> None:
    """Ask as fast as answers come, and take no notice of them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
    for content in bodies:
        try:
            connection.request("POST", PATH, content)
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            connection.close()
            time.sleep(0.01)


def leave(port: int, address: str, bodies: Iterator[bytes]) -> None:
    """Ask and hang up, dribble, connect and say nothing."""
    for number, content in enumerate(bodies):
        with contextlib.suppress(OSError):
            connection = socket.create_connection(("127.0.0.1", port), 5, source_address=(address, 0))
            head = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (PATH.encode(), len(content))
            if number % 3 == 0:
                connection.sendall(head + content)
                time.sleep(0.05)
            elif number % 3 == 1:
                for byte in head:
                    connection.sendall(bytes([byte]))
                    time.sleep(0.2)
            else:
                time.sleep(2)
            connection.close()


HOSTILE = {"refused": (ask, refused), "dear": (ask, dear), "leaves": (leave, dear)}


def be_hostile(kind: str, port: int, address: str, at_once: int) -> None:
    os.nice(19)
    kind, _, only = kind.partition(":")
    act, bodies = HOSTILE[kind]
    made = bodies()
    made = made[int(only) :][:1] if only else made
    for number in range(at_once):
        mine = itertools.cycle(made[number % len(made) :] + made[: number % len(made)])
        threading.Thread(target=act, args=(port, address, mine), daemon=True).start()
    print("ready", flush=True)
    time.sleep(600)


def be_good(port: int, address: str, at_once: int, seconds: float) -> None:
    """Print the seconds of every answer."""
    end, found = time.monotonic() + seconds, list[float]()
    content = body("is it a red circle", SMALL, logprobs=True, top_logprobs=20, max_tokens=4096)

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=(address, 0))
        time.sleep(random.random() / 10)
        while time.monotonic() < end:
            start = time.monotonic()
            connection.request("POST", PATH, content)
            response = connection.getresponse()
            response.read()
            assert response.status == 200, response.status
            found.append(time.monotonic() - start)

    threads = [threading.Thread(target=work) for _ in range(at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def started(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, __file__, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def good_round(port: int) -> list[float]:
    processes = [started("good", port, f"127.0.1.{i + 1}", AT_ONCE, ROUND_S) for i in range(NUM_GOOD)]
    return [seconds for process in processes for seconds in json.loads(process.communicate()[0])]


@contextlib.contextmanager
def hostile(port: int) -> Iterator[None]:
    """Three callers beside seven good ones: 30%, with eight times as much at once."""
    processes = [started(kind, port, f"127.0.2.{i + 1}", 8 * AT_ONCE) for i, kind in enumerate(HOSTILE)]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.bench
@pytest.mark.parametrize("style", ["score_first", "reason_first"])
def test_good_callers_hardly_notice_hostile_ones(style: str) -> None:
    serve = "from firm.cli import main; main()"
    options = ["--port", "0", "--dtype", "float32", "--answer-style", style]
    command = [sys.executable, "-c", serve, "serve", str(CRITIC), *options]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        assert server.stderr
        line = next(line for line in server.stderr if line.startswith("serving "))
        threading.Thread(target=server.stderr.read, daemon=True).start()
        port = int(line.split()[-2].rpartition(":")[2])
        good_round(port)
        memory = {"before": peak_mib(server.pid)}
        found: dict[str, list[float]] = {"alone": [], "beside": []}
        for _ in range(ROUNDS):
            found["alone"] += good_round(port)
            with hostile(port):
                found["beside"] += good_round(port)
        memory["after"] = peak_mib(server.pid)
    finally:
        server.terminate()
        server.wait(60)
    p95 = {name: statistics.quantiles(times, n=20)[-1] for name, times in found.items()}
    result = {
        "p50": {name: statistics.median(times) for name, times in found.items()}, "p95": p95,
        "max": {name: max(times) for name, times in found.items()},
        "answers": {name: len(times) for name, times in found.items()}, "peak MiB": memory,
        "ratio": p95["beside"] / p95["alone"],
    }  # fmt: skip
    print(f"\n{style}: {json.dumps(result)}")
    assert result["ratio"] < 2
    assert memory["after"] < 2048


def peak_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    kind, port, address, at_once, *rest = sys.argv[1:]
    if kind == "good":
        be_good(int(port), address, int(at_once), float(rest[0]))
    else:
        be_hostile(kind, int(port), address, int(at_once))
