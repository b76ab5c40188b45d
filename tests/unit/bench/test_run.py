"""The stage on the tiny base policy: bad critics are stopped, by name of the dimension, and nothing is judged twice."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from shared import CPU, rendered

from firm.bench import run as stage
from firm.bench.items import Item, asked, of_examples
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.critics.agreement import Prediction
from firm.critics.judge import JudgeInput
from firm.critics.labeller import open_labeller
from firm.curation.examples import student_example
from firm.curation.sources import open_source
from firm.images import encode_image
from firm.policies.policy import Policy, save_policy
from firm.records import Assessment, Example, Invalid, JudgedCandidate, Judgement, Prompt, Summary, Verdict
from firm.stage import stage_key
from firm.storage.artifacts import Output
from firm.storage.published import PublishedShards
from firm.storage.shards import ShardWriter, iter_shards

FOLLOWING = "instruction_following"
NUMBER = 144  # of the policy's images, about four of each prompt
Distort = Callable[[str, int, bool], int | Judgement]
"""(dimension, the teacher's score, whether the image is the policy's) -> the critic's score or judgement."""
Bench = Callable[..., tuple[Summary, Verdict]]
"""Runs the stage with the critic that a `Distort` describes."""


@pytest.fixture(scope="module")
def config() -> RunConfig:
    sources = f"curation.sources={json.dumps([rendered(60)])}"
    return load_config("gen-shapes", [sources, f"bench.sources.0.num_images={NUMBER}", "bench.num_bootstrap=200"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """Test examples as curation writes them."""
    folder = tmp_path_factory.mktemp("data")
    source = open_source(config.curation.sources[0], config.prompts, config.seed)
    with open_labeller(config.curation, folder / "work") as labeller:
        judged = labeller.label(source.make("test", range(60)))
    with ShardWriter(folder / "test", Example, 500) as writer:
        for candidate in judged:
            for d, rubric in config.critic.rubrics.items():
                writer.write([student_example(candidate, d, rubric, "score_first", config.curation)])
    return folder


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> Path:
    """What the stage makes of the policy: sampled and judged once for all tests."""
    out = Output.open(str(tmp_path_factory.mktemp("judged")))
    stage._judge_policy(config, {}, out, CPU)
    return out.folder / stage.JUDGED


class Oracle:
    """Knows the teacher's scores of all images, and answers what ``distort`` makes of them."""

    def __init__(self, data: Path, judged: Path, distort: Distort) -> None:
        self.scores: dict[bytes, dict[str, int]] = {}
        self.own = set[bytes]()
        self.distort = distort
        self.asked = 0
        for e in iter_shards(data / "test", Example):
            self.scores.setdefault(e.images[0], {})[e.dimension] = e.score
        for j in iter_shards(judged, JudgedCandidate):
            self.scores[j.images[0]] = {d: o.score for d, o in j.assessment.items() if isinstance(o, Judgement)}
            self.own.add(j.images[0])

    def judge(self, items: Sequence[JudgeInput]) -> list[Assessment]:
        self.asked += len(items)
        rows = [(item, self.scores[item.images[0]]) for item in items]
        return [{d: self._answer(d, row[d], i.images[0] in self.own) for d in i.among(row)} for i, row in rows]

    def _answer(self, dimension: str, score: int, own: bool) -> Judgement:
        answer = self.distort(dimension, score, own)
        return Judgement(score=answer) if isinstance(answer, int) else answer


@pytest.fixture
def bench(tmp_path: Path, config: RunConfig, data: Path, judged: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    def measure(distort: Distort, judged: Path = judged, **changes: Any) -> tuple[Summary, Verdict]:
        out = Output.open(str(tmp_path / "out"))
        if judged.parent != out.folder:
            shutil.copytree(judged.parent, out.folder, dirs_exist_ok=True)
        monkeypatch.setattr(stage, "load_critic", lambda *_: Oracle(data, judged, distort))
        monkeypatch.setattr(stage, "draw", None)  # all that the policy drew is judged already
        changed = config.model_copy(update={"bench": config.bench.model_copy(update=changes)})
        summary = stage.run(changed, {"data": data, "critic": tmp_path}, out)
        return summary, Verdict.model_validate_json((out.folder / "verdict.json").read_text())

    return measure


def test_a_critic_is_measured_by_the_configured_point_estimate(bench: Bench) -> None:
    """All its belief is in the right score, and what it says is 1."""

    def mumbling(_: str, score: int, __: bool) -> Judgement:
        return Judgement(score=1, distribution=tuple(float(s == score) for s in range(1, 6)))  # type: ignore[arg-type]

    summary, _ = bench(mumbling, point_estimate="median")
    assert summary.metrics[f"{FOLLOWING}_mae"] == 0


def test_a_judge_is_asked_on_what_there_is_a_reference_for(data: Path) -> None:
    """Balancing leaves many an image with an example of one dimension."""
    examples = list(iter_shards(data / "test", Example))[1:]
    first, second, *_ = of_examples(examples)
    assert (first.question().dimensions, second.question().dimensions) == (("quality",), (FOLLOWING, "quality"))
    [both] = asked([second], dimensions=["quality", "consistency"])
    assert both.question().dimensions == ("quality",)


def test_a_good_critic_is_trusted_and_the_auditor_is_measured_beside_it(bench: Bench, tmp_path: Path) -> None:
    summary, verdict = bench(lambda d, s, own: s)
    assert verdict.trusted, verdict.failures
    assert {(r["judge"], r["value"]) for r in summary.tables["agreement"] if r["by"] in ("all", "source")} == {
        (judge, value) for judge in ("critic", "auditor") for value in ("all", "policy", "rendered")
    }
    own = next(r for r in summary.tables["agreement"] if r["value"] == "policy" and r["dimension"] == "quality")
    assert own["judge"] == "critic" and own["n"] == NUMBER and own["skill"] == 1 and own["whose"] == "teacher"
    lines = (tmp_path / "out" / "critic.jsonl").read_text().splitlines()
    predictions = [Prediction.model_validate_json(line) for line in lines]
    assert len(predictions) == 2 * (60 + NUMBER) == len({(p.id, p.dimension) for p in predictions})
    prompts = [p.prompt for p in predictions if p.source == "policy"]
    assert max(map(prompts.count, prompts)) <= min(map(prompts.count, prompts)) + 2, "every prompt equally often"


PLANTED: dict[str, tuple[Distort, str]] = {
    "inverted quality": (lambda d, s, own: 6 - s if d == "quality" else s, "quality"),
    "constant quality": (lambda d, s, own: 4 if d == "quality" else s, "quality"),
    "constant instruction following": (lambda d, s, own: s if d == "quality" else 3, FOLLOWING),
    "quality wrong on the policy's images": (lambda d, s, own: 6 - s if own and d == "quality" else s, "quality"),
    "instructions wrong on the policy's images": (lambda d, s, own: 6 - s if own and d == FOLLOWING else s, FOLLOWING),
    "full marks for every image of the policy": (lambda d, s, own: 5 if own else s, FOLLOWING),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_critic_is_stopped_with_a_sentence_that_names_the_dimension(bench: Bench, name: str) -> None:
    distort, dimension = PLANTED[name]
    summary, verdict = bench(distort)
    assert not verdict.trusted and summary.metrics["trusted"] == 0
    for metric in ("skill_low", "pairwise"):
        [message] = [m for m in verdict.failures if m.startswith(f"{dimension} {metric} on policy")]
        assert "the teacher's scores" in message and message in summary.notes
    if name.startswith(("inverted", "constant", "quality", "instructions")):
        assert all(message.startswith(dimension) for message in verdict.failures)


def test_an_image_on_which_the_teacher_fails_is_no_reference_and_is_counted(
    bench: Bench, judged: Path, tmp_path: Path, config: RunConfig
) -> None:
    spoilt = tmp_path / "out" / stage.JUDGED
    rows = list(iter_shards(judged, JudgedCandidate))
    bad = rows[0].assessment | {"quality": Invalid(reason="empty")}
    rows[0] = rows[0].model_copy(update={"assessment": bad, "failed": {"plan": Invalid(reason="unparsable")}})
    shards = PublishedShards(Output.open(str(spoilt.parent)), stage.JUDGED, JudgedCandidate, 128)
    shards.write(rows)
    shards.close()
    summary, _ = bench(lambda d, s, own: s, judged=spoilt)
    assert [row for row in summary.tables["invalid"] if row["judge"] == "teacher"] == [
        {"judge": "teacher", "dimension": "plan", "reason": "unparsable", "count": 1},
        {"judge": "teacher", "dimension": "quality", "reason": "empty", "count": 1},
    ]
    own = {r["dimension"]: r["n"] for r in summary.tables["agreement"] if r["value"] == "policy"}
    assert own == {FOLLOWING: NUMBER, "quality": NUMBER - 1}


def test_what_was_judged_is_not_asked_again(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may end inside a batch, where a source is no multiple of it."""
    policy = config.bench.sources[0]
    sources = [policy.model_copy(update={"name": n, "num_images": size}) for n, size in (("few", 4), ("more", 16))]
    bench = config.bench.model_copy(update={"sources": sources})
    curation = config.curation.model_copy(update={"batch_size": 8})
    config = config.model_copy(update={"bench": bench, "curation": curation})
    whole, killed = (Output.open(str(tmp_path / name)) for name in ("whole", "killed"))
    stage._judge_policy(config, {}, whole, CPU)
    real = stage.draw
    drawn: list[range] = []

    def twice(policy: Any, prompts: Any, indices: range, *rest: Any, **options: Any) -> list[bytes]:
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(indices)
        return real(policy, prompts, indices, *rest, **options)

    monkeypatch.setattr(stage, "draw", twice)
    with pytest.raises(KeyboardInterrupt):
        stage._judge_policy(config, {}, killed, CPU)
    drawn.clear()
    stage._judge_policy(config, {}, killed, CPU)
    assert drawn == [range(8), range(8, 16)], "a batch is made whole, and what is done stays out"
    shards = sorted((whole.folder / stage.JUDGED).iterdir())
    assert len(shards) == 3
    for path in shards:
        assert (killed.folder / stage.JUDGED / path.name).read_bytes() == path.read_bytes()


def test_the_policy_of_the_last_round_takes_the_place_of_the_configured_one(
    config: RunConfig, judged: Path, tmp_path: Path
) -> None:
    policy = Policy(config.policy, CPU)
    policy.train(None, (), seed=0)
    next(policy.family.denoiser.parameters()).data.mul_(0.5)
    save_policy(tmp_path / "round" / "policy", policy)
    few = config.bench.sources[0].model_copy(update={"num_images": 8})
    config = config.model_copy(update={"bench": config.bench.model_copy(update={"sources": [few]})})
    images = []
    for name, inputs in {"base": {}, "kept": {"last_policy": tmp_path / "round"}}.items():
        out = Output.open(str(tmp_path / name))
        stage._judge_policy(config, inputs, out, CPU)
        images.append([j.images for j in iter_shards(out.folder / stage.JUDGED, JudgedCandidate)])
    assert images[0] != images[1] and len(images[1]) == 8


def test_the_auditor_is_asked_for_as_many_of_each_source_as_the_limit(
    bench: Bench,
) -> None:
    summary, _ = bench(lambda d, s, own: s, auditor_images=7)
    rows = [r for r in summary.tables["agreement"] if r["judge"] == "auditor" and r["by"] == "source"]
    assert {r["n"] for r in rows} == {7}


def test_the_key_changes_with_what_matters_and_with_nothing_else(config: RunConfig) -> None:
    def key(*overrides: str) -> str:
        return stage_key(stage.STAGE, load_config("gen-shapes", overrides), {})

    before = key()
    for same in SAME:
        assert key(same) == before, same
    for other in OTHER:
        assert key(other) != before, other


SAME = [
    "name=x",
    "store=x",
    "sft.max_steps=3",
    "rl.max_epochs=3",
    "reward.weights=[0.5, 0.5]",
    "curation.oversample=3",
    "curation.test_share=0.2",
    "auditor.every=3",
    "evaluate.num_images=9",
]
OTHER = [
    "seed=1",
    "prompts.limit=30",
    "policy.dtype=bfloat16",
    "critic.batch_size=3",
    "bench.num_bootstrap=3",
    "bench.sources.0.num_images=9",
    "curation.evaluator.target=a:B",
    "curation.attempts=9",
    "curation.hard_from=9",
    "auditor.judge.target=a:B",
]


@pytest.mark.parametrize("kill", ["in the second batch", "after the last"])
def test_a_judge_that_was_interrupted_is_asked_for_the_rest(
    config: RunConfig, data: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    """The auditor is asked after the critic: killed then, the critic has judged everything, whole batches or not."""
    monkeypatch.setattr(stage, "BATCH", 16)
    out = Output.open(str(tmp_path / "out"))
    oracle = Oracle(data, judged, lambda d, s, own: s)

    def items() -> Iterator[Item]:
        return of_examples(iter_shards(data / "test", Example))

    whole = stage._measure("critic", oracle, items, config, out)
    written = (out.folder / "critic.jsonl").read_bytes()
    assert oracle.asked == 60
    journal = out.folder / "work" / "critic.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    if kill == "in the second batch":
        journal.write_bytes(b"".join(lines[:20]) + lines[20][:9])
    (out.folder / "critic.jsonl").unlink()
    oracle.asked = 0
    assert stage._measure("critic", oracle, items, config, out) == whole
    assert oracle.asked == (44 if kill == "in the second batch" else 0)
    assert (out.folder / "critic.jsonl").read_bytes() == written


def test_an_untouched_edit_is_named_and_a_generated_image_is_not_even_looked_at() -> None:
    one, other = (encode_image(Image.new("RGB", (8, 8), colour)) for colour in ("red", "blue"))
    references = {"execution": 1.0, "consistency": 5.0}

    def seen(prompt: Prompt, *images: bytes) -> set[str]:
        item = Item("a", prompt, "policy", "easy", "teacher", references, lambda: list(images))
        return {expected.seen for expected in item.expected()}

    edit = Prompt(text="make it blue", image="red.png")
    assert seen(edit, one, one) == {"untouched"} and seen(edit, one, other) == {""}
    assert seen(Prompt(text="a red square")) == {""}
