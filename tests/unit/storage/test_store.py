"""Local stores, atomic files and the messages of their faults."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from firm.records import UserError
from firm.storage.files import TEMPORARY, atomic_write
from firm.storage.open import open_store
from firm.storage.store import LocalStore


def test_round_trip(tmp_path):
    store = open_store(str(tmp_path / "new" / "root"))
    store.put("a/b.bin", b"one")
    source = tmp_path / "source"
    source.write_bytes(b"three")
    store.put("a/c.bin", source)
    store.fetch("a/c.bin", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"three"
    assert store.get("a/b.bin") == b"one"
    assert store.list() == [("a/b.bin", 3), ("a/c.bin", 5)]
    assert store.list("a/c") == [("a/c.bin", 5)]
    assert store.exists("a/b.bin") and not store.exists("a")
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert store.list() == [("a/c.bin", 5)]


def test_absent_folder_is_empty(tmp_path):
    assert LocalStore(tmp_path / "absent").list() == []


def test_file_uri_and_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_store("runs").uri == str(tmp_path / "runs")
    assert open_store(f"file://{tmp_path}/a%20b").uri == f"{tmp_path}/a b"


@pytest.mark.parametrize("uri", ["", "ftp://host/x", "file://host/x", "gs://b/p"])
def test_bad_uri_is_a_usage_error(uri):
    with pytest.raises(UserError) as caught:
        open_store(uri)
    assert caught.value.usage and "hunter2" not in str(caught.value)


@pytest.mark.parametrize("key", ["../x", "a/../../x", "/etc/passwd", "", "a//b", "a\\b", "x\0", f"a/{TEMPORARY}x"])
def test_keys_stay_inside(tmp_path, key):
    store = LocalStore(tmp_path / "root")
    for action in (store.get, store.exists, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(UserError, match="not a path inside"):
            action(key)


def test_missing_key_names_the_file(tmp_path):
    with pytest.raises(UserError, match=r"no such file.*nothing\.bin"):
        LocalStore(tmp_path).get("nothing.bin")


def test_unfinished_files_are_never_listed(tmp_path):
    store = LocalStore(tmp_path)
    with atomic_write(tmp_path / "a") as file:
        file.write(b"half")
        file.flush()
        assert [p for p in tmp_path.iterdir() if p.name.startswith(TEMPORARY)]
        assert store.list() == [] and not store.exists("a")
    assert store.list() == [("a", 4)]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    store = LocalStore(tmp_path)
    store.put("a", b"old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "a") as file:
        file.write(b"new")
        raise RuntimeError
    assert store.get("a") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("code", "message"),
    [(errno.ENOSPC, "disk full"), (errno.EROFS, "read-only"), (errno.EACCES, "no permission"), (errno.EIO, "failed")],
)
def test_faults_while_syncing(tmp_path, monkeypatch, code, message):
    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    store = LocalStore(tmp_path)
    store.put("a", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=message) as caught:
        store.put("a", b"new")
    assert caught.value.where == str(tmp_path / "a")
    assert store.get("a") == b"old" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_folder():
    with pytest.raises(UserError) as caught:  # /proc refuses new files to root, too
        LocalStore(Path("/proc/firm")).put("a", b"")
    assert caught.value.where == "/proc/firm/a"


def test_full_disk_for_real(tmp_path):
    """The kernel stops the write after 64 KiB, as a quota does."""
    script = f"""
import resource
from pathlib import Path
from firm.storage.store import LocalStore
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
store = LocalStore(Path({str(tmp_path)!r}))
store.put("small", b"x" * 60000)
store.put("large", b"x" * 600000)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "UserError: disk full" in result.stderr and f"{tmp_path}/large" in result.stderr
    assert LocalStore(tmp_path).list() == [("small", 60000)]
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_s3_needs_credentials(monkeypatch, missing):
    monkeypatch.setenv("FIRM_S3_ENDPOINT", "http://localhost:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.delenv(missing)
    with pytest.raises(UserError, match=missing) as caught:
        open_store("s3://bucket/prefix")
    assert caught.value.usage


@pytest.mark.parametrize(
    ("endpoint", "uri"),
    [
        ("minio:9000", "s3://bucket"),
        ("http://host/path", "s3://bucket"),
        ("", "minio://bucket"),
        ("http://h", "s3://B"),
        ("http://me:hunter2@h", "s3://bucket"),
    ],
)
def test_impossible_s3_addresses(monkeypatch, endpoint, uri):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("FIRM_S3_ENDPOINT", endpoint)
    with pytest.raises(UserError) as caught:
        open_store(uri)
    assert caught.value.usage


def test_local_stores_load_no_s3_client(tmp_path):
    script = f"""
import sys
from firm.storage.open import open_store
open_store({str(tmp_path)!r})
assert "minio" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
