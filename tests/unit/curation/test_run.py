"""What curation says and does where there is no material for some candidates."""

from pathlib import Path
from typing import Any

from shared import rendered, small_run

from firm.config.loading import load_config
from firm.critics.plan_then_score import PLAN
from firm.curation.run import run
from firm.records import SPLITS, Example, JudgedCandidate
from firm.shapes.teacher import PixelTeacher
from firm.storage.artifacts import Output
from firm.storage.shards import iter_shards


class Planner(PixelTeacher):
    """Has no plan for what is red."""

    def complete(self, messages: list[dict[str, Any]], **options: Any) -> str:
        asked = str(messages).partition("START OF PROMPT")[2]
        return "I would rather not." if "red" in asked else super().complete(messages, **options)


def test_a_planner_that_fails_is_counted_and_its_prompts_are_of_unknown_difficulty(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    planner = {"kind": "python", "target": f"{__name__}:Planner"}
    path.write_text(small_run(rendered(48), planner=planner, shard_size=16, batch_size=16, test_share=0.25))
    out = Output.open(str(tmp_path / "data"))
    summary = run(load_config(str(path)), {}, out)
    judged = list(iter_shards(out.folder / "judged", JudgedCandidate))
    unplanned = [j for j in judged if "red" in j.prompt.text]
    assert 0 < len(unplanned) < len(judged) == 48
    assert summary.metrics["without_material"] == len(unplanned)
    assert summary.tables["failed"] == [{"material": PLAN, "reason": "unparsable", "count": len(unplanned)}]
    for each in judged:
        assert (set(each.failed), set(each.material)) == ((set(), {PLAN}) if each not in unplanned else ({PLAN}, set()))
        assert all(outcome.kind == "judgement" for outcome in each.assessment.values()), "it is judged all the same"
    examples = [e for split in SPLITS for e in iter_shards(out.folder / split, Example)]
    difficulties = {("red" in e.prompt.text, e.difficulty) for e in examples}
    assert difficulties == {(True, "unknown"), (False, "easy"), (False, "hard")}
