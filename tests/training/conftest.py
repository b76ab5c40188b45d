"""Examples for a critic, made once."""

from pathlib import Path

import pytest
from training.critics import make_examples


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train/`` of 320 rendered examples and ``test/`` of 80."""
    folder = tmp_path_factory.mktemp("data")
    make_examples(folder)
    return folder
