"""What a run needs and has not is said before its first stage: GPUs, models of a hub, judges, room on the disk."""

import json
import shutil
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.slips import call, complains, firm
from shared import HTTPRequest, rendered, serving, small_run

import firm as firm_package
from firm import reach
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.disk import GB, Need, check_disk
from firm.records import UserError
from firm.shapes.teacher import PixelTeacher
from firm.storage.store import LocalStore

Answer = Callable[[dict[str, Any]], tuple[int, str]]
TEACHER = {"kind": "endpoint", "deadline_s": 1}

# ---- models of a hub -------------------------------------------------------------------------------------------------

INDEX = b'{"vae": ["diffusers", "AutoencoderKL"], "transformer": ["diffusers", "SD3Transformer2DModel"]}'
FILES = {
    "org/critic": {"config.json": 9, "a.safetensors": 700, "b.safetensors": 300, "original/c.safetensors": 5},
    "org/policy": {
        "model_index.json": len(INDEX),
        "sd.safetensors": 8000,
        "text_encoders/t5.safetensors": 5000,
        "transformer/t.fp16.safetensors": 40,
        "vae/v.safetensors": 20,
        "transformer/t.safetensors": 80,
    },
}
GATED = "org/gated"
FIND = """
import json, sys
from pathlib import Path
from huggingface_hub import constants
from firm.hub import weights_of_hub
from firm.records import UserError
from firm.shapes.teacher import PixelTeacher
for model, file in json.loads(sys.argv[1]):
    try:
        found = weights_of_hub(model, file, "policy.model")
        print(json.dumps([found.below(), found.below("transformer/"), found.missing]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def hub(request: HTTPRequest) -> None:
    """A hub with two models, and one that is for holders of a token alone."""
    path = request.path.partition("?")[0]
    model, _, name = path.removeprefix("/api/models").strip("/").partition("/resolve/main/")
    files = FILES["org/critic"] if model == GATED else FILES.get(model, {})
    if model == GATED and name and request.headers.get("Authorization") != "Bearer good":
        return request.reply(403, b"", X_Error_Code="GatedRepo")
    if path.startswith("/api/"):
        about = {"id": model, "siblings": [{"rfilename": n, "size": size} for n, size in files.items()]}
        return request.reply(200, json.dumps(about).encode(), Content_Type="application/json")
    if not files:
        return request.reply(401, b"", X_Error_Code="RepoNotFound")
    if name not in files:
        return request.reply(404, b"", X_Error_Code="EntryNotFound")
    content = INDEX if name == "model_index.json" else b"x" * files[name]
    request.reply(200, content, ETag=f'"{model}"', X_Repo_Commit="0" * 40)


def of_hub(tmp_path: Path, address: str, *models: tuple[str, str], **env: str) -> list[Any]:
    env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **env}
    done = call(tmp_path, "-c", FIND, json.dumps(models), env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_models_that_are_missing_or_gated_are_refused_and_others_measured(tmp_path: Path) -> None:
    critic, policy = ("org/critic", "config.json"), ("org/policy", "model_index.json")
    gated, unknown, other = (GATED, "config.json"), ("org/none", "config.json"), ("org/policy", "config.json")
    with serving(hub) as address:
        found = of_hub(tmp_path, address, critic, policy, gated, unknown, other)
        assert found[:2] == [[1000, 0, 1000], [100, 80, 100]]
        assert "is gated" in found[2] and f"{address}/{GATED}" in found[2] and "policy.model: org/gated" in found[2]
        assert "has no such model" in found[3] and "HF_TOKEN" in found[3]
        assert "not the right kind of model: it has no config.json" in found[4]
        assert of_hub(tmp_path, address, gated, HF_TOKEN="good") == [[1000, 0, 1000]]

    # Nobody answers any more: the cache has the configuration of one, and then its weights as well.
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        half, none = of_hub(tmp_path, address, critic, unknown, **env)
        assert "the cache has a part of this model only" in half
        assert "cannot be reached, and the cache has no such model" in none
    snapshot = tmp_path / "cache" / "hub" / "models--org--critic" / "snapshots" / ("0" * 40)
    (snapshot / "a.safetensors").write_bytes(b"x" * 70)
    assert of_hub(tmp_path, address, critic, HF_HUB_OFFLINE="1") == [[70, 0, 0]]


def test_a_gated_model_costs_no_stage(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(small_run(rendered(8)))
    with serving(hub) as address:
        env = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "bad"}
        result = firm(tmp_path, f"policy.model={GATED}", env=env, timeout=300)
    complains(result, 1, "is gated", f"policy.model: {GATED}")
    assert not (tmp_path / "runs").exists()


# ---- judges ----------------------------------------------------------------------------------------------------------


def knowing(body: dict[str, Any]) -> tuple[int, str]:
    try:
        return 200, PixelTeacher().complete(body["messages"])
    except ValueError as error:
        return 400, str(error)


class Judges:
    """Servers whose questions are kept, by the model that was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.answers: dict[str, Answer] = {}
        self.url = ""

    def __call__(self, request: HTTPRequest) -> None:
        body = json.loads(request.body)
        content = body["messages"][0]["content"]
        self.asked.append((body["model"], sum(part["type"] == "image_url" for part in content)))
        status, text = self.answers.get(body["model"], lambda _: (200, "gray"))(body)
        said = {"choices": [{"message": {"content": text}}]} if status == 200 else {"error": text}
        request.reply(status, json.dumps(said).encode())

    def run(self, tmp_path: Path, *changes: str) -> RunConfig:
        one = {**TEACHER, "base_url": f"{self.url}/v1"}
        planner, evaluator, auditor = ({**one, "model": m} for m in ("planner", "teacher", "auditor"))
        judges = [f"curation.planner={json.dumps(planner)}", f"curation.evaluator={json.dumps(evaluator)}"]
        return load_config(
            "gen-shapes", [*judges, f"auditor.judge={json.dumps(auditor)}", f"store={tmp_path}", *changes]
        )


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> Iterator[Judges]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Judges()
    with serving(made) as made.url:
        yield made


