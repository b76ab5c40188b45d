"""Plants faults in a copy of the code, one at a time, and reports those that no test notices: `make mutations`.

Each row of the table is a fault that would ruin a run without an error: the file, what stands there, what is planted,
and the tests that should fail. A fault that survives asks for a test, not for another row.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600


def planted(copy: Path, fault: Fault) -> bool:
    """Whether the tests fail with the fault in place; the file is restored."""
    path = copy / fault.file
    text = path.read_text()
    if text.count(fault.old) != 1:
        raise SystemExit(f"{fault.file} has {text.count(fault.old)} times {fault.old!r}: bring the table up to date")
    path.write_text(text.replace(fault.old, fault.new))
    env = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *fault.tests]
    try:
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, check=False, timeout=TIMEOUT_S)
        return done.returncode == 1
    except subprocess.TimeoutExpired:  # waiting for ever is noticed, too
        return True
    finally:
        path.write_text(text)


def survivors(chosen: str) -> Iterator[Fault]:
    """Faults in files whose name contains ``chosen`` that no test notices; prints a line per fault."""
    faults = [fault for fault in FAULTS if chosen in fault.file]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "build", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=ignored)
        for number, fault in enumerate(faults, 1):
            noticed = planted(copy, fault)
            verdict = "noticed" if noticed else "SURVIVED"
            print(f"{number}/{len(faults)} {verdict}: {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
            if not noticed:
                yield fault


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chosen", nargs="?", default="", help="only files whose name contains this")
    left = list(survivors(parser.parse_args().chosen))
    print(f"{len(left)} survived")
    sys.exit(bool(left))
