"""Data that users give in S3: put there, streamed, pinned by hash; and every slip with it."""

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from integration.conftest import S3Server
from integration.own import COMMIT, ROWS, write_edits
from integration.slips import call, complains
from shared import relay, serving
from typer.testing import CliRunner

from firm import cli, preflight
from firm.config import PromptsConfig, RunConfig
from firm.config.loading import check_for_cluster, load_config
from firm.prompts import load_prompts
from firm.records import SPLITS, Prompt, UserError
from firm.stage import execute
from firm.storage import given as storage_given
from firm.storage.given import SUMS, given
from firm.storage.open import open_store
from firm.storage.pictures import image_size, open_image
from firm.storage.put import IMAGES, put, uploaded


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder: edits with their images. What is known of S3 is forgotten afterwards, as in a new process."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    data = tmp_path / "data"
    write_edits(data)
    storage_given._in_s3.cache_clear()
    yield data
    storage_given._in_s3.cache_clear()


def forget() -> None:
    """As a new process knows nothing of what it has read."""
    storage_given._in_s3.cache_clear()


def prompts_of(path: str | Path) -> list[Prompt]:
    config = PromptsConfig(path=str(path), test_share=0.5)
    return [prompt for split in SPLITS for prompt in load_prompts(config, split)]


def shade(image: str | None) -> object:
    assert image is not None
    return open_image(image, "").getpixel((0, 0))


def folder_of(uri: str) -> str:
    return uri.partition("#")[0].rpartition("/")[0]


# ---- what is put is what is read


def test_what_is_put_is_read_as_if_it_were_here(folder: Path, s3_uri: str) -> None:
    uri = put(folder / "edits.jsonl", s3_uri)
    assert uri.startswith(s3_uri) and "/edits.jsonl#sha256=" in uri
    here, there = prompts_of(folder / "edits.jsonl"), prompts_of(uri)
    assert [p.text for p in there] == [p.text for p in here]
    assert [shade(p.image) for p in there] == [shade(p.image) for p in here]
    assert all(image_size(str(p.image), "") == (8, 8) for p in there)
    for follow in ((), ("source_image",), IMAGES):
        assert given(uri).content_hash(follow) == given(str(folder / "edits.jsonl")).content_hash(follow)


