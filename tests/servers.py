"""Programs that serve for as long as a test needs them."""

import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this machine that nobody uses."""
    with socket.create_server((host, 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def started(command: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that is told to end, and waited for, at the end of the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)
