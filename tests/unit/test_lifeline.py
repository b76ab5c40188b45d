"""A process dies with the one that owns it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from firm.lifeline import LIFELINE

OWNER = """
import subprocess, sys, time
from firm import lifeline
lifeline.exit_with_parent()
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""
CHILD = "import time; from firm import lifeline; lifeline.exit_with_parent(); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """An owner and the process id of its child, which holds the lifeline."""
    environment = {k: v for k, v in os.environ.items() if k != LIFELINE}
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, CHILD], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert owner.stdout is not None
    pid = int(owner.stdout.readline())
    assert owner.stdout.readline() == "held\n"
    yield owner, pid
    with suppress(ProcessLookupError):
        os.killpg(owner.pid, signal.SIGKILL)
    owner.wait()


def running(pid: int) -> bool:
    """False where the process is gone, or dead and not yet reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while running(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not running(pid)


@pytest.mark.parametrize("reaped", [True, False])
def test_a_child_ends_with_its_killed_owner(family: tuple[subprocess.Popen[str], int], reaped: bool) -> None:
    owner, child = family
    assert running(child)
    owner.kill()
    if reaped:
        owner.wait()
    assert gone_within(child, 3)


def test_a_child_lives_while_its_owner_does(family: tuple[subprocess.Popen[str], int]) -> None:
    assert not gone_within(family[1], 1.5)


def test_an_owner_that_is_gone_before_the_child_starts_ends_it_at_once() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    environment = {**os.environ, LIFELINE: str(gone.pid)}
    child = subprocess.run([sys.executable, "-c", CHILD], env=environment, timeout=20, check=False)
    assert child.returncode == 137
