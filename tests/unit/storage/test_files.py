"""The folder for temporary files is this user's alone."""

import os
import stat
import tempfile
from pathlib import Path

import pytest

from firm.records import UserError
from firm.storage.files import os_error, temporary_folder


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the folder will be."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"firm-{os.getuid()}"


def test_nobody_else_may_look_into_it(there: Path) -> None:
    assert temporary_folder() == there == temporary_folder()
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    there.chmod(0o755)
    temporary_folder()
    assert stat.S_IMODE(there.stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_refused(there: Path) -> None:
    there.mkdir()
    try:
        os.chown(there, 12345, -1)
    except PermissionError:
        pytest.skip("changing the owner needs root")
    with pytest.raises(UserError, match="somebody else") as caught:
        temporary_folder()
    assert caught.value.where == str(there) and "TMPDIR" in caught.value.fix


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_not_followed(there: Path, tmp_path: Path, dangling: bool) -> None:
    elsewhere = tmp_path / "elsewhere"
    if not dangling:
        elsewhere.mkdir(mode=0o755)
    there.symlink_to(elsewhere)
    with pytest.raises(UserError) as caught:
        temporary_folder()
    assert caught.value.where == str(there) and not list(tmp_path.glob("elsewhere/*"))


def test_what_stands_in_its_place_is_named(there: Path) -> None:
    there.write_text("")
    with pytest.raises(UserError) as caught:
        temporary_folder()
    assert caught.value.where == str(there)


def test_the_failed_file_operation_behind_an_error() -> None:
    full = OSError(28, "No space left on device", "/disk/x")
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = full
    assert os_error(full) is full and os_error(wrapped) is full
    rust = os_error(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert rust is not None and rust.errno == 28
    assert os_error(ValueError("no")) is None and os_error(None) is None
