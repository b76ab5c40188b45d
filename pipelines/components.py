"""One component a stage: an import and one call.

Every artifact that travels is a small pointer file (docs/decisions/0002); ``metrics`` and ``page`` are what the KFP UI
shows.
"""

from kfp import dsl

from firm import __version__

IMAGE = f"firm-python:{__version__}"
component = dsl.component(base_image=IMAGE, install_kfp_package=False)


@component
def curation(config: dict, data: dsl.Output[dsl.Dataset], metrics: dsl.Output[dsl.Metrics]) -> None:  # noqa: D103
    from firm.stage import execute

    execute("curation", config, {}, data.path, metrics.log_metric)


@component
def sft(  # noqa: D103
    config: dict, data: dsl.Input[dsl.Dataset], critic: dsl.Output[dsl.Model], metrics: dsl.Output[dsl.Metrics]
) -> None:
    from firm.stage import execute

    execute("sft", config, {"data": data.path}, critic.path, metrics.log_metric)


@component
def bench(  # noqa: D103
    config: dict,
    data: dsl.Input[dsl.Dataset],
    critic: dsl.Input[dsl.Model],
    agreement: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    from firm.stage import execute

    execute("bench", config, {"data": data.path, "critic": critic.path}, agreement.path, metrics.log_metric)


@component
def gate(config: dict, agreement: dsl.Input[dsl.Artifact], verdict: dsl.Output[dsl.Artifact]) -> None:  # noqa: D103
    from firm.stage import execute

    execute("gate", config, {"bench": agreement.path}, verdict.path)


@component
def rl(  # noqa: D103
    config: dict,
    critic: dsl.Input[dsl.Model],
    verdict: dsl.Input[dsl.Artifact],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    from firm.stage import execute

    execute("rl", config, {"critic": critic.path, "verdict": verdict.path}, policy.path, metrics.log_metric)


@component
def evaluate(  # noqa: D103
    config: dict,
    critic: dsl.Input[dsl.Model],
    policy: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
) -> None:
    from firm.stage import execute

    execute("evaluate", config, {"critic": critic.path, "policy": policy.path}, samples.path, metrics.log_metric)


@component
def report(  # noqa: D103
    config: dict,
    data: dsl.Input[dsl.Dataset],
    critic: dsl.Input[dsl.Model],
    agreement: dsl.Input[dsl.Artifact],
    verdict: dsl.Input[dsl.Artifact],
    policy: dsl.Input[dsl.Model],
    samples: dsl.Input[dsl.Dataset],
    summary: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> None:
    from firm.stage import execute

    inputs = {
        "data": data.path,
        "critic": critic.path,
        "bench": agreement.path,
        "verdict": verdict.path,
        "policy": policy.path,
        "samples": samples.path,
    }
    execute("report", config, inputs, summary.path, copies={"report.html": page.path})
