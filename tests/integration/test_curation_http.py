"""Curation over the real HTTP protocol: the same judgements, and no request twice whatever dies in between."""

import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import urllib3
from integration.asked import Teacher, until
from shared import HTTPRequest, rendered, serving, small_run, stage_command

from firm.config.loading import load_config
from firm.records import JudgedCandidate, Judgement, Manifest
from firm.shapes.serve import teacher_server
from firm.storage.inputs import read_manifest, read_ref
from firm.storage.shards import iter_shards

ROWS = 96
DIMENSIONS = 2
CONCURRENCY = 4
SMALL = small_run(rendered(ROWS), shard_size=16, batch_size=8, test_share=0.25)


def settings(folder: Path, url: str | None, *assignments: str) -> dict[str, Any]:
    (folder / "small.yaml").write_text(SMALL)
    chat = f"{{kind: endpoint, base_url: '{url}', model: pixel-teacher, concurrency: {CONCURRENCY}, deadline_s: 2}}"
    judges = [f"curation.{who}={chat}" for who in ("planner", "evaluator")] if url else []
    config = load_config(str(folder / "small.yaml"), [f"store={folder}", *judges, *assignments])
    return config.model_dump(mode="json", exclude_none=True)


def start(folder: Path, config: dict[str, Any]) -> subprocess.Popen[str]:
    command = stage_command("curation", config, {}, folder / "data")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def curate(folder: Path, url: str | None, *assignments: str) -> tuple[Path, Manifest]:
    """Run the stage to its end; its artifact."""
    process = start(folder, settings(folder, url, *assignments))
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    ref = read_ref(folder / "data")
    return Path(ref.uri), read_manifest(ref)


def stop_when(folder: Path, url: str, ready: Callable[[], bool], strike: Callable[[int], None]) -> tuple[int, str]:
    """Start the stage and strike once ready; its exit code and what it said."""
    process = start(folder, settings(folder, url))
    until(lambda: ready() or process.poll() is not None, "curation never got there")
    assert process.poll() is None, process.communicate()
    strike(process.pid)
    _, stderr = process.communicate(timeout=100)
    return process.returncode, stderr


@pytest.fixture(scope="module")
def whole(teacher: Teacher, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """An artifact made without interruption, from the same address."""
    made = curate(tmp_path_factory.mktemp("whole"), teacher.url)
    assert teacher.requests("rating").total() == ROWS * DIMENSIONS
    plans = teacher.requests("plan")
    assert 0 < plans.total() == len(plans) <= ROWS
    return made


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("small/curation-*/judged/part-*.parquet"))


def test_the_endpoint_judges_as_the_teacher_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    (tmp_path / "far").mkdir()
    near, _ = curate(tmp_path / "near", None)
    with teacher_server().running() as url:
        far, _ = curate(tmp_path / "far", url)
    columns = [
        [j.model_dump(exclude={"provenance": {"teacher"}}) for j in iter_shards(f / "judged", JudgedCandidate)]
        for f in (near, far)
    ]
    assert columns[0] == columns[1] and len(columns[0]) == ROWS
    assert {j.provenance.teacher for j in iter_shards(far / "judged", JudgedCandidate)} == {"pixel-teacher"}
    for split in ("train", "test"):
        assert (near / split / "part-00000.parquet").read_bytes() == (far / split / "part-00000.parquet").read_bytes()


@pytest.mark.slow
def test_killed_again_and_again_nothing_is_asked_twice(
    teacher: Teacher, whole: tuple[Path, Manifest], tmp_path: Path
) -> None:
    teacher.forget()
    kills = (10, 90, 150)  # ratings: in the first shard, and after others were finished
    for number in kills:
        before = {p: p.stat().st_mtime_ns for p in shards(tmp_path)}
        code, _ = stop_when(
            tmp_path,
            teacher.url,
            lambda number=number: teacher.requests("rating").total() >= number,  # type: ignore[misc]
            lambda pid: os.kill(pid, signal.SIGKILL),
        )
        assert code == -signal.SIGKILL
        assert before == {p: p.stat().st_mtime_ns for p in before}, "a finished shard was written again"
    assert shards(tmp_path)
    folder, manifest = curate(tmp_path, teacher.url)
    asked = teacher.requests("rating")
    assert len(asked) == ROWS * DIMENSIONS <= asked.total() <= ROWS * DIMENSIONS + CONCURRENCY * len(kills)
    plans = teacher.requests("plan")
    assert plans.total() <= len(plans) + len(kills)  # one at a time
    assert manifest == whole[1]
    for entry in manifest.entries:
        assert (folder / entry.path).read_bytes() == (whole[0] / entry.path).read_bytes()
    assert not (folder / "work").exists()


@pytest.mark.slow
def test_a_server_that_dies_is_named_and_the_run_goes_on_when_it_is_back(
    teacher: Teacher, whole: tuple[Path, Manifest], tmp_path: Path
) -> None:
    teacher.forget()
    code, said = stop_when(
        tmp_path, teacher.url, lambda: teacher.requests("rating").total() >= 80, lambda _: teacher.kill()
    )
    teacher.start()
    assert code == 1 and "Traceback" not in said
    assert said.count("error: ") == 1 and teacher.url in said and "\n  -> " in said
    _, manifest = curate(tmp_path, teacher.url)
    asked = teacher.requests("rating")
    assert len(asked) == ROWS * DIMENSIONS <= asked.total() <= ROWS * DIMENSIONS + CONCURRENCY
    assert manifest == whole[1]


@pytest.mark.slow
def test_half_a_pair_in_every_answer_ends_no_run(
    teacher: Teacher, whole: tuple[Path, Manifest], tmp_path: Path
) -> None:
    def spoil(request: HTTPRequest) -> None:
        said = urllib3.request("POST", f"{teacher.url}{request.path.removeprefix('/v1')}", body=request.body)
        request.reply(said.status, re.sub(rb'"content": ?"', rb"\g<0>\\ud800", said.data))

    teacher.forget()
    with serving(spoil) as address:
        code, _ = stop_when(
            tmp_path,
            f"{address}/v1",
            lambda: teacher.requests("rating").total() >= 40,
            lambda pid: os.kill(pid, signal.SIGKILL),
        )
        assert code == -signal.SIGKILL
        folder, _ = curate(tmp_path, f"{address}/v1")
    asked = teacher.requests("rating")
    assert len(asked) == ROWS * DIMENSIONS <= asked.total() <= ROWS * DIMENSIONS + CONCURRENCY
    mine, theirs = ([*iter_shards(f / "judged", JudgedCandidate)] for f in (folder, whole[0]))
    assert all(text.startswith("\ufffd") for j in mine for text in j.provenance.answers.values())
    assert [scores(j) for j in mine] == [scores(j) for j in theirs]


def scores(judged: JudgedCandidate) -> dict[str, int]:
    return {d: outcome.score for d, outcome in judged.assessment.items() if isinstance(outcome, Judgement)}


def test_a_finished_curation_asks_nobody(teacher: Teacher, whole: tuple[Path, Manifest]) -> None:
    teacher.forget()
    _, manifest = curate(whole[0].parent.parent, teacher.url)
    assert manifest == whole[1] and not teacher.log.read_text()
