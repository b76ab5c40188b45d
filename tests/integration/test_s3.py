"""Stores and artifacts over the real MinIO client: resuming, damage and every fault a person can repair."""

import gc
import io
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
import urllib3
from shared import HTTPRequest, serving

from firm.records import ArtifactRef, Candidate, UserError
from firm.storage import s3
from firm.storage.artifacts import SMALL_BYTES, Output
from firm.storage.inputs import open_input
from firm.storage.open import open_store
from firm.storage.shards import ShardWriter, iter_shards

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(scope="module", autouse=True)
def _no_litter_of_others() -> None:
    """Sockets that tests of other files left open would be reported here, whenever they are collected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def key_of(uri: str) -> tuple[str, str]:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix


# ---- the server works -------------------------------------------------------------------------------------------


def test_round_trip(s3_uri, tmp_path):
    store = open_store(s3_uri + "/")
    assert store.uri == s3_uri and store.list() == []
    odd = "a/grüße +%20&?.bin"
    store.put("a/b.bin", b"one")
    store.put(odd, b"")
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * (20 * 2**20 // 256))  # three parts
    store.put("large", large)
    store.fetch("large", tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == large.read_bytes()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["copy"]
    assert store.get("a/b.bin") == b"one" and store.get(odd) == b""
    assert store.list() == sorted([("a/b.bin", 3), (odd, 0), ("large", 20 * 2**20)])
    assert store.list("a/b") == [("a/b.bin", 3)]
    assert store.exists("large") and not store.exists("larg") and not store.exists("a")
    store.delete("large")
    store.delete("large")
    assert not store.exists("large")
    assert open_store(s3_uri.replace("s3://", "minio://")).get("a/b.bin") == b"one"


def test_neighbours_with_the_same_start_are_apart(s3_uri):
    open_store(s3_uri + "-more").put("a", b"1")
    assert open_store(s3_uri).list() == []


def candidate(index: int) -> Candidate:
    return Candidate(index=index, prompt="p", source="s", split="train", images=[bytes([index]) * 100])


def curate(output: Output, total: int, stop: int | None = None) -> ArtifactRef | None:
    """A stage in small: shards, published as they are finished, and a work file."""
    with ShardWriter(output.folder, Candidate, 10) as writer:
        for index in range(writer.rows_done, stop or total):
            (output.folder / "journal").write_text(str(index))
            output.publish("journal", *writer.write([candidate(index)]))
    if stop:
        return None
    ref = output.commit("curation", "k", {}, {"rows": total}, writer.names)
    output.discard("journal")
    return ref


def test_resumes_on_another_machine(s3_uri, tmp_path):
    whole = curate(Output.open(s3_uri + "/whole", tmp_path / "a"), 35)
    lost = Output.open(s3_uri + "/resumed", tmp_path / "lost")
    curate(lost, 35, stop=25)
    half = ArtifactRef(uri=lost.uri, sha256="0" * 64)
    assert Output.open(lost.uri, tmp_path / "look").manifest() is None
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        open_input(half, tmp_path)
    resumed = Output.open(lost.uri, tmp_path / "new")
    assert resumed.folder != lost.folder and (resumed.folder / "journal").read_text() == "24"
    assert ShardWriter(resumed.folder, Candidate, 10).rows_done == 20  # the short shard was not published
    ref = curate(resumed, 35)
    assert ref is not None and whole is not None and ref.sha256 == whole.sha256
    folder = open_input(ref, tmp_path / "reader")
    assert list(iter_shards(folder, Candidate)) == [candidate(i) for i in range(35)]
    assert not open_store(ref.uri).exists("journal")
    assert open_input(ref, tmp_path / "reader") == folder


def test_cache_becomes_what_was_published(s3_uri, tmp_path):
    first = Output.open(s3_uri, tmp_path / "first")
    (first.folder / "state").write_text("10")
    first.publish("state")
    second = Output.open(s3_uri, tmp_path / "second")
    (second.folder / "state").write_text("20")
    second.publish("state")
    (first.folder / "state").write_text("11")  # never published
    (first.folder / "checkpoint").write_text("11")
    again = Output.open(s3_uri, tmp_path / "first")
    assert [(p.name, p.read_text()) for p in again.folder.iterdir()] == [("state", "20")]


def test_subfolders_are_published_and_discarded_as_a_whole(s3_uri, tmp_path):
    output = Output.open(s3_uri, tmp_path)
    for name in ("work/step-1/a", "work/step-1/b", "work/step-10/a"):
        (output.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (output.folder / name).write_text(name)
    output.publish("work")
    output.discard("work/step-1")
    assert [key for key, _ in open_store(s3_uri).list()] == ["work/step-10/a"]
    assert not (output.folder / "work/step-1").exists()


def test_changed_files_are_published_again(s3_uri, tmp_path):
    output = Output.open(s3_uri, tmp_path)
    (output.folder / "data").write_text("old")
    output.publish("data")
    (output.folder / "data").write_text("new!")
    ref = output.commit("s", "k", {}, {}, ["data"])
    assert (open_input(ref, tmp_path / "in") / "data").read_text() == "new!"


def test_of_a_complete_artifact_only_small_files_are_downloaded(s3_uri, tmp_path):
    output = Output.open(s3_uri, tmp_path / "a")
    (output.folder / "weights").write_bytes(b"w" * (SMALL_BYTES + 1))
    (output.folder / "summary.json").write_text("{}")
    ref = output.commit("s", "k", {}, {}, ["weights", "summary.json"])
    again = Output.open(s3_uri, tmp_path / "b")
    assert sorted(p.name for p in again.folder.iterdir()) == ["manifest.json", "summary.json"]
    assert again.ref() == ref


def test_a_checkpoint_that_a_job_removes_meanwhile_does_not_stop_its_launcher(s3_uri, tmp_path, monkeypatch):
    """The launcher was killed and is back; its job replaces checkpoints all the time."""
    job = Output.open(s3_uri, tmp_path / "job")
    for name in ("work/checkpoints/checkpoint-10/scheduler.json", "metrics.jsonl"):
        (job.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (job.folder / name).write_text("{}")
        job.publish(name)
    listed = s3.S3Store.list

    def list_and_remove(store, prefix=""):
        found = listed(store, prefix)
        for key in (key for key, _ in found if "checkpoint-10" in key):
            store.delete(key)
        return found

    monkeypatch.setattr(s3.S3Store, "list", list_and_remove)
    launcher = Output.open(s3_uri, tmp_path / "launcher", small_only=True)
    assert [path.name for path in launcher.folder.iterdir()] == ["metrics.jsonl"]


def test_damage_is_found(s3_server, s3_uri, tmp_path):
    output = Output.open(s3_uri, tmp_path / "out")
    (output.folder / "data").write_text("data")
    ref = output.commit("s", "k", {}, {}, ["data"])
    folder = open_input(ref, tmp_path / "in")
    (folder / "data").write_text("atad")  # a damaged cache is repaired
    assert (open_input(ref, tmp_path / "in") / "data").read_text() == "data"
    bucket, prefix = key_of(s3_uri)
    s3_server.client.put_object(bucket, f"{prefix}/data", io.BytesIO(b"atad"), 4)
    with pytest.raises(UserError, match="SHA-256 of the file differs") as caught:
        open_input(ref, tmp_path / "other")
    assert caught.value.where == f"{s3_uri}/data"
    s3_server.client.remove_object(bucket, f"{prefix}/data")
    with pytest.raises(UserError, match="file is missing") as caught:
        open_input(ref, tmp_path / "third")
    assert f"{s3_uri}/data" in caught.value.where


# ---- faults -----------------------------------------------------------------------------------------------------


def actions(uri: str, tmp_path: Path) -> dict[str, Callable[[], object]]:
    """Everything that asks the server."""
    store = open_store(uri)
    return {
        "put": lambda: store.put("a", b"1"),
        "get": lambda: store.get("a"),
        "fetch": lambda: store.fetch("a", tmp_path / "a"),
        "list": store.list,
        "exists": lambda: store.exists("a"),
        "delete": lambda: store.delete("a"),
    }


def test_missing_bucket(s3_uri, tmp_path):
    start = time.monotonic()
    for name, action in actions("s3://no-such-bucket/p", tmp_path).items():
        with pytest.raises(UserError, match="bucket 'no-such-bucket' does not exist"):
            action()
            pytest.fail(name)
    assert time.monotonic() - start < 5, "a missing bucket must not be retried"


def test_missing_key(s3_uri, tmp_path):
    for name in ("get", "fetch"):
        with pytest.raises(UserError, match="no such object") as caught:
            actions(s3_uri, tmp_path)[name]()
        assert f"{s3_uri}/a" in caught.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def checked_credentials(s3_server) -> Iterator[dict[str, str]]:
    """Has the server check signatures; gives valid keys of a user who may do nothing."""
    url = s3_server.env["FIRM_S3_ENDPOINT"]
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s"}
    iam = boto3.client("iam", endpoint_url=url, region_name="us-east-1", verify=False, **keys)
    user = f"user-{time.monotonic_ns()}"
    iam.create_user(UserName=user)
    created = iam.create_access_key(UserName=user)["AccessKey"]
    urllib3.request("POST", f"{url}/moto-api/reset-auth", body=b"0")
    yield {"AWS_ACCESS_KEY_ID": created["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": created["SecretAccessKey"]}
    urllib3.request("POST", f"{url}/moto-api/reset-auth", body=b"inf")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("AWS_ACCESS_KEY_ID", "refused the credentials: InvalidAccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "refused the credentials: SignatureDoesNotMatch"),
        ("", "denied access: AccessDenied"),
    ],
)
def test_wrong_credentials(s3_uri, checked_credentials, monkeypatch, tmp_path, wrong, message):
    for name, value in checked_credentials.items():
        monkeypatch.setenv(name, "very-wrong-value" if name == wrong else value)
    start = time.monotonic()
    for name, action in actions(s3_uri, tmp_path).items():
        with pytest.raises(UserError) as caught:
            action()
        assert message in str(caught.value), name
        assert "very-wrong-value" not in str(caught.value)
    assert time.monotonic() - start < 5, "wrong credentials must not be retried"


def test_refused_connection(s3_uri, monkeypatch, tmp_path):
    monkeypatch.setenv("FIRM_S3_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(s3, "FIRST_CONTACT_S", 1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot reach S3.*refused.*127\.0\.0\.1:1") as caught:
        Output.open(s3_uri, tmp_path)
    assert "FIRM_S3_ENDPOINT" in caught.value.fix and time.monotonic() - start < 5


class Flaky:
    """Answers by a script, one entry a request; the last one stays."""

    def __init__(self, *script: str) -> None:
        self.script = script
        self.seen = 0

    def __call__(self, request: HTTPRequest) -> None:
        kind = self.script[min(self.seen, len(self.script) - 1)]
        self.seen += 1
        request.close_connection = True
        if kind == "drop":
            request.connection.close()
            return
        status = {"503": 503, "502": 502, "html": 404}.get(kind, 200)
        body = {"503": b"<Error><Code>SlowDown</Code></Error>", "html": b"<html>"}.get(kind, b"content")
        content = "text/html" if kind in ("502", "html") else "application/xml"
        length = len(body) + 10 * (kind == "short")
        request.reply(status, body, Content_Type=content, Content_Length=str(length))


@contextmanager
def flaky(monkeypatch: pytest.MonkeyPatch, *script: str) -> Iterator[Flaky]:
    server = Flaky(*script)
    with serving(server) as url:
        monkeypatch.setenv("FIRM_S3_ENDPOINT", url)
        yield server


@pytest.mark.parametrize("fault", ["503", "502", "drop", "short"])
def test_passing_faults_are_survived(s3_uri, monkeypatch, tmp_path, fault):
    with flaky(monkeypatch, fault, fault, "ok") as server:
        store = open_store(s3_uri)
        store.fetch("a", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"content" and server.seen == 3
        server.seen = 0
        assert store.get("a") == b"content"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [("503", "SlowDown"), ("502", "502"), ("drop", "cannot reach S3"), ("short", "IncompleteRead")],
)
def test_lasting_faults_end_at_the_deadline(s3_uri, monkeypatch, tmp_path, fault, message):
    monkeypatch.setattr(s3, "DEADLINE_S", 0.5)
    monkeypatch.setattr(s3, "FIRST_CONTACT_S", 0.5)
    with flaky(monkeypatch, fault), pytest.raises(UserError, match=message):
        open_store(s3_uri).fetch("a", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_s3(s3_uri, monkeypatch):
    with flaky(monkeypatch, "html") as server, pytest.raises(UserError, match="not an answer of an S3 server"):
        open_store(s3_uri).get("a")
    assert server.seen == 1


def test_files_that_cannot_be_read_or_written(s3_uri, tmp_path):
    store = open_store(s3_uri)
    store.put("a", b"1")
    with pytest.raises(UserError) as caught:
        store.fetch("a", Path("/proc/firm/a"))
    assert caught.value.where == "/proc/firm/a"
    with pytest.raises(UserError, match="no such file"):
        store.put("b", tmp_path / "absent")
