"""Ways to kill a run, for tests that ask whether it ends as if it had not been killed."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from firm.lifeline import identity


def descendants(pid: int) -> list[int]:
    """A process and all below it, parents first."""
    found = [pid]
    for each in found:
        for task in Path(f"/proc/{each}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return found


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)  # so that none of them sees another one's end
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


VICTIMS: dict[str, Callable[[int], None]] = {
    "the command": kill,
    "its group": lambda pid: os.killpg(pid, signal.SIGKILL),
    "the last process that it has started": lambda pid: kill(descendants(pid)[-1]),
    "all, as a machine that loses power": lambda pid: kill(*descendants(pid)),
}


def alive(pid: int) -> list[str]:
    """Identities of a process and all below it."""
    return [identity(each) for each in descendants(pid)]


def wait_for_end(processes: list[str]) -> None:
    """Until none of these identities lives: they see that their parent is gone."""
    while any(identity(int(who.split("/")[2])) == who for who in processes if who):
        time.sleep(0.1)
