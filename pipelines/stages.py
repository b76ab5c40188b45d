"""One pipeline per stage, of the same components as the full one.

An input is the URI of a pointer file that an earlier run's task wrote (shown in the KFP UI, or below ``kfp/`` in a
laptop's run folder).
"""

from kfp import dsl

from pipelines import components
from pipelines.cluster import Place


@dsl.pipeline(name="firm-curation", description="Plan-then-score curation of scored examples")
def curation(config: dict, gpus: str = "0", memory: str = "4Gi") -> None:
    """Make scored examples only."""
    Place.checked(config, ["curation"], gpus, memory).model_step(
        components.curation(config=config, gpus=gpus), "curation"
    )


@dsl.pipeline(name="firm-sft", description="Fine-tune a critic on curated examples")
def sft(config: dict, data: str) -> None:
    """Train a critic on existing data."""
    examples = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset)
    Place.checked(config, ["sft"]).step(components.sft(config=config, data=examples.output), "sft")


@dsl.pipeline(name="firm-bench", description="Measure a critic on held-out scores and apply the gate")
def bench(config: dict, data: str, critic: str, gpus: str = "0", memory: str = "4Gi") -> None:
    """Measure an existing critic."""
    examples = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset)
    model = dsl.importer(artifact_uri=critic, artifact_class=dsl.Model)
    measured = components.bench(config=config, data=examples.output, critic=model.output, gpus=gpus)
    place = Place.checked(config, ["bench", "gate"], gpus, memory)
    place.model_step(measured, "bench")
    place.small_step(components.gate(config=config, agreement=measured.outputs["agreement"]), "gate", retries=0)


@dsl.pipeline(name="firm-rl", description="DiffusionNFT RL with a trusted critic, then evaluation")
def rl(config: dict, critic: str, verdict: str, gpus: str = "0", memory: str = "4Gi") -> None:
    """Steer a policy with an existing critic that has passed the gate, and evaluate it."""
    model = dsl.importer(artifact_uri=critic, artifact_class=dsl.Model)
    trusted = dsl.importer(artifact_uri=verdict, artifact_class=dsl.Artifact)
    place = Place.checked(config, ["rl", "evaluate"], gpus, memory)
    steered = place.step(components.rl(config=config, critic=model.output, verdict=trusted.output), "rl")
    evaluated = components.evaluate(config=config, critic=model.output, policy=steered.outputs["policy"], gpus=gpus)
    place.model_step(evaluated, "evaluate")
