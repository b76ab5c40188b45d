"""The images as a cluster runs them: any user, nothing writable but /tmp, no network."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from shared import rendered

from firm import __version__
from firm.config.loading import load_config
from firm.records import Check, Verdict
from firm.shapes.models import WEIGHTS
from firm.storage.artifacts import Output
from firm.storage.inputs import read_ref, write_ref

pytestmark = pytest.mark.docker
ROOT = Path(__file__).parents[2]
TARGETS = ("slim", "runtime", "critic")
SMALL = (
    f"curation.sources={json.dumps([rendered(24)])}",
    "store=/data",
)


@pytest.fixture(scope="session")
def docker() -> str:
    """A client that builds with BuildKit; some need a plug-in for it that is not there."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    for client in (os.environ.get("DOCKER", "docker"), "/usr/bin/docker"):
        probe = subprocess.run([client, "build", "--help"], env=environment, capture_output=True, check=False)
        if probe.returncode == 0:
            return client
    pytest.skip("no Docker client that builds with BuildKit")


@pytest.fixture(scope="session")
def images(docker: str) -> dict[str, str]:
    """Target -> image, built from this checkout; dependencies come from Docker's cache where it has them."""
    flags = {"DOCKER": docker, "BUILD_FLAGS": "--network host", "VERSION": "test", "REGISTRY": "", "SOURCE": "here"}
    subprocess.run([ROOT / "images" / "build", *TARGETS], env={**os.environ, **flags}, check=True)
    return {target: f"firm/{target}:test" for target in TARGETS}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder that containers may write into, whoever they run as."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(0o777)
    return tmp_path / "data"


