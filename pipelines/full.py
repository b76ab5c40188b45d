"""The whole method, left to right: from prompts to a policy that a trusted critic has improved.

    kfp dsl compile --py pipelines/full.py --output full.yaml
    kfp run create -e firm -f full.yaml config="$(firm config show gen-sd35 --json)"

On a laptop: ``firm run gen-shapes``. Pipelines of several rounds are in `pipelines.rounds`, of fewer stages in
`pipelines.parts`.
"""

from collections.abc import Sequence
from typing import Any

from kfp import dsl
from kfp.dsl.base_component import BaseComponent

from firm.config import STAGES, StageName
from pipelines import components
from pipelines.cluster import Place

Round = dict[str, Any]
"""What a round leaves to the next one: outputs by the name of the component's input, and its last task."""


def one_round(config: dict, place: Place, stages: Sequence[StageName], number: int, last: Round) -> Round:
    """The stages of one round.

    1. curation    prompts and images become scored examples (paper section 3.2)
    2. sft         a critic learns to judge from them (section 4)
    3. bench       it is measured on held-out scores, the teacher's or people's (section 3.3)
    4. gate        only a trusted critic passes
    5. rl          DiffusionNFT with the base-and-bonus reward (section 3.4), watched by the auditor
    6. evaluate    held-out prompts before and after, with the same seeds (section 5)
    7. report      one page for people

    Args:
        config: The run, as JSON.
        place: Where they run.
        stages: Those that the run has; each is given what there is of its inputs.
        number: The round, counted from 1.
        last: What the last round has left; empty in the first.
    """
    there = dict(last)

    def given(*names: str) -> dict:
        return {"config": config, "round": number} | {name: there[name] for name in names if name in there}

    if "curation" in stages:
        curated = place.model_step(components.curation(**given("last_policy"), gpus=place.gpus), "curation")
        if last:
            curated.after(last["end"])  # a round ends with its measurement
        there["data"] = curated.outputs["data"]
    if "sft" in stages:
        trained = place.step(components.sft(**given("data", "last_critic")), "sft")
        there["critic"] = trained.outputs["critic"]
    if "bench" in stages:
        measured = place.model_step(
            components.bench(**given("data", "critic", "last_policy"), gpus=place.gpus), "bench"
        )
        there["agreement"] = measured.outputs["agreement"]
    if "gate" in stages:
        trusted = place.small_step(components.gate(**given("agreement")), "gate", retries=0)
        there["verdict"] = trusted.outputs["verdict"]
    if "rl" in stages:
        steered = place.step(components.rl(**given("critic", "verdict", "last_policy")), "rl")
        there["policy"] = steered.outputs["policy"]
    if "evaluate" in stages:
        evaluated = place.model_step(components.evaluate(**given("critic", "policy"), gpus=place.gpus), "evaluate")
        there["samples"] = evaluated.outputs["samples"]
    made = given("data", "critic", "agreement", "verdict", "policy", "samples", "last_report")
    end = place.small_step(components.report(**made), "report")
    left = {f"last_{name}": there[name] for name in ("policy", "critic") if name in there}
    return {**left, "last_report": end.outputs["summary"], "end": end}


def pipeline_of(rounds: int, stages: Sequence[StageName] = STAGES, on_cluster: bool = True) -> BaseComponent:
    """The pipeline of a run with so many rounds, each the same stages from the last one's policy and critic.

    Args:
        rounds: How many.
        stages: Those of the run, left to right (`firm.config.stages_of`).
        on_cluster: Whether a first step checks the configuration and the cluster; `firm run` has checked already.
    """

    @dsl.pipeline(
        name="firm" if rounds == 1 else f"firm-{rounds}-rounds",
        description="FIRM: curate, train a critic, prove it, let it steer RL, evaluate, report"
        if len(stages) == len(STAGES)
        else f"FIRM: {', '.join(stages)}",
    )
    def firm(config: dict, gpus: str = "0", memory: str = "4Gi") -> None:
        """Run FIRM as one configuration (preset plus overrides) describes it.

        Args:
            config: The run, as JSON.
            gpus: GPUs of each step that runs a model itself (curation, bench, evaluate); jobs have
                `config.launch.gpus`. Text (on the command line: gpus='"1"'), because KFP 2.17's driver silently
                ignores numbers.
            memory: Memory of each of these steps.
        """
        place = Place.checked(config, stages, gpus, memory, rounds) if on_cluster else Place(gpus, memory)
        last: Round = {}
        for number in range(1, rounds + 1):
            last = one_round(config, place, stages, number, last)

    return firm


full = pipeline_of(1)
