"""Users of MinIO, made by the job of chart firm, against a real server where its program is there."""

import os
import runpy
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from minio import Minio
from minio.error import S3Error

SCRIPT = Path(__file__).parents[2] / "charts" / "firm" / "files" / "users.py"
KEYS = {"ROOT": ("administrator", "a" * 40), "FIRM": ("firm-key", "f" * 40), "PIPELINES": ("kfp-key", "k" * 40)}
# key -> who may read and write it
OBJECTS = {
    "runs/first/report/page.html": {"FIRM"},
    "data/prompts.txt": {"FIRM"},
    "kfp/firm/1234/report/page": {"PIPELINES"},
    "logs/team-a/run/2026/11/27/pod/main.log": {"PIPELINES"},
    "kfp/pipelines/1234": set(),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of a MinIO server with bucket ``firm`` and the users."""
    if not shutil.which("minio"):
        pytest.skip("minio is not on PATH")
    data = tmp_path_factory.mktemp("minio")
    (data / "firm").mkdir()
    (data / "others").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    env = {**os.environ, "MINIO_ROOT_USER": KEYS["ROOT"][0], "MINIO_ROOT_PASSWORD": KEYS["ROOT"][1]}
    process = subprocess.Popen(["minio", "server", str(data), "--address", address, "--quiet"], env=env)
    try:
        make_users(address)
        yield address
    finally:
        process.terminate()
        process.wait()


def make_users(address):
    keys = {
        f"{user}_{what}_KEY": key
        for user, pair in KEYS.items()
        for what, key in zip(("ACCESS", "SECRET"), pair, strict=True)
    }
    env = {**os.environ, **keys, "FIRM_S3_ENDPOINT": f"http://{address}"}
    subprocess.run([sys.executable, str(SCRIPT), "firm", "kfp", "logs"], env=env, check=True, timeout=120)


def client(address, user):
    return Minio(address, *KEYS[user], secure=False, region="us-east-1")


def may(action):
    try:
        action()
    except S3Error as error:
        assert error.code == "AccessDenied", error
        return False
    return True


@pytest.mark.parametrize("user", ["FIRM", "PIPELINES"])
@pytest.mark.parametrize("key", OBJECTS)
def test_each_user_has_its_prefixes(server, user, key):
    root, mine = client(server, "ROOT"), client(server, user)
    source = Path(__file__)
    root.fput_object("firm", key, str(source))
    assert mine.bucket_exists("firm")
    actions = [
        lambda: mine.get_object("firm", key).close(),
        lambda: mine.fput_object("firm", key, str(source)),
        lambda: mine.remove_object("firm", key),
    ]
    assert [may(action) for action in actions] == [user in OBJECTS[key]] * 3


@pytest.mark.parametrize("user", ["FIRM", "PIPELINES"])
def test_no_user_leaves_its_bucket(server, user):
    mine = client(server, user)
    assert not may(lambda: list(mine.list_objects("others")))
    assert not may(lambda: mine.make_bucket("mine"))
    assert not may(lambda: mine.set_bucket_policy("firm", "{}"))
    assert [bucket.name for bucket in mine.list_buckets()] in ([], ["firm"])


def test_users_are_made_again_with_new_keys(server, monkeypatch):
    old = client(server, "FIRM")
    monkeypatch.setitem(KEYS, "FIRM", (KEYS["FIRM"][0], "n" * 40))
    make_users(server)
    assert client(server, "FIRM").bucket_exists("firm")
    with pytest.raises(S3Error):
        list(old.list_objects("firm"))


def test_the_store_of_runs_works_with_these_rights(server, monkeypatch, tmp_path):
    from firm.storage.open import open_store

    make_users(server)
    access, secret = KEYS["FIRM"]
    monkeypatch.setenv("FIRM_S3_ENDPOINT", f"http://{server}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    store = open_store("s3://firm/runs/store")
    big = tmp_path / "big"
    big.write_bytes(bytes(20 * 2**20))  # in parts
    store.put("big", big)
    assert store.create("claim", b"1") and not store.create("claim", b"2")
    store.copy("big", "copy")
    assert store.get("copy") == big.read_bytes() and store.exists("claim")
    assert [key for key, _ in store.list()] == ["big", "claim", "copy"]
    store.delete("big")
    assert not store.exists("big")


@pytest.mark.parametrize("key", OBJECTS)
def test_one_key_for_both_can_do_what_both_can(server, monkeypatch, key):
    client(server, "ROOT").fput_object("firm", key, __file__)
    monkeypatch.setitem(KEYS, "FIRM", ("one-key", "o" * 40))
    monkeypatch.setitem(KEYS, "PIPELINES", ("one-key", "o" * 40))
    make_users(server)
    assert may(lambda: client(server, "FIRM").get_object("firm", key).close()) == bool(OBJECTS[key])


def test_it_waits_for_the_server(monkeypatch, capsys):
    script = runpy.run_path(str(SCRIPT))
    script["main"].__globals__["PATIENCE_S"] = 0.1
    with socket.create_server(("127.0.0.1", 0)) as probe:
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}"
    for name, value in {"FIRM_S3_ENDPOINT": nobody, "ROOT_ACCESS_KEY": "a", "ROOT_SECRET_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "firm", "kfp", "logs"])
    monkeypatch.setenv("FIRM_ACCESS_KEY", "a")
    monkeypatch.setenv("FIRM_SECRET_KEY", "b")
    start = time.monotonic()
    with pytest.raises(SystemExit, match="made no users"):
        script["main"]()
    assert time.monotonic() - start < 30 and "waiting for MinIO" in capsys.readouterr().err
