"""Artifacts in a local store: visible once complete, verified when read."""

import json

import pytest

from firm.records import ArtifactRef, UserError
from firm.storage.artifacts import MANIFEST, Output
from firm.storage.files import TEMPORARY, sha256_file
from firm.storage.inputs import open_input, read_manifest, read_ref, write_ref


def make(uri, scratch=None) -> ArtifactRef:
    """An artifact of two files, one of them in a subfolder."""
    output = Output.open(str(uri), scratch)
    (output.folder / "model").mkdir(exist_ok=True)
    (output.folder / "model" / "weights").write_bytes(b"w" * 1000)
    (output.folder / "data").write_bytes(b"data")
    return output.commit("sft", "k", {"curation": "0" * 64}, {"loss": 0.5}, ["model", "data"])


def test_round_trip(tmp_path):
    ref = make(tmp_path / "a")
    folder = open_input(ref)
    assert folder == tmp_path / "a" and (folder / "model" / "weights").read_bytes() == b"w" * 1000
    manifest = read_manifest(ref)
    assert [(e.path, e.bytes) for e in manifest.entries] == [("data", 4), ("model/weights", 1000)]
    assert manifest.inputs == {"curation": "0" * 64} and manifest.metadata == {"loss": 0.5}
    assert ref.sha256 == sha256_file(tmp_path / "a" / MANIFEST)
    output = Output.open(ref.uri)
    assert output.manifest() == manifest and output.ref() == ref


def test_equal_runs_give_equal_manifests(tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.sha256 == second.sha256
    assert make(tmp_path / "a") == first  # committing again the same is fine


def test_incomplete_artifact_does_not_exist(tmp_path):
    output = Output.open(str(tmp_path / "a"))
    (output.folder / "data").write_bytes(b"data")
    output.publish("data")
    assert output.manifest() is None
    with pytest.raises(UserError):
        output.ref()
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        open_input(ArtifactRef(uri=output.uri, sha256="0" * 64))


def test_whoever_commits_later_gets_what_is_there(tmp_path):
    ref = make(tmp_path / "a")
    output = Output.open(ref.uri)
    assert output.commit("sft", "k", {}, {"loss": 0.1}, ["data"]) == ref
    with pytest.raises(UserError, match="another artifact is there already"):
        output.commit("sft", "other", {}, {}, ["data"])
    assert output.ref() == ref


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"w" * 999)])
def test_a_file_that_is_not_read_is_verified_by_size(tmp_path, damage):
    ref = make(tmp_path / "a")
    assert open_input(ref, only=("data", "absent")) == tmp_path / "a"
    damage(tmp_path / "a" / "model" / "weights")
    with pytest.raises(UserError, match="corrupt artifact") as caught:
        open_input(ref, only="data")
    assert caught.value.where.endswith("a/model/weights")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(b"w" * 999 + b"v"), "SHA-256 of the file differs"),
        (lambda path: path.write_bytes(b"w" * 10), "10 bytes, expected 1000"),
        (lambda path: path.unlink(), "file is missing"),
    ],
)
def test_damage_is_found_and_named(tmp_path, damage, message):
    ref = make(tmp_path / "a")
    damage(tmp_path / "a" / "model" / "weights")
    with pytest.raises(UserError, match=message) as caught:
        open_input(ref)
    assert caught.value.where.endswith("a/model/weights")


def test_changed_manifest_is_found(tmp_path):
    ref = make(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(path.read_text().replace("0.5", "0.6"))
    with pytest.raises(UserError, match="another one"):
        open_input(ref)


@pytest.mark.parametrize("content", ["", "[]", '{"stage": 1}', "\x00"])
def test_malformed_manifest(tmp_path, content):
    output = Output.open(str(tmp_path))
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(UserError, match="malformed manifest"):
        output.manifest()
    with pytest.raises(UserError, match="malformed manifest"):
        read_manifest(output.ref())


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../secret"])
def test_paths_stay_inside(tmp_path, path):
    (tmp_path / "secret").write_bytes(b"s")
    output = Output.open(str(tmp_path / "a"))
    for action in (output.publish, output.discard, lambda name: output.commit("s", "k", {}, {}, [name])):
        with pytest.raises(UserError, match="not a path inside"):
            action(path)
    entry = {"path": path, "bytes": 1, "sha256": sha256_file(tmp_path / "secret")}
    (output.folder / MANIFEST).write_text(json.dumps({"stage": "s", "key": "k", "entries": [entry]}))
    with pytest.raises(UserError, match="not a path inside"):
        open_input(output.ref())
    assert (tmp_path / "secret").exists()


def test_work_files_are_not_part_and_can_go(tmp_path):
    output = Output.open(str(tmp_path / "a"))
    for name in ("data", "journal", "work/one", "work/two", "working"):
        (output.folder / name).parent.mkdir(exist_ok=True)
        (output.folder / name).write_text(name)
    ref = output.commit("s", "k", {}, {}, ["data", "working"])
    output.discard("journal", "work", "never-there")
    assert sorted(p.name for p in output.folder.iterdir()) == ["data", MANIFEST, "working"]
    for name in ("data", MANIFEST):
        with pytest.raises(ValueError, match="part of the artifact"):
            output.discard(name)
    open_input(ref)


def test_opening_removes_unfinished_files(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"{TEMPORARY}x.123").write_text("half")
    (tmp_path / "a" / "journal").write_text("kept")
    assert [p.name for p in Output.open(str(tmp_path / "a")).folder.iterdir()] == ["journal"]


def test_missing_file_is_named(tmp_path):
    output = Output.open(str(tmp_path))
    for action in (output.publish, lambda name: output.commit("s", "k", {}, {}, [name])):
        with pytest.raises(UserError, match="no such file") as caught:
            action("absent")
        assert caught.value.where == str(tmp_path / "absent")


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/a"):
        Output.open(str(tmp_path / "file" / "a"))


def test_refs(tmp_path):
    ref = ArtifactRef(uri="s3://b/p", sha256="1" * 64)
    write_ref(ref, tmp_path / "x" / "ref.json")
    assert read_ref(tmp_path / "x" / "ref.json") == ref
    with pytest.raises(UserError, match="no such file"):
        read_ref(tmp_path / "absent.json")
    for content in ("", "{}", '{"uri": "a"}', "\xff"):
        (tmp_path / "bad.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="not a pointer"):
            read_ref(tmp_path / "bad.json")
