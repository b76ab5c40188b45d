"""A real S3 server (moto) in a process of its own, and the command line in this one."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3
from integration.slips import Result
from minio import Minio

from firm.cli import main

BUCKET = "firm-test"


@dataclass(frozen=True)
class S3Server:
    """Address of the server, and the environment in which `firm.storage.store` finds it (for subprocesses)."""

    address: str
    env: dict[str, str]

    @property
    def client(self) -> Minio:
        """A client that goes around `firm.storage.store`, to look at and to damage what is there."""
        keys = self.env["AWS_ACCESS_KEY_ID"], self.env["AWS_SECRET_ACCESS_KEY"]
        return Minio(self.address, *keys, secure=False, region=self.env["AWS_REGION"])


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server with the bucket ``firm-test``, for the whole session. Does not touch the environment."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=clean)
    env = {
        "FIRM_S3_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "firm-key",
        "AWS_SECRET_ACCESS_KEY": "firm-secret",
        "AWS_REGION": "us-east-1",
    }
    server = S3Server(f"127.0.0.1:{port}", env)
    try:
        _wait(process, env["FIRM_S3_ENDPOINT"])
        server.client.make_bucket(BUCKET)
        yield server
    finally:
        process.terminate()
        process.wait(10)


def _wait(process: "subprocess.Popen[bytes]", url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "moto.server ended at once"
        try:
            urllib3.request("GET", f"{url}/moto-api/", retries=False, timeout=1)
            return
        except urllib3.exceptions.HTTPError:
            time.sleep(0.1)
    raise TimeoutError("moto.server does not answer")


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix of its own for each test, with the environment set up to reach it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://{BUCKET}/tests/{name}-{time.monotonic_ns()}"


@pytest.fixture
def here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """here(*words): the command line in this process, for what ends before a stage starts a process of its own.

    ``folder``, a fixture of the tests that use this one, is where it runs and where modules are found.
    """
    monkeypatch.chdir(folder)

    def command(*words: str) -> Result:
        monkeypatch.syspath_prepend(folder)  # now that the folder's modules are written
        monkeypatch.setattr(sys, "argv", ["firm", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(words, caught.value.code, said.out, said.err)

    yield command
    for module in folder.glob("*.py"):
        sys.modules.pop(module.stem, None)
