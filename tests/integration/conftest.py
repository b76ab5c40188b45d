"""A real S3 server (moto) in a process of its own, and the command line in this one."""

import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import urllib3
from integration.asked import Teacher
from integration.slips import Result
from minio import Minio
from servers import free_port, started

from firm.cli import main

BUCKET = "firm-test"
MEMORY = 3 * 2**30
"""What `firm run` may take for what users give it, beyond what the program takes: see docs/security.md."""


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


def environment(address: str) -> dict[str, str]:
    """What `firm.storage.s3` needs to reach a server of these tests."""
    keys = {"AWS_ACCESS_KEY_ID": "firm-key", "AWS_SECRET_ACCESS_KEY": "firm-secret", "AWS_REGION": "us-east-1"}
    return {"FIRM_S3_ENDPOINT": f"http://{address}", **keys}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A server with the bucket ``firm-test``, for the whole session. Does not touch the environment."""
    port = free_port()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    env = environment(f"127.0.0.1:{port}")
    server = S3Server(f"127.0.0.1:{port}", env)
    with started(command, clean) as process:
        wait_for(process, f"{env['FIRM_S3_ENDPOINT']}/moto-api/")
        server.client.make_bucket(BUCKET)
        yield server


def wait_for(process: "subprocess.Popen[bytes]", url: str) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended at once"
        try:
            if urllib3.request("GET", url, retries=False, timeout=1).status == 200:
                return
        except urllib3.exceptions.HTTPError:
            pass
        time.sleep(0.1)
    raise TimeoutError("the server does not answer")


@pytest.fixture
def s3_uri(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A prefix of its own for each test, with the environment set up to reach it."""
    for name, value in s3_server.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    return f"s3://{BUCKET}/tests/{name}-{time.monotonic_ns()}"


@pytest.fixture(scope="session")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A MinIO server with a bucket."""
    program = shutil.which("minio")
    if program is None:
        pytest.skip("there is no program minio on the PATH")
    address = f"127.0.0.1:{free_port()}"
    env = {**os.environ, "MINIO_ROOT_USER": "firm-key", "MINIO_ROOT_PASSWORD": "firm-secret", "MINIO_UPDATE": "off"}
    data = tmp_path_factory.mktemp("minio")
    (data / BUCKET).mkdir()  # a bucket is a folder; made by a request, a server that has just started may take 60 s
    command = [program, "server", str(data), "--address", address, "--quiet"]
    server = S3Server(address, environment(address))
    with started(command, env) as process:
        wait_for(process, f"http://{address}/minio/health/ready")
        yield server


def place(server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A place for artifacts, with the environment set up to reach it."""
    if server == "folder":
        return str(request.getfixturevalue("tmp_path") / "store")
    uri = str(request.getfixturevalue("s3_uri"))
    if server == "minio":
        for name, value in request.getfixturevalue("minio").env.items():
            monkeypatch.setenv(name, value)
    return uri


@pytest.fixture(params=["moto", "minio"])
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix in S3."""
    return place(request.param, request, monkeypatch)


@pytest.fixture(params=["folder", "moto", "minio"])
def uri(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder or a prefix in S3."""
    return place(request.param, request, monkeypatch)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    """The pixel teacher behind an endpoint."""
    server = Teacher(tmp_path_factory.mktemp("teacher"))
    yield server
    server.kill()


@contextmanager
def memory_beyond_what_is_used(most: int) -> Iterator[None]:
    """More bytes than that cannot be had: a MemoryError."""
    [used] = re.findall(r"VmData:\s*(\d+) kB", Path("/proc/self/status").read_text())
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)


@pytest.fixture
def here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Result]]:
    """here(*words): the command line in this process, for what ends before a stage starts a process of its own.

    It has as much memory as docs/security.md says.

    ``folder``, a fixture of the tests that use this one, is where it runs and where modules are found.
    """
    monkeypatch.chdir(folder)

    def command(*words: str) -> Result:
        monkeypatch.syspath_prepend(folder)  # now that the folder's modules are written
        monkeypatch.setattr(sys, "argv", ["firm", *words])
        with pytest.raises(SystemExit) as caught, memory_beyond_what_is_used(MEMORY):
            main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(words, caught.value.code, said.out, said.err)

    yield command
    for module in folder.glob("*.py"):
        sys.modules.pop(module.stem, None)
