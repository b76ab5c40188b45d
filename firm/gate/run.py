"""The gate stage: lets only a trusted critic pass."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from firm.config import RunConfig
from firm.records import Stage, Summary, UserError, Verdict
from firm.storage.artifacts import Output

VERDICT = "verdict.json"
STAGE = Stage(name="gate", sections=(), reads={"bench": VERDICT})


def run(config: RunConfig, inputs: Mapping[str, Path], out: Output) -> Summary:
    """Pass the verdict on.

    Raises:
        UserError: The critic is not trusted; names every rule it fails.
    """
    text = (inputs["bench"] / VERDICT).read_text()
    verdict = Verdict.model_validate_json(text)
    if not verdict.trusted:
        reasons = "".join(f"\n     - {failure}" for failure in verdict.failures)
        fix = f"curate more data or train longer; change bench.gate only if you mean it{reasons}"
        raise UserError("the critic is not trusted, so it will not steer RL", str(inputs["bench"]), fix)
    (out.folder / VERDICT).write_text(text)
    gaps = [f"no rule looks at {gap}: bench.gate.accept_gaps accepts that" for gap in verdict.accepted_gaps]
    return Summary(stage="gate", metrics={"trusted": 1.0}, notes=[check.message for check in verdict.checks] + gaps)
