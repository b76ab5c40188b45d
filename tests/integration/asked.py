"""A teacher at an endpoint, in a process of its own, that logs what it is asked."""

import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

# The teacher's server; it logs every request that it receives: its kind and a hash of what was asked.
SERVER = """
import hashlib, json, os, sys, time
from firm.chat.client import PythonClient
from firm.chat.server import ChatServer
log = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

class Logging(PythonClient):
    def complete(self, messages, **options):
        text = json.dumps([messages, options], sort_keys=True)
        kind = "rating" if "image_url" in text else "plan"
        os.write(log, f"{kind} {hashlib.sha256(text.encode()).hexdigest()}\\n".encode())
        time.sleep(0.01)
        return super().complete(messages, **options)

teacher = Logging("firm.shapes.teacher:PixelTeacher")
teacher.name = "pixel-teacher"
ChatServer(teacher, port=int(sys.argv[1])).serve()
"""


class Teacher:
    """The logging server in a process of its own, always at the same address."""

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.log = folder / "requests"
        self.process = None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        command = [sys.executable, "-c", SERVER, str(self.port), str(self.log)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", self.port)) == 0, "the teacher does not listen")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def requests(self, kind: str) -> Counter[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(line.split()[1] for line in lines if line.startswith(kind))

    def forget(self) -> None:
        self.log.write_text("")


def until(done: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + 300
    while not done():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)
