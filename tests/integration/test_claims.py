"""Claims: whoever works, ends, is killed or sleeps at whatever moment, there is one artifact, and it is whole."""

import errno
import itertools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from integration.working import SHARDS, candidate, check, work

from firm import lifeline
from firm.records import Candidate, UserError
from firm.storage import claims
from firm.storage.artifacts import Output
from firm.storage.claims import claim, find
from firm.storage.open import open_store
from firm.storage.published import PublishedShards
from firm.storage.s3 import S3Store
from firm.storage.store import LocalStore

OPERATIONS = ("put", "create", "get", "fetch", "list", "exists", "delete")
IN_S3 = ("look", "copy")


# ---- two at once


def test_one_of_many_creates(uri: str) -> None:
    stores = [open_store(uri) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for key in map(str, range(10)):
            won = list(pool.map(lambda i, key=key: stores[i].create(key, str(i).encode()), range(8)))
            assert won.count(True) == 1 and stores[0].get(key) == str(won.index(True)).encode()
            assert stores[won.index(True)].create(key, stores[0].get(key)), "made it before, and it is still there"


def test_the_second_waits_for_the_first_and_gets_its_artifact(uri: str, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        refs = list(pool.map(lambda voice: work(uri, tmp_path / voice, voice), "abcd"))
    assert refs == refs[:1] * 4
    assert len({row.prompt.text for row in check(refs[0], uri, tmp_path / "reader")}) == 1, "two did the same work"


def test_a_failed_attempt_lets_others_on_at_once_and_leaves_what_it_had(uri: str, tmp_path: Path) -> None:
    whole = work(f"{uri}/whole", tmp_path / "whole")
    parts = f"{uri}/parts"
    with pytest.raises(UserError, match="no cats"), claim(parts) as place:
        out = Output.open(place.uri, tmp_path / "one")
        PublishedShards(out, SHARDS, Candidate, 2).write([candidate(i, "a") for i in range(2)])
        raise UserError("no cats")
    assert find(parts) is None
    start = time.monotonic()
    with claim(parts) as place:
        assert Output.open(place.uri, tmp_path / "two").files() == [f"{SHARDS}/part-00000.parquet"]
    assert time.monotonic() - start < 20
    assert work(parts, tmp_path / "three").sha256 == whole.sha256


# ---- killed, and asleep


@contextmanager
def suppress_lost() -> Iterator[None]:
    """One that was taken for dead may end with a message that says so."""
    try:
        yield
    except UserError as error:
        if "another process took this work over" not in str(error):
            raise


class Killed(BaseException):
    """Stands for a kill -9."""


@contextmanager
def at_operation(count: int, act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` before the operation of this number, and before all that follow on the stores used until then."""
    done = itertools.count()
    known: list[Any] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(store: Any, *args: Any) -> Any:
            number = next(done)
            if number <= count:
                known.append(store)
            if number >= count and any(store is one for one in known):
                act()
            return real(store, *args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in ((S3Store, OPERATIONS + IN_S3), (LocalStore, OPERATIONS)):
            for name in names:
                patch.setattr(owner, name, watched(getattr(owner, name)))
        yield


def killed_at(count: int, uri: str, scratch: Path, in_place: bool = False) -> bool:
    """Work and be killed at an operation of the store; False where it came to its end."""

    def kill() -> None:
        raise Killed

    try:
        with at_operation(count, kill):
            work(uri, scratch, in_place=in_place)
    except Killed:
        return True
    return False


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes of this machine count as ended, as they are the same one here."""
    monkeypatch.setattr(lifeline, "has_ended", lambda process: True)


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("in_place", [False, True])
def test_killed_at_any_operation_it_ends_as_if_it_had_not_been(uri: str, tmp_path: Path, in_place: bool) -> None:
    whole = work(f"{uri}/whole", tmp_path / "whole")
    for count in range(100):
        parts = f"{uri}/{count}"
        killed = killed_at(count, parts, tmp_path / f"lost-{count}", in_place)
        ref = work(parts, tmp_path / f"heir-{count}", in_place=in_place)
        assert ref.sha256 == whole.sha256
        check(ref, parts, tmp_path / f"reader-{count}")
        if not killed:
            assert count > 7
            return
    raise AssertionError("the work never ended")


@pytest.mark.usefixtures("dead")
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kills=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=2, max_size=5))
def test_killed_several_times_it_ends_as_if_it_had_not_been(
    s3_uri: str, tmp_path: Path, kills: list[tuple[int, bool]]
) -> None:
    whole = work(f"{s3_uri}/whole", tmp_path / "whole")
    parts = f"{s3_uri}/{time.monotonic_ns()}"
    for count, in_place in kills:
        killed_at(count, parts, tmp_path / str(time.monotonic_ns()), in_place)
    ref = work(parts, tmp_path / str(time.monotonic_ns()))
    assert ref.sha256 == whole.sha256
    check(ref, parts, tmp_path / "reader")


@pytest.mark.usefixtures("dead")
@pytest.mark.parametrize("in_place", [False, True])
def test_asleep_at_any_operation_it_harms_nobody_when_it_wakes(s3: str, tmp_path: Path, in_place: bool) -> None:
    """The machine of the first sleeps until another has ended the work; then the first goes on where it was.

    In place both write the same, as steps do that write what follows from what their job has left.
    """
    voices = ("same", "same") if in_place else ("first", "second")
    for count in range(100):
        parts = f"{s3}/{count}"
        asleep, awake = threading.Event(), threading.Event()

        def sleep(asleep: threading.Event = asleep, awake: threading.Event = awake) -> None:
            asleep.set()
            assert awake.wait(60)

        with ThreadPoolExecutor(1) as pool, at_operation(count, sleep):
            first = pool.submit(work, parts, tmp_path / f"first-{count}", voices[0], in_place)
            while not (asleep.is_set() or first.done()):
                time.sleep(0.001)
            if not asleep.is_set():
                assert count > 15
                return
            ref = work(parts, tmp_path / f"second-{count}", voices[1], in_place)
            awake.set()
            with suppress_lost():
                assert first.result(60) == ref
        check(ref, parts, tmp_path / f"reader-{count}")
    raise AssertionError("the work never ended")


# ---- deleted, and file systems that lack what is needed


@pytest.mark.parametrize("in_place", [False, True])
def test_an_artifact_that_was_deleted_is_made_again(uri: str, tmp_path: Path, in_place: bool) -> None:
    first = work(uri, tmp_path / "first")
    store = open_store(first.uri)
    for key, _ in store.list():
        store.delete(key)
    assert find(uri) is None
    second = work(uri, tmp_path / "second", "b", in_place)
    assert {str(row.prompt) for row in check(second, uri, tmp_path / "third")} == {"b"}


def test_a_manifest_that_was_changed_is_named_and_its_artifact_made_again(tmp_path: Path) -> None:
    """What of it no reader would miss, such as the hash of a file that nobody reads."""
    ref = work(str(tmp_path / "store"), tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"key": "k"', '"key": "l"'))
    for look in (lambda: work(ref.uri, tmp_path), lambda: find(ref.uri)):
        with pytest.raises(UserError, match="SHA-256 of the manifest differs") as caught:
            look()
        assert caught.value.where == str(manifest)
    shutil.rmtree(tmp_path / "store")
    assert find(ref.uri) is None
    assert work(ref.uri, tmp_path) == ref == work(ref.uri, tmp_path)
    shutil.rmtree(tmp_path / "store")
    other = work(ref.uri, tmp_path, "another")
    assert other != ref and find(ref.uri) == other


def test_many_remove_the_work_of_one(tmp_path: Path) -> None:
    out = Output.open(str(tmp_path / "a"))
    for _ in range(20):
        for number in range(50):
            (out.folder / "work" / str(number)).mkdir(parents=True)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: out.discard("work"), range(4)))


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(claims.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="has no locks") as caught:
        work(str(tmp_path / "store"), tmp_path)
    assert str(tmp_path) in caught.value.where


def test_a_file_system_without_links_has_manifests_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    uri = str(tmp_path / "store")
    check(work(uri, tmp_path), uri, tmp_path)
    assert not open_store(uri).create("manifest.json", b"another")
