"""The whole method, left to right: from prompts to a policy that a trusted critic has improved.

    kfp dsl compile --py pipelines/full.py --output full.yaml
    kfp run create -e firm -f full.yaml config="$(firm config show gen-sd35 --json)"

On a laptop: ``firm run gen-shapes``.
"""

from kfp import dsl

from pipelines import components
from pipelines.cluster import model_step, small_step, step


@dsl.pipeline(name="firm", description="FIRM: curate, train a critic, prove it, let it steer RL, evaluate, report")
def full(config: dict, gpus: str = "0", memory: str = "4Gi") -> None:
    """Run FIRM as one configuration (preset plus overrides) describes it.

    1. curation    prompts and images become scored examples (paper section 3.2)
    2. sft         a critic learns to judge from them (section 4)
    3. bench       it is measured on held-out scores, the teacher's or people's (section 3.3)
    4. gate        only a trusted critic passes
    5. rl          DiffusionNFT with the base-and-bonus reward (section 3.4), watched by the auditor
    6. evaluate    held-out prompts before and after, with the same seeds (section 5)
    7. report      one page for people

    Args:
        config: The run, as JSON.
        gpus: GPUs of each step that runs a model itself (curation, bench, evaluate); jobs have `config.launch.gpus`.
            Text (on the command line: gpus='"1"'), because KFP 2.17's driver silently ignores numbers.
        memory: Memory of each of these steps.
    """
    curated = model_step(components.curation(config=config), "curation", gpus, memory, cached=True)
    data = curated.outputs["data"]

    trained = step(components.sft(config=config, data=data), "sft")
    critic = trained.outputs["critic"]

    measured = model_step(components.bench(config=config, data=data, critic=critic), "bench", gpus, memory, cached=True)
    agreement = measured.outputs["agreement"]

    trusted = small_step(components.gate(config=config, agreement=agreement), "gate", retries=0)
    verdict = trusted.outputs["verdict"]

    steered = step(components.rl(config=config, critic=critic, verdict=verdict), "rl")
    policy = steered.outputs["policy"]

    evaluated = components.evaluate(config=config, critic=critic, policy=policy)
    samples = model_step(evaluated, "evaluate", gpus, memory).outputs["samples"]

    page = components.report(
        config=config, data=data, critic=critic, agreement=agreement, verdict=verdict, policy=policy, samples=samples
    )
    small_step(page, "report")
