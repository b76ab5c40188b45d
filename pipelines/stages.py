"""One pipeline a stage, of the same components as the full one.

An input is the URI of a pointer file that an earlier run's task wrote (shown in the KFP UI, or below ``kfp/`` in a
laptop's run folder).
"""

from kfp import dsl

from pipelines import components


@dsl.pipeline(name="firm-curation", description="Plan-then-score curation of scored examples")
def curation(config: dict) -> None:
    """Curate only."""
    components.curation(config=config).set_display_name("curate")


@dsl.pipeline(name="firm-sft", description="Fine-tune a critic on curated examples")
def sft(config: dict, data: str) -> None:
    """Train a critic on existing data."""
    examples = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset)
    components.sft(config=config, data=examples.output)


@dsl.pipeline(name="firm-bench", description="Measure a critic against human scores and apply the gate")
def bench(config: dict, data: str, critic: str) -> None:
    """Measure an existing critic."""
    examples = dsl.importer(artifact_uri=data, artifact_class=dsl.Dataset)
    model = dsl.importer(artifact_uri=critic, artifact_class=dsl.Model)
    measured = components.bench(config=config, data=examples.output, critic=model.output)
    components.gate(config=config, agreement=measured.outputs["agreement"])


@dsl.pipeline(name="firm-rl", description="DiffusionNFT RL with a trusted critic, then evaluation")
def rl(config: dict, critic: str, verdict: str) -> None:
    """Steer a policy with an existing critic that has passed the gate, and evaluate it."""
    model = dsl.importer(artifact_uri=critic, artifact_class=dsl.Model)
    trusted = dsl.importer(artifact_uri=verdict, artifact_class=dsl.Artifact)
    steered = components.rl(config=config, critic=model.output, verdict=trusted.output)
    components.evaluate(config=config, critic=model.output, policy=steered.outputs["policy"])
