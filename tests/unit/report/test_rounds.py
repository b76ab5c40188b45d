"""What a report tells the next rounds of its own."""

from firm.config.loading import load_config
from firm.records import Summary
from firm.report.rounds import this_round


def test_the_accuracy_at_the_start_is_the_critics_on_the_policys_own_images() -> None:
    def row(judge: str, by: str, value: str, pairwise: float) -> dict[str, str | float]:
        return {"judge": judge, "dimension": "quality", "by": by, "value": value, "pairwise": pairwise}

    rows = [
        row("auditor", "source", "policy", 0.9),
        row("critic", "all", "all", 0.8),
        row("critic", "source", "rendered", 0.7),
        row("critic", "source", "policy", 0.6),
    ]
    summaries = {
        "bench": Summary(stage="bench", tables={"agreement": rows}),
        "policy": Summary(stage="rl", metrics={"kept_epoch": 5}),
        "samples": Summary(stage="evaluate", metrics={"critic_quality_pairwise_final": 0.5}),
    }
    pairwise = this_round(summaries, load_config("gen-shapes"), [])["pairwise"]
    assert pairwise["quality"] == {"base": None, "final": 0.5, "start": 0.6}
    assert pairwise["instruction_following"]["start"] is None