def test_a_judge_that_answers_only_what_it_knows_is_content(judges: Judges, tmp_path: Path) -> None:
    """The shapes' own teacher refuses every other question, and images that do not fit the prompt."""
    judges.answers = dict.fromkeys(("planner", "teacher", "auditor"), knowing)
    reach.check(judges.run(tmp_path))
    both = {"curation.evaluator": "teacher", "curation.reporter": "planner", "auditor.judge": "auditor"}
    one = {**TEACHER, "base_url": f"{judges.url}/v1"}
    edits = [f"{key}={json.dumps({**one, 'model': model})}" for key, model in both.items()]
    judges.asked.clear()
    reach.check(load_config("edit-shapes", [*edits, f"store={tmp_path}"]))
    assert sorted(judges.asked) == [("auditor", 2), ("planner", 2), ("teacher", 2)]


def test_every_judge_is_asked_once_and_planners_are_shown_nothing(judges: Judges, tmp_path: Path) -> None:
    reach.check(judges.run(tmp_path, "rounds=2"))
    assert sorted(judges.asked) == [("auditor", 1), ("planner", 0), ("teacher", 1)]


def test_a_judge_of_edits_is_shown_two_images(judges: Judges, tmp_path: Path) -> None:
    auditor = {**TEACHER, "base_url": f"{judges.url}/v1", "model": "auditor"}
    reach.check(load_config("edit-shapes", [f"auditor.judge={json.dumps(auditor)}", f"store={tmp_path}"]))
    assert judges.asked == [("auditor", 2)]


@pytest.mark.parametrize(
    ("who", "status", "said", "words"),
    [
        ("teacher", 400, "at most 0 images", ["curation.evaluator", "at most 0 images"]),
        ("auditor", 401, "no", ["refuses the key", "OPENAI_API_KEY"]),
        ("planner", 404, "no such model", ["'planner'", "does not know"]),
        ("auditor", 503, "loading", ["auditor.judge", "loading"]),
    ],
)
def test_a_judge_that_cannot_answer_costs_no_stage(
    judges: Judges, tmp_path: Path, who: str, status: int, said: str, words: list[str]
) -> None:
    judges.answers[who] = lambda _: (status, said)
    with pytest.raises(UserError) as caught:
        reach.check(judges.run(tmp_path))
    assert not [word for word in words if word not in str(caught.value)], caught.value


def test_a_judge_that_is_not_there_is_missed_on_a_cluster_too(
    tmp_path: Path, judges: Judges, capsys: pytest.CaptureFixture[str]
) -> None:
    config = judges.run(tmp_path, "auditor.judge.base_url=http://127.0.0.1:9/v1").model_dump(mode="json")
    with pytest.raises(SystemExit):
        reach.execute(config, ["bench"])
    assert "error: the endpoint cannot be reached" in capsys.readouterr().err


def made(tmp_path: Path, config: RunConfig, stage: str) -> Path:
    """The folder of a stage's artifact, which has only begun."""
    folder = tmp_path / config.name / f"{stage}-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "examples").touch()
    return folder


