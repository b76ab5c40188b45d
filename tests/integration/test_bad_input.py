"""What a user does wrong ends with one clear message, its exit code and no traceback; nothing written is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from integration.slips import Case, Result, complains, firm, run, stages, write
from PIL import Image
from shared import HTTPRequest, gate, rendered, serving, small_run

from firm.images import encode_image

SMALL = small_run(rendered(48), shard_size=8, batch_size=4, test_share=0.5)
SMALL += f"bench: {{num_bootstrap: 10, sources: [], gate: {gate({'metric': 'coverage', 'at_least': 0.9})}}}\n"
JUDGES = """
class Banana:
    def complete(self, messages, **options):
        return "banana"

class NotANumber:
    def complete(self, messages, **options):
        scores = '{"reasoning": "", "score": [NaN, NaN, NaN]}'
        return scores if "technical quality" in str(messages) else "\\\\boxed{nan}"

def failing(split):
    raise RuntimeError("no database")
"""
FILES = "curation.sources=[{kind: files, name: mine, path: mine.jsonl}]"
SCORES = "bench.sources=[{kind: scores, name: people, path: scores.jsonl}]"
PROMPTS = "prompts={path: %s, test_share: 0.5}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "judges.py").write_text(JUDGES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["Nothing"]}')
    return tmp_path


# ---- caught before any stage starts: exit code 2 ---------------------------------------------------------------------

CASES: dict[str, Case] = {  # files to write, assignments, what the message must name
    "unknown key": ({}, ["rl.lr=1"], ["rl.lr"]),
    "unknown section": ({}, ["rll.max_epochs=1"], ["rll"]),
    "unknown key in the file": ({"small.yaml": SMALL + "rl: {lr: 1}\n"}, [], ["small.yaml", "rl.lr"]),
    "impossible value": ({}, ["curation.test_share=2"], ["curation.test_share", "less than or equal to 1"]),
    "not a number": ({}, ["rl.beta=.nan"], ["rl.beta", "finite"]),
    "every mistake at once": ({}, ["seed=-1", "rl.lr=1"], ["2 impossible", "seed", "rl.lr"]),
    "no equals sign": ({}, ["seed"], ["--set 'seed'", "key=value"]),
    "no such list item": ({}, ["curation.sources.7.name=x"], ["curation.sources.7.name"]),
    "value that is not YAML": ({}, ["seed=[1"], ["--set seed", "'[1'"]),
    "syntax error": ({"small.yaml": "name: [\n"}, [], ["small.yaml", "line 2"]),
    "not a mapping": ({"small.yaml": "- a\n"}, [], ["small.yaml", "mapping"]),
    "its own base": ({"small.yaml": "base: small.yaml\n"}, [], ["small.yaml -> "]),
    "prompts missing": ({}, [PROMPTS % "absent.txt"], ["absent.txt", "No such file", "prompts.path"]),
    "prompts empty": ({"p.txt": "\n \n"}, [PROMPTS % "p.txt"], ["p.txt", "empty"]),
    "prompts malformed": ({"p.jsonl": '"a"\n{"prompt"\n'}, [PROMPTS % "p.jsonl"], ["p.jsonl, line 2", "not valid"]),
    "prompts not UTF-8": ({"p.txt": b"caf\xe9"}, [PROMPTS % "p.txt"], ["p.txt", "UTF-8"]),
    "prompts of one split": ({"p.txt": "a red circle"}, ["prompts={path: p.txt, test_share: 0}"], ["p.txt", "test"]),
    "prompt function no colon": ({}, ["prompts.function=firm.shapes"], ["prompts.function", "package.module:"]),
    "prompt function of no module": ({}, ["prompts.function=nowhere:f"], ["prompts.function", "'nowhere'"]),
    "prompt function without module": ({}, ["prompts.function=:f"], ["prompts.function", "':f'"]),
    "prompt function that is a number": ({}, ["prompts.function=firm.shapes.scene:SIZE"], ["prompts.function", "SIZE"]),
    "prompt function that fails": ({}, ["prompts.function=judges:failing"], ["prompts.function", "no database"]),
    "prompt function of no prompts": ({}, ["prompts.function=posixpath:dirname"], ["prompts.function", "no list"]),
    "module that fails": ({"bad.py": "1 / 0"}, ["prompts.function=bad:f"], ["prompts.function", "ZeroDivisionError"]),
    "policy missing": ({}, ["policy.model=./nowhere"], ["policy.model", "./nowhere"]),
    "policy is no pipeline": ({}, ["policy.model=./other"], ["policy.model", "model_index.json"]),
    "policy is a critic": ({}, ["policy.model=pkg://firm.shapes/weights/critic"], ["policy.model", "weights/critic"]),
    "policy is of another family": (
        {"other/model_index.json": '{"_class_name": "Flux"}'},
        ["policy.model=./other"],
        ["policy.model", "a Flux,"],
    ),
    "policy of no family": ({}, ["policy.family=unheard-of"], ["policy.family", "'unheard-of'", "sd3"]),
    "source of no family": (
        {},
        [
            "curation.sources=[{kind: generated, name: x, num_images: 1, num_inference_steps: 1, policy: "
            "{family: unheard-of, model: ./other, resolution: 32}}]"
        ],
        ["curation.sources.0.policy.family", "'unheard-of'", "sd3"],
    ),
    "policy of no package": ({}, ["policy.model=pkg://nowhere/x"], ["policy.model", "pkg://nowhere/x"]),
    "source of no pipeline": (
        {},
        [
            "curation.sources=[{kind: generated, name: x, num_images: 1, num_inference_steps: 1, policy: "
            "{model: ./other, resolution: 32}}]"
        ],
        ["curation.sources.0.policy.model", "./other"],
    ),
    "critic is a generator": ({}, ["critic.model=pkg://firm.shapes/weights/base"], ["critic.model", "config.json"]),
    "critic of another kind": ({}, ["critic.model=./other"], ["critic.model", "model_type"]),
    "candidates missing": ({}, [FILES], ["mine.jsonl", "No such file"]),
    "candidates malformed": ({"mine.jsonl": '\n{"prompt": "a"\n'}, [FILES], ["mine.jsonl, line 2"]),
    "candidates without image": ({"mine.jsonl": '{"prompt": "a"}'}, [FILES], ["mine.jsonl, line 1", "'image'"]),
    "image missing": ({"mine.jsonl": '{"prompt": "a", "image": "a.png"}'}, [FILES], ["mine.jsonl, entry 0: a.png"]),
    "rubrics of generation and of editing": (
        {},
        ["curation.dimensions.execution={rubric: evaluate_execution}"],
        ["curation.dimensions.", "judges 1 image(s)", "judges 2", "rubrics of one of the two"],
    ),
    "plans without a planner": ({}, ["curation.planner=null"], ["curation", "plan_then_score needs a planner"]),
    "a report that is a score": (
        {},
        ["curation.reporter_rubrics=[execution]"],
        ["curation.reporter_rubrics.0", "judges execution, not no dimension"],
    ),
    "a bound of no share": ({}, ["rl.monitors.copies=50"], ["rl.monitors.copies", "less than or equal to 1"]),
    "judge that is not there": ({}, ["auditor.judge.target=judges:Nobody"], ["auditor.judge.target", "judges:Nobody"]),
    "judge at no URL": (
        {},
        ["curation.evaluator={kind: endpoint, base_url: localhost, model: m}"],
        ["base_url", "localhost"],
    ),
    "rubric of another dimension": (
        {},
        ["critic.rubrics.quality=short_instruction_following"],
        ["critic.rubrics.quality", "judges instruction_following, not quality"],
    ),
    "dimension that no rubric judges": (
        {},
        ["curation.dimensions.beauty={rubric: quality}"],
        ["curation.dimensions.beauty.rubric", "judges quality, not beauty"],
    ),
    "plan as evaluator": ({}, ["curation.dimensions.quality.rubric=plan"], ["judges no dimension, not quality"]),
    "unknown rubric": ({}, ["critic.rubrics.quality=nice"], ["'nice'", "short_quality"]),
    "gate on no metric": (
        {},
        ["bench.gate.rules=[{metric: acc, at_least: 1}]"],
        ["bench.gate.rules.0.metric", "'acc'", "coverage"],
    ),
    "gate on no source": (
        {},
        ["bench.gate.rules=[{metric: mae, source: x, at_most: 1}]"],
        ["bench.gate.rules.0.source", "'x'", "rendered"],
    ),
    "gate on no dimension": (
        {},
        ["bench.gate.rules=[{metric: mae, dimension: beauty, at_most: 1}]"],
        ["bench.gate.rules.0.dimension", "'beauty'", "quality"],
    ),
    "gate with a gap": (
        {},
        ["bench.gate.accept_gaps=[]"],
        ["quality.skill_low", "instruction_following.pairwise", "bench.sources", "accept_gaps"],
    ),
    "scores that are no scores": (
        {"scores.jsonl": '{"prompt": "p", "image": "a.png", "scores": {"quality": 7}}'},
        [SCORES],
        ["scores.jsonl, line 1", "scores.quality", "less than or equal to 5"],
    ),
    "scores of an image that is missing": (
        {"scores.jsonl": '{"prompt": "p", "image": "a.png", "scores": {"quality": 4}}'},
        [SCORES],
        ["scores.jsonl, line 1", "a.png", "No such file"],
    ),
    "store of no kind": ({}, ["store=ftp://host/x"], ["ftp://host/x"]),
    "not UTF-8": ({"small.yaml": b"name: caf\xe9\n"}, [], ["small.yaml", "UTF-8"]),
    "a date, then more": ({}, ["name=2024-01-01", "seed=1"], ["name"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_slip_is_named_before_anything_starts(folder: Path, here: Callable[..., Result], case: str) -> None:
    files, assignments, words = CASES[case]
    write(folder, files)
    complains(here(*run("small.yaml", *assignments)), 2, *words)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("case", ["unknown key", "module that fails", "policy is no pipeline"])
def test_the_command_ends_so_too(folder: Path, case: str) -> None:
    files, assignments, words = CASES[case]
    write(folder, files)
    complains(firm(folder, *assignments), 2, *words)
    assert not (folder / "runs").exists()


def test_unknown_presets_are_named(here: Callable[..., Result]) -> None:
    complains(here("run", "gen-nothing"), 2, "'gen-nothing'", "gen-shapes")
    complains(here("run", "absent.yaml"), 2, "'absent.yaml'")
    complains(here("config", "show", "gen-nothing"), 2, "'gen-nothing'")


def test_a_store_in_s3_needs_credentials(folder: Path) -> None:
    env = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "x", "FIRM_S3_ENDPOINT": "http://127.0.0.1:1"}
    complains(firm(folder, "store=s3://bucket/x", env=env), 2, "AWS_ACCESS_KEY_ID", "s3://bucket/x")


# ---- candidates, disks ---------------------------------------------------------------------------------------------


def test_a_corrupt_image_is_named(folder: Path) -> None:
    (folder / "a.png").write_bytes(encode_image(Image.effect_noise((32, 32), 99))[:500])  # its head is intact
    rows = [json.dumps({"prompt": f"picture {i}", "image": "a.png"}) for i in range(40)]  # enough for both splits
    (folder / "mine.jsonl").write_text("\n".join(rows))
    result = firm(folder, FILES)
    complains(result, 2, "curation failed", "mine.jsonl, entry ", ": a.png", "cannot decode", "run.log")
    assert "Traceback" not in (folder / "runs" / "small" / "run.log").read_text()


def mount(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.decode()}")


@pytest.fixture
def disk(folder: Path) -> Iterator[Callable[[str], Path]]:
    """disk(options): a file system of its own; called again, it is changed."""
    path = folder / "disk"
    mounted: list[str] = []

    def make(options: str) -> Path:
        mount(path, f"remount,{options}" if mounted else options)
        mounted.append(options)
        return path

    yield make
    if mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_store_that_cannot_be_written_is_named(
    folder: Path, here: Callable[..., Result], disk: Callable[[str], Path]
) -> None:
    complains(here(*run("small.yaml", "store=/proc/firm")), 1, "/proc/firm")
    (folder / "file").write_text("")
    complains(here(*run("small.yaml", "store=file")), 1, f"{folder}/file")
    read_only = disk("ro,size=1g")
    complains(here(*run("small.yaml", f"store={read_only}")), 1, "read-only", str(read_only))


def begun(store: Path) -> Path:
    """A store with a stage of the run in it, so that it is not asked for room for all of them."""
    store.joinpath("small", "evaluate-0123456789ab").mkdir(parents=True)
    store.joinpath("small", "evaluate-0123456789ab", "manifest.json").touch()
    return store


def shards(store: Path) -> dict[str, int]:
    """Finished shards of judgements and when they were written."""
    return {str(p): p.stat().st_mtime_ns for p in store.glob("small/curation-*/judged/part-*.parquet")}


@pytest.mark.slow
def test_a_full_disk_loses_nothing(folder: Path, disk: Callable[[str], Path]) -> None:
    store = begun(disk("size=160k"))
    complains(firm(folder, f"store={store}"), 1, "disk full", f"{store}/small/curation-")
    before = shards(store)
    assert 1 <= len(before) < 6
    disk("size=8m")
    result = stages(folder, "curation", f"store={store}")
    assert result.returncode == 0, result.stderr
    assert len(shards(store)) == 6 and before.items() <= shards(store).items()


def test_a_disk_full_to_the_last_byte_is_named(folder: Path, disk: Callable[[str], Path]) -> None:
    store = begun(disk("size=60k"))  # the log and the progress file are on it, too
    (store / "filler").write_bytes(b"0" * 44000)
    result = firm(folder, f"store={store}")
    complains(result, 1, f"{store}/small")
    assert "disk full" in result.stderr or "No space left" in result.stderr
    disk("size=8m")
    result = stages(folder, "curation", f"store={store}")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_disk_that_a_training_job_fills_is_named(folder: Path, disk: Callable[[str], Path]) -> None:
    store = disk("size=48m")
    options = (f"store={store}", "sft.max_steps=2", "sft.checkpoint_steps=1")
    assert stages(folder, "curation", *options).returncode == 0
    filler = store / "filler"
    for left in (0, 60_000, 1_500_000):
        filler.unlink(missing_ok=True)
        filler.write_bytes(b"0" * (shutil.disk_usage(store).free - left))
        result = stages(folder, "sft", *options, timeout=300)
        assert result.returncode == 1
        last = result.stderr[result.stderr.rindex("error: ") :]  # behind the job's log, and what TensorBoard says
        assert "disk full" in last and f"{store}/small/sft-" in last and "\n  -> free some space" in last
    filler.unlink()
    result = stages(folder, "sft", *options, timeout=300)
    assert result.returncode == 0, result.stderr


def test_a_journal_that_cannot_grow_is_named(folder: Path) -> None:
    limit = 7000  # bytes a file

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    result = stages(folder, "curation", "curation.shard_size=1", preexec_fn=small_files)
    complains(result, 1, "disk full", "evaluator.jsonl")


# ---- S3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_s3_server_that_is_not_there_is_named(folder: Path) -> None:
    env = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "secret", "FIRM_S3_ENDPOINT": "http://127.0.0.1:1"}
    result = firm(folder, "store=s3://bucket/x", env=env)
    complains(result, 1, "cannot reach S3", "127.0.0.1:1", "FIRM_S3_ENDPOINT")


def test_credentials_that_s3_refuses_are_named(folder: Path, s3_server: Any) -> None:
    import urllib3

    url = s3_server.env["FIRM_S3_ENDPOINT"]
    urllib3.request("POST", f"{url}/moto-api/reset-auth", body=b"0")
    try:
        env = {**s3_server.env, "AWS_SECRET_ACCESS_KEY": "very-wrong"}
        result = stages(folder, "curation", "store=s3://firm-test/x", env=env)
    finally:
        urllib3.request("POST", f"{url}/moto-api/reset-auth", body=b"inf")
    complains(result, 1, "refused the credentials", "AWS_SECRET_ACCESS_KEY", "s3://firm-test/x")
    assert "very-wrong" not in result.stderr


# ---- judges that answer nonsense -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluator_that_answers_nonsense_is_named(folder: Path) -> None:
    judge = "curation.evaluator={kind: python, target: 'judges:Banana'}"
    result = firm(folder, judge)
    complains(result, 1, "curation failed", "no valid judgement", "unparsable", "banana", "curation.evaluator")
    assert len(shards(folder / "runs")) == 6  # with the raw answers in them


def test_scores_that_are_no_numbers_are_not_valid(folder: Path) -> None:
    result = stages(folder, "curation", "curation.evaluator={kind: python, target: 'judges:NotANumber'}")
    complains(result, 1, "no valid judgement", "non_finite")


def banana(request: HTTPRequest) -> None:
    """A chat endpoint that has gone mad."""
    answer = {"choices": [{"message": {"content": "banana"}, "finish_reason": "stop"}]}
    request.reply(200, json.dumps(answer).encode())


def test_a_critic_that_answers_nonsense_does_not_pass_the_gate(folder: Path) -> None:
    with serving(banana) as url:
        endpoint = f"critic.endpoint={{kind: endpoint, base_url: '{url}/v1', model: mad}}"
        rubrics = "critic.rubrics={instruction_following: short_instruction_following, quality: short_quality}"
        result = stages(
            folder, "curation sft bench gate", "critic.kind=endpoint", endpoint, rubrics, "reward.soft=false"
        )
    complains(result, 1, "the critic is not trusted", "coverage against the teacher's scores is 0.00", "at least 0.90")
    assert (folder / "bench").exists() and not (folder / "gate").exists()


def test_an_endpoint_that_is_not_there_is_named(folder: Path) -> None:
    judge = "curation.%s={kind: endpoint, base_url: 'http://127.0.0.1:9/v1', model: m, deadline_s: 0.3}"
    result = firm(folder, judge % "planner", judge % "evaluator")
    complains(result, 1, "cannot be reached", "http://127.0.0.1:9/v1", "base_url")


def test_ctrl_c_stops_with_a_sentence(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "firm.cli", "run", "small.yaml"], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None and "started" in process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and said == "stopped; run the same command again to go on\n"
