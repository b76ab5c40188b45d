"""What all tests share: hypothesis profiles, threads, the order of files, golden files."""

import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported anywhere, so that it holds in subprocesses too: CI machines have two cores.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # threads that spin for long make a busy machine four times slower

import pytest
from hypothesis import settings

settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("new", deadline=None)
settings.load_profile("new" if os.environ.get("EXPLORE") else "same")


# Whole runs and trainings take minutes a file: they start first, so that no process is left with one at the end.
LONG = ("pipelines", "training", "integration")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write golden files instead of comparing")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """golden(name, text) compares the text with the file ``golden/<name>`` next to the test."""
    rewrite = request.config.getoption("--golden")

    def check(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if rewrite:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.is_file(), f"{path} does not exist: run `make golden` and review it"
        assert text == path.read_text(), f"differs from {path}: if that is meant, run `make golden` and review"

    return check