def test_a_judge_may_be_gone_once_the_last_stage_that_asks_it_has_ended(judges: Judges, tmp_path: Path) -> None:
    config = judges.run(tmp_path)
    everybody = [("auditor", 1), ("planner", 0), ("teacher", 1)]
    left = {"curation": everybody, "bench": [("auditor", 1)], "rl": [("auditor", 1)], "evaluate": []}
    for stage, asked in left.items():
        folder = made(tmp_path, config, stage)
        judges.asked.clear()
        reach.check(config)
        before = sorted(judges.asked)
        (folder / "manifest.json").touch()
        judges.asked.clear()
        reach.check(config)
        assert sorted(judges.asked) == asked, stage
        assert len(before) >= len(asked)  # it had only begun


GAPS = [f"{d}.{metric}" for d in ("instruction_following", "quality") for metric in ("skill_low", "pairwise")]
UNLABELLED = json.dumps({"rules": [{"metric": "coverage", "at_least": 0.9}], "accept_gaps": GAPS})


def test_teachers_are_gone_with_the_curation_where_the_bench_labels_nothing(judges: Judges, tmp_path: Path) -> None:
    config = judges.run(tmp_path, "bench.sources=[]", f"bench.gate={UNLABELLED}")
    (made(tmp_path, config, "curation") / "manifest.json").touch()
    reach.check(config)
    assert judges.asked == [("auditor", 1)]


def test_a_pipeline_asks_those_of_its_own_stages(judges: Judges, tmp_path: Path) -> None:
    reach.check(judges.run(tmp_path), ["sft"])
    assert judges.asked == []
    reach.check(judges.run(tmp_path), ["rl"])
    assert judges.asked == [("auditor", 1)]


def test_a_first_answer_is_not_waited_for_as_long_as_a_judge_may_be_away(judges: Judges, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(UserError):
        reach.check(judges.run(tmp_path, "auditor.judge.base_url=http://127.0.0.1:9/v1", "auditor.judge.patience_s=60"))
    assert time.monotonic() - start < 20


# ---- this machine ----------------------------------------------------------------------------------------------------


def test_a_machine_without_the_gpus_of_the_launch_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="no GPU can be used"):
        reach.check(load_config("gen-shapes", ["launch.gpus=1"]))


def test_what_a_gpu_holds_is_asked_of_it_or_said(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(reach, "check_gpus", lambda _: None)
    monkeypatch.setattr(reach, "gpu_memory", lambda: 24 * GB)
    monkeypatch.setattr(reach, "check_fits", lambda config, stages, card: seen.append(card))
    on_cluster = ["launch.kind=pytorchjob", "launch.gpus=8", "store=s3://firm/runs"]
    monkeypatch.setattr(reach, "open_store", lambda _: LocalStore(Path("nowhere")))
    for settings in ([], ["launch.gpus=1"], ["launch.gpus=1", "launch.gpu_memory_gb=80"], on_cluster):
        reach.check(load_config("gen-shapes", settings))
    reach.check(load_config("gen-shapes", [*on_cluster, "launch.gpu_memory_gb=141"]))
    reach.check(load_config("gen-shapes", ["launch.gpus=1"]), ["gate", "report"])  # which need none
    assert seen == [24 * GB, 80 * GB, 141 * GB]


Usage = namedtuple("Usage", "total used free")


def test_checkpoints_are_counted_before_the_first_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = load_config("gen-shapes", [f"store={tmp_path / 'not' / 'yet'}", "rl.lora=null"])
    needed: dict[str, int] = {}
    monkeypatch.setattr(reach, "check_disk", lambda needs: needed.update({n.what: n.bytes for n in needs}))
    reach.check(config)
    shapes = Path(firm_package.__file__).parent / "shapes" / "weights"
    critic = (shapes / "critic" / "model.safetensors").stat().st_size
    policy = (shapes / "base" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    # float32 on the disk already: three checkpoints of the parameters and what is kept of each, and the result
    assert needed["the critic and its checkpoints"] == critic * (3 * 3 + 1)
    assert needed["the policy and its checkpoints"] == policy * (3 * 7 + 1)

    made = tmp_path / "not" / "yet" / config.name / "curation-0123456789ab"
    made.mkdir(parents=True)
    (made / "manifest.json").touch()
    needed.clear()
    reach.check(config)  # it goes on: what it has written already is not to be free as well
    assert not any(needed.values())


def test_a_disk_has_room_for_all_that_goes_to_it_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100 * GB, 40 * GB, 60 * GB))
    half = [Need(tmp_path / "a", "a model", 30 * GB), Need(tmp_path / "b" / "c", "checkpoints", 30 * GB)]
    check_disk(half)
    with pytest.raises(UserError, match=r"60\.0 GB free, and the run will write about 61\.0 .*checkpoints 30\.0"):
        check_disk([*half, Need(tmp_path, "a critic", GB)])
