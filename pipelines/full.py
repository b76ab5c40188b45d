"""The whole method, left to right: from prompts to a policy that a trusted critic has improved.

    kfp dsl compile --py pipelines/full.py --output full.yaml
    kfp run create -e firm -f full.yaml config="$(firm config show gen-sd35 --json)"

On a laptop: ``firm run gen-shapes``.
"""

from kfp import dsl

from pipelines import components


@dsl.pipeline(name="firm", description="FIRM: curate, train a critic, prove it, let it steer RL, evaluate, report")
def full(config: dict) -> None:
    """Run FIRM as one configuration (preset plus overrides) describes it.

    1. curate      prompts and images become scored examples (paper section 3.2)
    2. sft         a critic learns to judge from them (section 4)
    3. bench       it is measured against held-out human scores (section 3.3)
    4. gate        only a trusted critic passes
    5. rl          DiffusionNFT with the base-and-bonus reward (section 3.4), watched by the auditor
    6. evaluate    held-out prompts before and after, with the same seeds (section 5)
    7. report      one page for people
    """
    curated = components.curation(config=config).set_display_name("curate")
    data = curated.outputs["data"]

    trained = components.sft(config=config, data=data).set_display_name("sft")
    critic = trained.outputs["critic"]

    measured = components.bench(config=config, data=data, critic=critic).set_display_name("bench")
    agreement = measured.outputs["agreement"]

    trusted = components.gate(config=config, agreement=agreement).set_display_name("gate")
    verdict = trusted.outputs["verdict"]

    steered = components.rl(config=config, critic=critic, verdict=verdict).set_display_name("rl")
    policy = steered.outputs["policy"]

    evaluated = components.evaluate(config=config, critic=critic, policy=policy).set_display_name("evaluate")

    components.report(
        config=config,
        data=data,
        critic=critic,
        agreement=agreement,
        verdict=verdict,
        policy=policy,
        samples=evaluated.outputs["samples"],
    ).set_display_name("report")
