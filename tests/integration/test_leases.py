"""Leases in S3: how the living are told from the dead, and servers that lack what is needed."""

import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from integration.conftest import S3Server
from integration.working import check, work
from shared import HTTPRequest, relay, serving

from firm import lifeline
from firm.records import ArtifactRef, UserError
from firm.storage import leases
from firm.storage.artifacts import Output
from firm.storage.claims import claim
from firm.storage.open import open_store


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a process has ended cannot be told from here, as of one on another machine. Patience is short."""
    monkeypatch.setattr(lifeline, "has_ended", lambda process: None)
    monkeypatch.setattr(leases, "LEASE_S", 3.0)
    monkeypatch.setattr(leases, "BEAT_S", 1.0)
    monkeypatch.setattr(leases, "POLL_S", 0.2)


def is_waited_for(s3: str, folder: Path) -> None:
    """A second process gets what the first has made, though that took far longer than a silent one is waited for."""
    with ThreadPoolExecutor(1) as pool, claim(s3) as place:
        second = pool.submit(work, s3, folder / "second")
        time.sleep(7)
        assert not second.done()
        out = Output.open(place.uri, folder / "first")
        (out.folder / "data").write_text("mine")
        ref = place.settle(out.commit("s", "k", {}, {}, ["data"]))
        assert second.result(60) == ref


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_one_that_says_it_lives_is_waited_for_however_long_it_takes(s3: str, tmp_path: Path) -> None:
    is_waited_for(s3, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_one_that_is_silent_is_taken_for_dead(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases.Leased, "keep", lambda self: None)
    start = time.monotonic()
    with claim(s3) as place:
        ref = work(s3, tmp_path / "second")
        assert time.monotonic() - start > 2
        assert place.settle(ArtifactRef(uri=place.uri, sha256="0" * 64)) == ref


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_one_that_lives_is_waited_for_when_the_server_was_away(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, back = leases.Leased._write, time.monotonic() + 4  # between the two looks at one that is silent

    def write_when_it_is_back(self: leases.Leased, **changes: object) -> None:
        if time.monotonic() < back:
            raise UserError("away", "", "")
        write(self, **changes)

    monkeypatch.setattr(leases.Leased, "_write", write_when_it_is_back)
    is_waited_for(s3, tmp_path)


def test_what_a_machine_keeps_of_a_superseded_attempt_is_removed(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(RuntimeError), claim(s3_uri) as place:
        first = Output.open(place.uri).folder
        raise RuntimeError
    with claim(s3_uri) as place:
        assert Output.open(place.uri).folder.exists() and not first.exists()


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(s3: str, tmp_path: Path) -> None:
    code = (
        "import os, sys; from firm.storage.claims import claim; claim(sys.argv[1]).__enter__(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, s3], check=False)
    start = time.monotonic()
    check(work(s3, tmp_path), s3, tmp_path / "reader")
    assert time.monotonic() - start < leases.LEASE_S / 2


def test_a_job_that_goes_on_elsewhere_is_found_where_it_was(s3: str) -> None:
    """The URI names the job on a cluster: the next step must find it by the same one."""
    uris = []
    for in_place in (True, True, False):
        with pytest.raises(UserError), claim(s3, in_place=in_place) as place:
            uris.append(place.uri)
            raise UserError("no cats")
    assert uris[0] == uris[1] != uris[2]


# ---- stores that lack what is needed


class Unconditional:
    """A way to an S3 server for which there are no conditions: ignored as by servers of old, or refused."""

    def __init__(self, server: str, refuses: bool) -> None:
        self.server = server
        self.refuses = refuses

    def __call__(self, request: HTTPRequest) -> None:
        if "If-None-Match" in request.headers and self.refuses:
            code = b"<Error><Code>NotImplemented</Code><Message>not implemented</Message></Error>"
            request.reply(501, code, Content_Type="application/xml")
            return
        del request.headers["If-None-Match"]
        relay(request, self.server)


@pytest.mark.parametrize("refuses", [True, False])
def test_a_server_without_conditional_writes_is_named(
    s3_server: S3Server, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: bool
) -> None:
    with serving(Unconditional(s3_server.env["FIRM_S3_ENDPOINT"], refuses)) as url:
        monkeypatch.setenv("FIRM_S3_ENDPOINT", url)
        with pytest.raises(UserError, match="no conditional writes") as caught:
            work(s3_uri, tmp_path)
        assert url in caught.value.where and "MinIO" in caught.value.fix


@pytest.mark.parametrize("damage", [b"", b"[]", b"{"])
def test_a_damaged_record_is_named(s3_uri: str, tmp_path: Path, damage: bytes) -> None:
    work(s3_uri, tmp_path)
    open_store(s3_uri).put("records/0002.json", damage)
    with pytest.raises(UserError, match="not a record of who works here") as caught:
        work(s3_uri, tmp_path)
    assert "records/0002.json" in caught.value.where
