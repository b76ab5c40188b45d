"""Processes of a run end with it, so that no orphan keeps writing after a kill -9, and end fast.

``python -m firm.lifeline PID COMMAND...`` runs any program until the process PID is gone.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

LIFELINE = "FIRM_LIFELINE_PID"


def exit_with_parent() -> None:
    """End this process when the one named in the environment is gone, and fast; name this one for its own children."""
    if owner := os.environ.get(LIFELINE):
        threading.Thread(target=_follow, args=(int(owner),), daemon=True).start()
    os.environ[LIFELINE] = str(os.getpid())
    atexit.register(gc.freeze)  # or Python looks for garbage in all of torch once more, for a second or two


def keep(owner: int, command: Sequence[str]) -> int:
    """Run a program until it ends or a process is gone, at whose end nothing of this process's group is left.

    Call it in a process that leads a group of its own. SIGTERM to the group ends the program as it pleases.

    Returns:
        The program's exit code.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    program = subprocess.Popen(command, preexec_fn=_die_with_parent)  # noqa: PLW1509 (there are no threads here)
    while True:
        with suppress(subprocess.TimeoutExpired):
            return program.wait(0.5)
        if not _lives(owner):
            os.killpg(0, signal.SIGKILL)


def _die_with_parent() -> None:
    """Ask Linux for SIGKILL when the process that has started this one is gone, such as by SIGKILL."""
    set_parent_death_signal = 1
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def identity(pid: int) -> str:
    """A living process of this machine by machine, number and start; empty where it is not, or nobody can tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        numbers = os.readlink("/proc/self/ns/pid")  # those of a container are its own
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else f"{boot}/{numbers}/{pid}/{fields[19]}"


def has_ended(process: str) -> bool | None:
    """Whether the process of an `identity` has ended; None where this machine cannot tell."""
    mine = identity(os.getpid()).split("/")
    theirs = process.split("/")
    if len(theirs) != 4 or theirs[:2] != mine[:2]:
        return None
    return identity(int(theirs[2])) != process


def _follow(owner: int) -> None:
    while _lives(owner):
        time.sleep(0.5)
    os._exit(137)


def _lives(owner: int) -> bool:
    try:
        os.kill(owner, 0)
        # Killed but not reaped by its own parent, it would seem to live.
        return Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:
        return True  # not ours to signal, or a system without /proc


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1]), sys.argv[2:]))
