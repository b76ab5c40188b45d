"""A real cluster: made by charts/kind/up from nothing, or the one that is there.

Environment: CLUSTER (default firm-test), NAMESPACE, KEEP=1 (leave the cluster), and what charts/kind/up reads.
"""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import urllib3
from minio import Minio
from minio.error import S3Error

ROOT = Path(__file__).parents[2]
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
BACKEND = "ghcr.io/kubeflow/kfp-api-server:2.17.0"
# Seconds for each stage, and long enough in sft and rl that something can happen in the middle.
SMALL = """
base: gen-shapes-kind
name: small
curation:
  sources: [{kind: function, name: rendered, function: "firm.shapes.generation:candidate", num_images: 256}]
sft: {max_steps: 60, checkpoint_steps: 10}
bench:
  num_bootstrap: 50
  sources: []
  gate:
    rules: [{metric: coverage, at_least: 0.5}]
    accept_gaps:
      [instruction_following.skill_low, instruction_following.pairwise, quality.skill_low, quality.pairwise]
rl: {prompts_per_epoch: 4, group_size: 4, max_epochs: 12, checkpoint_epochs: 2, batch_size: 16}
auditor: {every: 4, num_images: 8}
evaluate: {num_images: 8, num_bootstrap: 50}
"""


@dataclass(frozen=True)
class Kind:
    """A kind cluster with both charts in one namespace."""

    name: str
    namespace: str
    kfp: bool
    kubeconfig: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *command: str, check: bool = True, **options: Any) -> str:
        """Output of a command on this machine, with the cluster as its context."""
        env = {**os.environ, **self.env, "KUBECONFIG": str(self.kubeconfig), "PATH": PATH}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, **options)
        assert done.returncode == 0 or not check, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout + done.stderr

    def kubectl(self, *arguments: str, check: bool = True, **options: Any) -> str:
        return self.run("kubectl", "-n", self.namespace, *arguments, check=check, **options)

    def get(self, *arguments: str) -> list[dict[str, Any]]:
        """Objects as JSON: get("pods", "-l", "firm/stage=sft")."""
        return list(json.loads(self.kubectl("get", *arguments, "-o", "json"))["items"])

    def start(self, *arguments: str, folder: Path) -> "subprocess.Popen[str]":
        """``firm ARGUMENTS`` in a folder."""
        env = {**os.environ, **self.env, "KUBECONFIG": str(self.kubeconfig), "PATH": PATH}
        return subprocess.Popen(
            ["firm", *arguments], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    @property
    def store(self) -> Minio:
        """As the administrator: steps, KFP and this machine have keys to a part each."""
        pool = urllib3.PoolManager(timeout=5, retries=False)  # a restarted store must not hold a test up
        host, keys = self.env["FIRM_S3_ENDPOINT"].removeprefix("http://"), self.secret("minio")
        return Minio(host, keys["accesskey"], keys["secretkey"], secure=False, region="us-east-1", http_client=pool)

    def secret(self, name: str) -> dict[str, str]:
        """Data of a Secret."""
        data = json.loads(self.kubectl("get", "secret", name, "-o", "json"))["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def objects(self, prefix: str) -> list[str]:
        """Names of all objects below a prefix; a store that is being restarted is waited for."""

        def names() -> list[list[str]]:
            try:
                return [[o.object_name or "" for o in self.store.list_objects("firm", prefix, recursive=True)]]
            except (urllib3.exceptions.HTTPError, S3Error):
                return []

        [found] = self.wait_for("the object store", names)
        return list(found)

    def read(self, prefix: str, end: str) -> bytes:
        """Content of the one object below ``prefix`` whose name ends so."""
        [name] = [o for o in self.objects(prefix) if o.endswith(end)]
        return bytes(self.store.get_object("firm", name).read())

    @staticmethod
    def wait_for(what: str, condition: Callable[[], Any], seconds: float = 180) -> Any:
        """The first true answer of ``condition``."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if answer := condition():
                return answer
            time.sleep(1)
        raise AssertionError(f"{what}: not within {seconds:.0f} s")

    @contextmanager
    def forward(self, service: str, port: int) -> Iterator[str]:
        """Address of a Service on this machine; the connection is made again when the pod behind it is replaced."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            local = probe.getsockname()[1]
        forward = f"kubectl -n {self.namespace} port-forward service/{service} {local}:{port}"
        process = subprocess.Popen(
            ["bash", "-c", f"while sleep 0.5; do {forward}; done"],
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self.wait_for(f"service {service}", lambda: _listens(local), 60)
            yield f"http://127.0.0.1:{local}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)

    @contextmanager
    def reached(self) -> Iterator["Kind"]:
        """The same with chart platform's store in reach of this machine, and the keys to it that jobs have."""
        keys = self.secret(self.kubectl("get", "configmap", "firm", "-o", "jsonpath={.data.FIRM_STORE_SECRET}"))
        with self.forward("minio", 9000) as endpoint:
            env = {
                "FIRM_S3_ENDPOINT": endpoint, "AWS_REGION": "us-east-1",
                "AWS_ACCESS_KEY_ID": keys["accesskey"], "AWS_SECRET_ACCESS_KEY": keys["secretkey"],
            }  # fmt: skip
            yield replace(self, env=env)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def kind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kind]:
    """The cluster, from nothing where it is not there; the KFP backend is off where its images are missing."""
    for program in ("kind", "kubectl", "helm", "docker"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    docker = os.environ.get("DOCKER", "docker")
    has_backend = (
        subprocess.run([docker, "image", "inspect", BACKEND], capture_output=True, check=False).returncode == 0
    )
    kfp = os.environ.get("KFP", str(int(has_backend)))
    name = os.environ.get("CLUSTER", "firm-test")
    namespace = os.environ.get("NAMESPACE", "firm")
    settings = {
        **os.environ,
        "BIN": str(Path(sys.executable).parent),
        "CLUSTER": name,
        "NAMESPACE": namespace,
        "KFP": kfp,
    }
    subprocess.run(["charts/kind/up"], cwd=ROOT, env=settings, check=True, timeout=1500)
    kubeconfig = tmp_path_factory.mktemp("kind") / "kubeconfig"
    kubeconfig.write_text(subprocess.check_output(["kind", "get", "kubeconfig", "--name", name], text=True))
    with Kind(name, namespace, kfp == "1", kubeconfig).reached() as cluster:
        yield cluster
    if os.environ.get("KEEP") != "1":
        subprocess.run(["charts/kind/down"], cwd=ROOT, env=settings, check=True)


@pytest.fixture(scope="session")
def backend(kind: Kind) -> None:
    """Skips tests where the KFP backend is off."""
    if not kind.kfp:
        pytest.skip(f"the KFP backend is not here ({BACKEND})")


@pytest.fixture
def environment(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets code in this process reach the cluster and its object store."""
    for name, value in {**kind.env, "KUBECONFIG": str(kind.kubeconfig)}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run of a minute or two."""
    path = tmp_path_factory.mktemp("small") / "small.yaml"
    path.write_text(SMALL)
    return path
