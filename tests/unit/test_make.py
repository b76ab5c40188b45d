"""What `make` and the scripts for kind do, with the programs that they call replaced by ones that write down how."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIPELINES = ("full", "two", "three", "critic", "proof", "served", "curation", "sft", "bench", "rl")
KFP = """#!/bin/bash
echo "$@" >>kfp.calls
while [ "$1" != --output ]; do shift; done
printf 'image: firm/runtime:0.1.0\\nimage: firm/slim:0.1.0\\n' >"$2"
"""
# A connection to a pod: it says where it listens and stays until it is killed.
KUBECTL = """#!/bin/bash
echo $$ >>"$CALLS/pids"
port=$(sed -n 's/.* \\([0-9]*\\):[0-9]*$/\\1/p' <<<"$*")
echo "$*" >>"$CALLS/calls"
echo "Forwarding from 127.0.0.1:${port:-45678} -> 9000"
exec sleep 60
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the pipelines are made of, and an environment that is installed and has another name than .venv."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("pipelines", "firm/launch/k8s"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "firm/__init__.py", tmp_path / "firm")
    program(tmp_path / "env/bin/kfp", KFP)
    (tmp_path / "env/.installed").touch()
    return tmp_path


def make(checkout: Path, *words: str) -> str:
    command = ["make", "-C", str(checkout), "VENV=env", *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=clean()).stdout


def clean() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("REGISTRY", "BIN", "MAKEFLAGS", "KFP")}


def images(checkout: Path) -> list[set[str]]:
    found = [(checkout / f"build/pipelines/{name}.yaml").read_text() for name in PIPELINES]
    return [set(re.findall("image: (.*)firm/", text)) for text in found]


@pytest.mark.parametrize(
    "registries", [("", "a.example.com/x", "b.example.com", ""), ("a.example.com/x", ""), ("", "", "b.example.com")]
)
def test_the_registry_is_part_of_what_is_compiled(checkout: Path, registries: tuple[str, ...]) -> None:
    for registry in registries:
        make(checkout, "pipelines", *([f"REGISTRY={registry}"] if registry else []))
        assert images(checkout) == [{f"{registry}/" if registry else ""}] * len(PIPELINES)


def test_nothing_is_compiled_again_for_the_same_registry(checkout: Path) -> None:
    for _ in range(3):
        make(checkout, "pipelines", "REGISTRY=a.example.com")
    assert len((checkout / "kfp.calls").read_text().splitlines()) == len(PIPELINES)


def test_an_environment_of_another_name_reaches_every_target(checkout: Path) -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(targets) > 15
    for target in targets:
        assert ".venv" not in make(checkout, "-n", target), target
    for script in ("up", "run", "down"):
        program(checkout / "charts/kind" / script, '#!/bin/bash\necho "BIN is $BIN"\n')
    for target in ("kind-up", "kind-run"):
        assert "BIN is env/bin" in make(checkout, target)


@pytest.fixture
def forwarding(tmp_path: Path) -> tuple[dict[str, str], str]:
    """Environment and text of a script that forwards a port and does something for a while."""
    program(tmp_path / "bin/kubectl", KUBECTL)
    env = {**clean(), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path)}
    return env, f'. {ROOT}/charts/kind/settings.sh; forward minio 9000; echo "$forwarded"; '


def wait_for(folder: Path, connections: int) -> list[int]:
    pids: list[int] = []
    end = time.monotonic() + 20
    while len(pids) < connections and time.monotonic() < end:
        time.sleep(0.05)
        pids = [int(pid) for pid in (folder / "pids").read_text().split()] if (folder / "pids").exists() else []
    assert len(pids) == connections
    return pids


def lives(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() != b""


def test_a_forwarded_port_outlives_the_pod_behind_it(forwarding: tuple[dict[str, str], str], tmp_path: Path) -> None:
    env, script = forwarding
    process = subprocess.Popen(["bash", "-c", f"{script} sleep 4"], env=env, stdout=subprocess.PIPE, text=True)
    os.kill(wait_for(tmp_path, 1)[0], signal.SIGTERM)
    wait_for(tmp_path, 2)
    assert process.communicate(timeout=30)[0] == "45678\n" and process.returncode == 0
    first, second = (tmp_path / "calls").read_text().splitlines()
    assert first.endswith("service/minio :9000") and second.endswith("service/minio 45678:9000")


@pytest.mark.parametrize("end", ["true", "false", "exit 3", "kill -INT $$; sleep 1", "kill -TERM $$; sleep 1"])
def test_no_forwarding_is_left_behind(forwarding: tuple[dict[str, str], str], tmp_path: Path, end: str) -> None:
    env, script = forwarding
    subprocess.run(["bash", "-c", f"{script} {end}"], env=env, capture_output=True, timeout=60, check=False)
    pids = wait_for(tmp_path, 1)
    deadline = time.monotonic() + 10
    while any(map(lives, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(lives, pids))


def test_a_service_that_is_not_there_ends_at_once(forwarding: tuple[dict[str, str], str], tmp_path: Path) -> None:
    env, script = forwarding
    program(tmp_path / "bin/kubectl", '#!/bin/bash\necho "Error: services not found" >&2\nexit 1\n')
    started = time.monotonic()
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "service minio cannot be reached: Error: services not found" in done.stderr
    assert time.monotonic() - started < 10