def test_the_size_of_an_image_is_asked_for_once(
    folder: Path, s3_server: S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Source images are read again in every epoch."""
    image = prompts_of(put(folder / "edits.jsonl", s3_uri))[0].image
    asked: list[str] = []
    server = s3_server.env["FIRM_S3_ENDPOINT"]
    with serving(lambda request: (asked.append(request.command), relay(request, server))[1]) as url:
        monkeypatch.setenv("FIRM_S3_ENDPOINT", url)
        seen = [(image_size(str(image), ""), open_image(str(image), "").tobytes()) for _ in range(3)]
    assert seen[0] == seen[1] == seen[2]
    assert asked.count("HEAD") == 1 and asked.count("GET") >= 6


def test_the_list_of_hashes_is_one_that_sha256sum_reads(folder: Path, s3_uri: str) -> None:
    uri = put(folder / "edits.jsonl", s3_uri)
    listed = open_store(folder_of(uri)).get("edits.jsonl" + SUMS)
    subprocess.run(["sha256sum", "--check", "--strict", "-"], input=listed, cwd=folder, check=True, capture_output=True)
    assert len(listed.splitlines()) == 2 * ROWS + 1


def test_candidates_are_fetched_one_by_one(folder: Path, s3_uri: str, tmp_path: Path) -> None:
    from firm.config import FilesSource
    from firm.curation.sources import Files
    from firm.prompts import Splits

    def files(path: str | Path) -> Files:
        return Files(FilesSource(name="mine", path=str(path)), Splits(PromptsConfig(test_share=0)))

    uri = put(folder / "edits.jsonl", s3_uri)
    files(uri).check(2)
    open_store(folder_of(uri)).delete("images/edit-5.png")
    made = files(uri).make("train", range(5))
    assert [c.images for c in made] == [c.images for c in files(folder / "edits.jsonl").make("train", range(5))]
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.suffix == ".png"], "images are not kept"
    with pytest.raises(UserError, match="entry 5|edit-5"):
        files(uri).make("train", [5])


def test_scores_are_read_from_there(folder: Path, s3_uri: str) -> None:
    from firm.bench.scores import ScoreFile
    from firm.config import ScoresSource

    scores = ScoreFile(ScoresSource(name="people", path=put(folder / "edits.jsonl", s3_uri)), ["quality"], None)
    scores.check({"quality": 2})
    assert [len(item.images()) for item in scores.items()] == [2] * ROWS


def test_without_a_list_of_hashes_everything_counts(folder: Path, s3_uri: str) -> None:
    """A file that was brought there in another way."""
    store = open_store(s3_uri)
    for path in folder.rglob("*.*"):
        store.put(path.relative_to(folder).as_posix(), path)
    uri = f"{s3_uri}/edits.jsonl"
    assert [shade(p.image) for p in prompts_of(uri)] == [shade(p.image) for p in prompts_of(folder / "edits.jsonl")]
    before = given(uri).content_hash(IMAGES)
    assert before == given(str(folder / "edits.jsonl")).content_hash(IMAGES)
    store.put("images/edit-3.png", b"another")
    forget()
    assert given(uri).content_hash(IMAGES) != before
    assert given(uri).content_hash(("source_image",)) == given(str(folder / "edits.jsonl")).content_hash(
        ("source_image",)
    )


def test_what_is_there_is_not_sent_again(folder: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = put(folder / "edits.jsonl", s3_uri)
    monkeypatch.setattr("firm.storage.s3.S3Store.put", None)
    assert put(folder / "edits.jsonl", s3_uri) == uri


# ---- a run


def own_run(folder: Path, store: str) -> RunConfig:
    """Prompts, and candidates of both rounds, of one file."""
    path = folder / "edits.jsonl"
    changes = [
        f"store={store}",
        "launch={kind: pytorchjob}",
        "rounds=2",
        f"prompts={{path: {path}, test_share: 0.5}}",
        f"curation.sources=[{{kind: files, name: mine, path: {path}}}]",
        f"further_rounds.curation.sources=[{{kind: files, name: more, path: {path}}}]",
    ]
    return load_config("edit-shapes", changes)


def test_a_run_with_a_store_in_s3_takes_its_data_there(folder: Path, s3_uri: str) -> None:
    config = own_run(folder, s3_uri)
    assert uploaded(config.model_copy(update={"store": "runs"})).prompts == config.prompts
    there = uploaded(config)
    assert str(folder) not in there.model_dump_json()
    assert there == uploaded(config) == uploaded(there)
    check_for_cluster(there)
    assert there.prompts.path and there.prompts.path.startswith(f"{s3_uri}/_data/")
    assert [p.text for p in prompts_of(there.prompts.path)] == [p.text for p in prompts_of(folder / "edits.jsonl")]


def test_firm_run_starts_with_what_it_has_uploaded(
    folder: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pipelines import local

    started: list[RunConfig] = []
    monkeypatch.setattr(local, "run_locally", lambda config, folder: started.append(config))
    monkeypatch.setattr("firm.preflight.check", lambda config: None)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({"base": "gen-shapes", "prompts": {"path": str(folder / "edits.jsonl")}}))
    words = ["run", str(path), "--set", f"store={s3_uri}"]
    assert CliRunner().invoke(cli.app, words, catch_exceptions=False).exit_code == 0
    assert started[0].prompts.path is not None and started[0].prompts.path.startswith(f"{s3_uri}/_data/")


def test_a_local_path_is_refused_with_the_command_before_a_run_is_submitted(folder: Path, s3_uri: str) -> None:
    config = own_run(folder, s3_uri)
    command = f"firm put {folder / 'edits.jsonl'} s3://firm-test/data"
    with pytest.raises(UserError, match=command) as caught:
        check_for_cluster(config, in_pod=False)
    assert caught.value.exit_code == 2 and "prompts.path" in caught.value.where
    check_for_cluster(config)  # a pod that has it
    (folder / "edits.jsonl").unlink()
    with pytest.raises(UserError, match=command):
        check_for_cluster(config)
    check_for_cluster(config, in_pod=False)  # it may be in the pods alone
    with pytest.raises(UserError, match="firm put edits.jsonl"):
        check_for_cluster(load_config("gen-shapes-kind", ["prompts.path=edits.jsonl"]), in_pod=False)


def test_json_of_a_configuration_with_a_local_path_is_refused(folder: Path) -> None:
    words = ["config", "show", "gen-shapes-kind", "--json", "--set", f"prompts.path={folder / 'edits.jsonl'}"]
    complains(call(folder, "-m", "firm.cli", *words), 2, "firm put", "prompts.path")


def test_the_first_stage_finds_what_a_later_one_would_miss(
    folder: Path, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "a-pod")
    path = f"further_rounds.curation.sources=[{{kind: files, name: more, path: {s3_uri}/absent.jsonl}}]"
    config = load_config("gen-shapes-kind", [f"store={s3_uri}", "rounds=2", path])
    with pytest.raises(SystemExit) as ended:
        execute("curation", config.model_dump(mode="json", exclude_none=True), {}, str(tmp_path / "out"))
    assert ended.value.code == 2 and "absent.jsonl" in capsys.readouterr().err


def test_the_command_of_the_documentation(folder: Path, s3_server: S3Server, s3_uri: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "bring-your-own.md").read_text()
    [command] = re.findall(r"^ {4}firm (put .*)$", text, re.MULTILINE)
    [example] = [
        yaml for yaml in re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) if "edits" in yaml
    ]
    name, bucket = command.split()[1], command.split()[2].split("/")[2]
    s3_server.client.make_bucket(bucket)
    result = call(folder, "-m", "firm.cli", *command.split(), timeout=300)
    assert result.returncode == 0 and f"s3://{bucket}/" in result.stdout and "prompts.path" in result.stderr
    (tmp_path / "my.yaml").write_text(example.replace(name, result.stdout.strip()))
    config = load_config(str(tmp_path / "my.yaml"), ["prompts.test_share=0.5"])
    assert config.prompts.path == result.stdout.strip() == config.curation.sources[0].path
    preflight.check(config)


# ---- slips


def test_what_has_changed_since_is_refused_by_its_hash(folder: Path, s3_uri: str) -> None:
    uri = put(folder / "edits.jsonl", s3_uri)
    store = open_store(folder_of(uri))
    image = given(uri).beside("images/source-2.png")
    store.put("images/source-2.png", (folder / "images" / "source-3.png").read_bytes())
    with pytest.raises(UserError, match="the image is not the one that was put") as caught:
        open_image(image, "here")
    assert caught.value.exit_code == 2
    forget()
    store.put("edits.jsonl", b"{}")
    with pytest.raises(UserError, match="the file is not the one that was put"):
        given(uri).fetch()
    store.put("edits.jsonl", folder / "edits.jsonl")
    given(uri).fetch()
    forget()
    store.put("edits.jsonl" + SUMS, store.get("edits.jsonl" + SUMS)[:-1])
    with pytest.raises(UserError, match="the list of hashes is not the one that was put"):
        given(uri).fetch()
    store.delete("edits.jsonl" + SUMS)
    forget()
    with pytest.raises(UserError, match="the list of hashes"):
        given(uri).content_hash(())


PUT_SLIPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda data: (data / "edits.jsonl").unlink(), "edits.jsonl"),
    "a row that is no JSON": (lambda data: (data / "edits.jsonl").write_text('{"prompt": \n'), "line 1"),
    "an image that is missing": (lambda data: (data / "images" / "edit-4.png").unlink(), "edit-4.png"),
    "an image that is damaged": (lambda data: (data / "images" / "edit-4.png").write_bytes(b"\x89PNG"), "edit-4.png"),
    "an image of another folder": (
        lambda data: (data / "edits.jsonl").write_text('{"image": "../data/images/edit-4.png"}'),
        "not below the folder",
    ),
    "an absolute path": (lambda data: (data / "edits.jsonl").write_text('{"image": "/x.png"}'), "not below the folder"),
}


@pytest.mark.parametrize("slip", PUT_SLIPS)
def test_what_cannot_be_read_is_not_put(folder: Path, s3_uri: str, slip: str) -> None:
    change, word = PUT_SLIPS[slip]
    change(folder)
    with pytest.raises(UserError) as caught:
        put(folder / "edits.jsonl", s3_uri)
    assert word in str(caught.value)
    assert open_store(s3_uri).list() == []


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("s3://firm-nowhere/edits.jsonl", "bucket 'firm-nowhere' does not exist"),
        ("s3://firm-test/absent.jsonl", "there is no such file in S3"),
        ("s3://firm-test/absent.jsonl#sha256=" + "0" * 64, "there is no such file in S3"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, s3_uri: str, uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        prompts_of(uri)
    assert uri.partition("#")[0] in caught.value.where


def test_an_image_that_is_not_beside_the_file_is_named(folder: Path, s3_uri: str) -> None:
    uri = put(folder / "edits.jsonl", s3_uri)
    open_store(folder_of(uri)).delete("images/source-0.png")
    with pytest.raises(UserError, match="no such object.*source-0"):
        image_size(given(uri).beside("images/source-0.png"), "")
    for name in ("images/source-9.png", "../other.png", "/other.png"):
        with pytest.raises(UserError, match="is not in the list of hashes|nowhere beside"):
            given(uri).beside(name)


def test_without_credentials_it_is_said_which(folder: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    for act in (lambda: prompts_of(f"{s3_uri}/edits.jsonl"), lambda: put(folder / "edits.jsonl", s3_uri)):
        with pytest.raises(UserError, match="no S3 credentials.*AWS_ACCESS_KEY_ID"):
            act()


@pytest.mark.parametrize("root", [f"hf://datasets/org/data@{COMMIT}", "s3://bucket"])
def test_rows_name_nothing_outside(root: str, monkeypatch: pytest.MonkeyPatch, s3_uri: str) -> None:
    monkeypatch.setattr("firm.storage.s3.S3Store.exists", lambda *_: False)
    file = given(f"{root}/folder/edits.jsonl")
    assert [file.beside(name) for name in ("a.png", "../b/./c.png")] == [f"{root}/folder/a.png", f"{root}/b/c.png"]
    for name in ("../../x.png", "/x.png", "..", "../.."):
        with pytest.raises(UserError, match="nowhere beside the file"):
            file.beside(name)


@pytest.mark.parametrize("target", ["elsewhere", "file:///tmp/x", "hf://datasets/org/data"])
def test_data_is_put_into_s3_only(folder: Path, target: str) -> None:
    with pytest.raises(UserError, match="into S3 only"):
        put(folder / "edits.jsonl", target)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("https://example.com/prompts.txt", "no data is read from https"),
        ("s3://bucket", "s3://BUCKET/PATH/FILE"),
        ("s3://bucket/folder/", "s3://BUCKET/PATH/FILE"),
        ("s3://bucket/x.jsonl#sha256=1234", None),
        ("s3://key:secret@bucket/x.jsonl", "s3://BUCKET/PATH/FILE"),
        ("hf://datasets/org/data/edits.jsonl", "digits of a commit"),
        ("hf://datasets/org/data@main/edits.jsonl", "digits of a commit"),
        (f"hf://datasets/org/data@{COMMIT}/edits.jsonl", None),
        (f"hf://datasets/org/data@{COMMIT}/edits.jsonl#sha256={'0' * 64}", "pinned by its commit"),
    ],
)
def test_impossible_paths_are_refused_when_they_are_read(path: str, word: str | None) -> None:
    if word is None:
        assert PromptsConfig(path=path).path == path
        return
    with pytest.raises(ValueError, match=word):
        PromptsConfig(path=path)


# ---- kills

PUT = """
import os, signal, sys
from pathlib import Path
from firm.storage import s3
from firm.storage.put import put

send, left = s3.S3Store.put, iter(range(int(sys.argv[3]), -1, -1))

def dies(self, key, data):
    if key.endswith(sys.argv[4]) and next(left) == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    send(self, key, data)

s3.S3Store.put = dies
print(put(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize(("after", "of"), [(4, ".png"), (0, SUMS), (0, ".jsonl")])
def test_half_of_an_upload_is_not_visible_and_is_gone_on_with(folder: Path, s3_uri: str, after: int, of: str) -> None:
    result = call(folder, "-c", PUT, str(folder / "edits.jsonl"), s3_uri, str(after), of, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    store = open_store(s3_uri)
    there = [name for name, _ in store.list()]
    assert not [name for name in there if name.endswith(".jsonl")] and (after == 0) == (len(there) >= 2 * ROWS)
    said: list[str] = []
    uri = put(folder / "edits.jsonl", s3_uri, say=said.append)
    missing = 2 * ROWS + 1 - sum(name.endswith(".png") for name in there)
    assert f"uploading {missing} of {2 * ROWS + 1}" in said[0]
    assert [shade(p.image) for p in prompts_of(uri)] == [shade(p.image) for p in prompts_of(folder / "edits.jsonl")]