def run(docker: str, image: str, *command: str, data: Path | None = None, entrypoint: str = "") -> str:
    """What a command says, run as a cluster with the strictest rules would."""
    hard = ["--read-only", "--tmpfs", "/tmp", "-u", "1000", "--network", "none", "--cap-drop", "ALL"]
    mount = ["-v", f"{data}:/data"] if data else []
    start = ["--entrypoint", entrypoint] if entrypoint else []
    result = subprocess.run(
        [docker, "run", "--rm", *hard, *mount, *start, image, *command], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout.strip()


def python(docker: str, image: str, code: str, *arguments: str, data: Path | None = None) -> str:
    return run(docker, image, "-c", code, *arguments, data=data, entrypoint="python3")


def execute(docker: str, image: str, data: Path, *arguments: object) -> None:
    code = "import json, sys; from firm.stage import execute; execute(*json.loads(sys.argv[1]))"
    python(docker, image, code, json.dumps(arguments), data=data)


def inspect(docker: str, image: str) -> dict[str, Any]:
    return json.loads(subprocess.check_output([docker, "image", "inspect", image]))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_user_and_entry_point(docker: str, images: dict[str, str], target: str) -> None:
    config = inspect(docker, images[target])["Config"]
    labels = {k.rpartition(".")[2]: v for k, v in config["Labels"].items() if k.startswith("org.opencontainers.image.")}
    assert labels["version"] == "test" and labels["source"] == "here" and labels["licenses"] == "Apache-2.0"
    assert config["User"] == "65532:65532"
    assert config["Entrypoint"][0] == "firm"  # exec form: the first process gets the signals
    assert bool(config.get("Healthcheck")) == (target == "critic")
    assert not any("pip" in variable.lower() for variable in config["Env"])


@pytest.mark.parametrize("target", ["slim", "runtime"])
def test_what_is_there_and_what_is_not(docker: str, images: dict[str, str], target: str) -> None:
    assert run(docker, images[target], "--version") == __version__
    tools = "for tool in gcc cc make curl wget git pip pip3 sh python3 mktemp; do command -v $tool || true; done"
    found = run(docker, images[target], "-c", tools, entrypoint="sh").split()
    assert [Path(path).name for path in found] == ["sh", "python3", "mktemp"]
    writable = "find / -xdev -writable -not -type l -not -path '/tmp*' -not -path '/proc*' -not -path '/dev*'"
    assert run(docker, images[target], "-c", writable + " 2>/dev/null || true", entrypoint="sh") == ""
    code = "from importlib.util import find_spec as f; print(*[m for m in ('pip', 'torch', 'transformers') if f(m)])"
    assert python(docker, images[target], code) == ("torch transformers" if target == "runtime" else "")
    python(docker, images[target], "import kfp.dsl.executor_main, kubeflow.training, minio, getpass; getpass.getuser()")
    code = (
        "import firm.cli as m; from pathlib import Path; assert Path(m.__cached__).is_file()"  # nobody can add it later
    )
    python(docker, images[target], code)


def test_slim_is_small_and_a_change_of_code_travels_fast(docker: str, images: dict[str, str]) -> None:
    assert inspect(docker, images["slim"])["Size"] < 0.9e9
    for target in ("slim", "runtime"):
        sizes = subprocess.check_output([docker, "history", "--format", "{{.Size}}", "--human=false", images[target]])
        assert next(size for size in map(int, sizes.split()) if size) < 20e6


@pytest.mark.parametrize("module", ["gate", "report", "sft", "rl"])
def test_slim_has_what_its_steps_need(docker: str, images: dict[str, str], module: str) -> None:
    python(docker, images["slim"], f"import firm.stage, firm.{module}.run")


def test_the_gate_runs_in_slim(docker: str, images: dict[str, str], data: Path) -> None:
    out = Output.open(str(data / "bench"))
    passed = Check(
        metric="mae", dimension="quality", source=None, value=0.1, bound="at most 0.7", passed=True, message=""
    )
    (out.folder / "verdict.json").write_text(Verdict(trusted=True, checks=[passed]).model_dump_json())
    ref = out.commit("bench", "key", {}, {}, ["verdict.json"])
    write_ref(ref.model_copy(update={"uri": "/data/bench"}), data / "agreement")
    config = load_config("gen-shapes", ["store=/data"]).model_dump(mode="json", exclude_none=True)
    execute(docker, images["slim"], data, "gate", config, {"bench": "/data/agreement"}, "/data/verdict")
    assert read_ref(data / "verdict").uri.startswith("/data/gen-shapes/gate-")


def test_curation_runs_in_runtime(docker: str, images: dict[str, str], data: Path) -> None:
    config = load_config("gen-shapes", list(SMALL)).model_dump(mode="json", exclude_none=True)
    execute(docker, images["runtime"], data, "curation", config, {}, "/data/out")
    [summary] = data.glob("gen-shapes/curation-*/summary.json")
    assert json.loads(summary.read_text())["stage"] == "curation"


def test_a_served_critic_gets_healthy_and_stops_at_once(docker: str, images: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(WEIGHTS / "critic", tmp_path / "model")
    hard = ["--read-only", "--tmpfs", "/tmp", "-u", "1000", "--network", "none", "-v", f"{tmp_path}/model:/model:ro"]
    quick = ["--health-interval", "1s", "--health-start-period", "60s"]
    started = [docker, "run", "-d", *hard, *quick, images["critic"], "/model", "--dtype", "float32", "--no-key"]
    container = subprocess.check_output(started, text=True).strip()
    try:
        health = "{{.State.Health.Status}} {{.State.Status}}"
        end = time.monotonic() + 60
        while (state := tell(docker, "inspect", "-f", health, container)) != "healthy running":
            assert time.monotonic() < end and "exited" not in state, tell(docker, "logs", container)
            time.sleep(0.5)
        models = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8000/v1/models').read().decode())"
        assert '"id": "/model"' in tell(docker, "exec", container, "python3", "-c", models)
        start = time.monotonic()
        tell(docker, "stop", "-t", "30", container)
        assert time.monotonic() - start < 10
        assert tell(docker, "inspect", "-f", "{{.State.ExitCode}}", container) == "0"
    finally:
        subprocess.run([docker, "rm", "-f", container], stdout=subprocess.DEVNULL, check=True)


def tell(docker: str, *command: str) -> str:
    result = subprocess.run([docker, *command], capture_output=True, text=True, check=False)
    return (result.stdout + result.stderr).strip()
