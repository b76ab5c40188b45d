"""Instruction rewriting: what is rewritten, what is not, what the summary says, and which scores there are then."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from edits import DIMENSIONS, NAMES, TEACHER, Teacher, edit_run
from shared import Scripted

from firm.chat.journal import Journals
from firm.chat.messages import Chat, Reply, RequestFailed
from firm.config import ChatConfig, RunConfig
from firm.config.loading import load_config
from firm.critics.difference_first import DifferenceFirst
from firm.curation.rewriting import NUM_SHOWN, REWRITING, Rewriter
from firm.curation.run import run
from firm.curation.sources import open_source
from firm.prompts import Splits
from firm.records import Example, JudgedCandidate, Judgement, Prompt, Summary
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards

NUMBER = 240


def settings(rewritten: float, **dimension: Any) -> RunConfig:
    """A quarter is for testing; ``dimension`` says more of each."""
    plain = edit_run(test_share=0.25, batch_size=32)
    plain["curation"]["sources"][0].update(num_images=NUMBER, rewritten=rewritten)
    for judged in plain["curation"]["dimensions"].values():
        judged.update(dimension)
    return RunConfig.model_validate(plain)


def curated(config: RunConfig, folder: Path) -> tuple[Summary, list[JudgedCandidate]]:
    out = Output.open(str(folder))
    return run(config, {}, out), list(iter_shards(out.folder / "judged", JudgedCandidate))


def score(judged: JudgedCandidate, dimension: str) -> int:
    outcome = judged.assessment[dimension]
    assert isinstance(outcome, Judgement)
    return outcome.score


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, list[JudgedCandidate]]:
    return curated(settings(0), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> tuple[Summary, list[JudgedCandidate]]:
    return curated(settings(0.5), tmp_path_factory.mktemp("half"))


def test_perfect_pairs_alone_have_the_highest_score_alone(plain: tuple[Summary, list[JudgedCandidate]]) -> None:
    summary, judged = plain
    assert {score(j, d) for j in judged for d in DIMENSIONS} == {5} and not any(j.rewritten for j in judged)
    assert summary.metrics["rewritten"] == 0 and "rewritten" not in summary.tables
    lacking = "no candidate for training scored 1 or 2 or 3 or 4, so there are no such examples"
    assert sorted(summary.notes) == [f"{dimension}: {lacking}" for dimension in sorted(DIMENSIONS)]


def test_a_share_is_rewritten_and_judged_by_its_new_prompt(half: tuple[Summary, list[JudgedCandidate]]) -> None:
    _, judged = half
    rewritten = [j for j in judged if j.rewritten]
    assert 0.35 * NUMBER < len(rewritten) < 0.6 * NUMBER
    counts = Counter(score(j, "execution") for j in rewritten)
    assert set(counts) == {1, 3, 5} and counts[5] < len(rewritten) / 3  # a patch may have the new colour by accident
    assert {score(j, "consistency") for j in rewritten} == {3, 5}
    for j in rewritten:
        assert j.rewritten and j.rewritten.prompt.text != j.prompt.text
        assert j.rewritten.prompt.image == j.prompt.image
        assert j.rewritten.reason == f"it was {j.rewritten.prompt.text}"
        assert all(o.kind == "judgement" and o.score == 5 for o in j.rewritten.assessment.values())


def test_everything_else_is_as_without_rewriting(
    plain: tuple[Summary, list[JudgedCandidate]], half: tuple[Summary, list[JudgedCandidate]]
) -> None:
    for before, after in zip(plain[1], half[1], strict=True):
        assert (before.index, before.split, before.images) == (after.index, after.split, after.images)
        if after.rewritten:
            assert (after.rewritten.prompt, after.rewritten.assessment) == (before.prompt, before.assessment)
        else:
            assert before.prompt == after.prompt and before.assessment == after.assessment


def test_no_held_out_prompt_gets_into_training(half: tuple[Summary, list[JudgedCandidate]]) -> None:
    splits = Splits(settings(0).prompts)
    summary, judged = half
    assert all(splits.of(j.prompt) == j.split for j in judged)
    unusable = [j.failed[REWRITING] for j in judged if REWRITING in j.failed]
    assert unusable and all(not j.rewritten for j in judged if REWRITING in j.failed)
    assert {u.reason for u in unusable} == {"unusable"}
    assert {u.detail.partition(":")[0] for u in unusable} <= {
        "the prompt is still the same",
        "a prompt of the other split",
    }
    assert {"material": REWRITING, "reason": "unusable", "count": len(unusable)} in summary.tables["failed"]
    assert summary.metrics["without_material"] == 0


def test_the_audit_says_what_was_rewritten_and_why(half: tuple[Summary, list[JudgedCandidate]]) -> None:
    summary, judged = half
    rewritten = {f"{j.source}-{j.split}-{j.index}": j for j in judged if j.rewritten}
    assert summary.metrics["rewritten"] == len(rewritten)
    for row in summary.tables["rewritten"]:
        counts = [row[str(s)] for s in range(1, 6)]
        assert sum(counts) + row["invalid"] == len(rewritten) and row["source"] == "painted"
        assert row["when"] == "after" or counts == [0, 0, 0, 0, len(rewritten)]
    shown = summary.tables["rewritings"]
    assert NUM_SHOWN / 2 < len(shown) <= NUM_SHOWN and {row["id"].split("-")[1] for row in shown} == {"train", "test"}
    for row in shown:
        j = rewritten[row["id"]]
        assert j.rewritten and (row["before"], row["after"]) == (j.rewritten.prompt.text, j.prompt.text)
        assert (row["execution_before"], row["execution_after"]) == (5, score(j, "execution"))
        assert row["reason"] == j.rewritten.reason


def test_examples_follow_the_target_that_rewriting_made_possible(tmp_path: Path) -> None:
    target = {1: 1.0, 3: 1.0, 5: 2.0}
    summary, _ = curated(settings(0.5, target=target), tmp_path)
    assert summary.notes == ["consistency: no candidate for training scored 1, so there are no such examples"]
    examples = list(iter_shards(tmp_path / "train", Example))
    counts = Counter(e.score for e in examples if e.dimension == "execution")
    assert set(counts) == {1, 3, 5} and abs(counts[1] - counts[3]) <= 1 and abs(counts[5] - 2 * counts[1]) <= 1
    lines = [message.content for e in examples for message in e.messages]
    assert not any("it was" in line or "report" in line.lower() for line in lines)


def test_the_preset_fills_every_score_of_both_dimensions_to_its_target(tmp_path: Path) -> None:
    config = load_config("edit-shapes")
    rendered = config.curation.sources[0].model_copy(update={"num_images": 700})
    config = config.model_copy(update={"curation": config.curation.model_copy(update={"sources": [rendered]})})
    summary, _ = curated(config, tmp_path)
    examples = list(iter_shards(tmp_path / "train", Example))
    for dimension, judged in config.curation.dimensions.items():
        counts = Counter(e.score for e in examples if e.dimension == dimension)
        shares = {score: counts[score] / counts.total() for score in range(1, 6)}
        whole = sum(judged.target.values())
        assert shares == pytest.approx({score: w / whole for score, w in judged.target.items()}, abs=0.01)
        assert counts.total() > 200 and min(counts.values()) > 10, counts
    assert summary.notes == []


def test_it_goes_on_where_it_was_interrupted(half: tuple[Summary, list[JudgedCandidate]], tmp_path: Path) -> None:
    config = settings(0.5)
    config = config.model_copy(update={"curation": config.curation.model_copy(update={"shard_size": 32})})
    summary, judged = curated(config, tmp_path)
    assert judged == half[1]
    for path in sorted((tmp_path / "judged").glob("part-*"))[3:]:
        path.unlink()
    again, whole = curated(config, tmp_path)
    assert whole == judged and again == summary


# ---- writers that fail


def rewritten_by(writer: Chat | None, number: int = 3, share: float = 1.0) -> list[JudgedCandidate]:
    config = settings(share)
    source = open_source(config.curation.sources[0], config.prompts, config.seed)

    def open_chat(role: str, chat: ChatConfig) -> Chat:
        if role == "rewriter":
            assert writer is not None, "nothing is to be rewritten"
            return writer
        return _teacher()

    labeller = DifferenceFirst(config.curation, open_chat)
    return Rewriter(config, open_chat, labeller).rewrite(labeller.label(source.make("train", range(number))))


def _teacher() -> Chat:
    from firm.chat.client import PythonClient

    return PythonClient(TEACHER["target"])


def test_without_a_share_no_writer_is_opened() -> None:
    assert not any(j.rewritten for j in rewritten_by(None, share=0.0))


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("I would rather not.", "unparsable"),
        ('{"instruction": 7}', "unparsable"),
        ("", "empty"),
        (Reply('{"instruction": "paint the first patch red"}', truncated=True), "truncated"),
        (RequestFailed("no", retryable=True), "request_failed"),
        ('{"instruction": "paint the first patch white"}', "unusable"),
    ],
)
def test_a_rewriting_that_fails_leaves_the_candidate_as_it_was(answer: Any, reason: str) -> None:
    writer = Scripted(*[answer] * 3)
    [judged] = rewritten_by(writer, 1)
    [before] = rewritten_by(None, 1, share=0.0)
    assert writer.script == [] and judged.failed[REWRITING].reason == reason
    assert judged == before.model_copy(update={"failed": judged.failed})


def test_the_same_prompt_in_another_spelling_is_no_rewriting() -> None:
    [before] = rewritten_by(None, 1, share=0.0)
    writer = Scripted(*[json.dumps({"instruction": f" {before.prompt.text.upper()}  "})] * 3)
    [judged] = rewritten_by(writer, 1)
    assert judged.failed[REWRITING].reason == "unusable" and judged.prompt == before.prompt


def test_an_unusable_answer_is_asked_again_and_equal_pairs_are_asked_with_seeds_of_their_own() -> None:
    good = json.dumps({"instruction": "paint the second patch red"})
    writer = Scripted("no", good, *[good] * 2)
    assert all(j.rewritten or j.prompt.text == "paint the second patch red" for j in rewritten_by(writer))
    seeds = [call["seed"] for call in writer.calls]
    assert seeds[1] == seeds[0] + 1 and len(set(seeds)) == len(seeds) and all(0 <= seed < 2**32 for seed in seeds)
    assert all(call["temperature"] > 0 for call in writer.calls)


def test_without_reports_pairs_are_judged_and_rewritten_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "reporting", False)
    summary, judged = curated(settings(0.5), tmp_path)
    assert summary.metrics["without_material"] == NUMBER and any(j.rewritten for j in judged)
    assert all(j.failed["report"].reason == "request_failed" for j in judged)


def test_the_world_of_these_tests_has_prompts_of_both_splits() -> None:
    splits = Splits(settings(0).prompts)
    kinds = {splits.of(Prompt(text=f"paint the first patch {name}")) for name in NAMES}
    assert kinds == {"train", "test"}


def test_the_rewriter_s_answers_are_remembered_apart_from_the_evaluator_s(tmp_path: Path) -> None:
    config = settings(0.5)
    with Journals(tmp_path) as open_chat:
        Rewriter(config, open_chat, DifferenceFirst(config.curation, open_chat))
    assert {p.name for p in tmp_path.iterdir()} == {"reporter.jsonl", "evaluator.jsonl", "rewriter.jsonl"}
