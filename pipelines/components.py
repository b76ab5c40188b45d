"""One component per stage: an import and one call.

Every artifact that travels is a small pointer file (docs/decisions/0002); ``metrics`` and ``page`` are what the KFP UI
shows. ``round`` counts from 1; further rounds are given what the last one has left. That and what only some runs have
are inputs with the default None. They are not annotated as optional: the backend does not say the type of an artifact,
and KFP's executor then calls the annotation.
"""

from typing import NamedTuple

from kfp import dsl

from firm import __version__

RUNTIME = f"firm/runtime:{__version__}"
SLIM = f"firm/slim:{__version__}"
runs_model = dsl.component(base_image=RUNTIME, install_kfp_package=False)
runs_numbers = dsl.component(base_image=SLIM, install_kfp_package=False)
launches = dsl.component(
    base_image=SLIM,
    install_kfp_package=False,
    # What a user asks for with `task.set_memory_limit` and the like goes to the job's pods, not to the step's.
    task_config_passthroughs=[
        dsl.TaskConfigField.RESOURCES,
        dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
        dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
    ],
)


@runs_model
def check(  # noqa: D103
    config: dict, gpus: str, rounds: int, stages: list
) -> NamedTuple("Installation", [("store_secret", str), ("endpoints_secret", str), ("tolerations", list)]):  # type: ignore[valid-type]
    from firm.submission import execute

    return execute(config, gpus, rounds, stages)


@runs_model
def reach(config: dict, stages: list) -> None:  # noqa: D103
    from firm.reach import execute

    execute(config, stages)


@runs_model
def curation(  # noqa: D103
    config: dict,
    data: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    round: int = 1,
    gpus: str = "0",
    last_policy: dsl.Input[dsl.Model] = None,
) -> None:
    from firm.stage import execute

    inputs = {"last_policy": last_policy and last_policy.path}
    execute("curation", config, inputs, data.path, metrics.log_metric, number=round, gpus=gpus)


@launches
def sft(  # noqa: D103
    config: dict,
    data: dsl.Input[dsl.Dataset],
    critic: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
    round: int = 1,
    last_critic: dsl.Input[dsl.Model] = None,
) -> None:
    from firm.stage import execute

    inputs = {"data": data.path, "last_critic": last_critic and last_critic.path}
    execute("sft", config, inputs, critic.path, metrics.log_metric, pod=vars(task_config), number=round)


@runs_model
def bench(  # noqa: D103
    config: dict,
    agreement: dsl.Output[dsl.Artifact],
    metrics: dsl.Output[dsl.Metrics],
    confusion: dsl.Output[dsl.ClassificationMetrics],
    round: int = 1,
    gpus: str = "0",
    data: dsl.Input[dsl.Dataset] = None,
    critic: dsl.Input[dsl.Model] = None,
    last_policy: dsl.Input[dsl.Model] = None,
) -> None:
    from firm.stage import execute

    inputs = {
        "data": data and data.path,
        "critic": critic and critic.path,
        "last_policy": last_policy and last_policy.path,
    }
    matrix = confusion.log_confusion_matrix
    execute("bench", config, inputs, agreement.path, metrics.log_metric, log_matrix=matrix, number=round, gpus=gpus)


@runs_numbers
def gate(  # noqa: D103
    config: dict, agreement: dsl.Input[dsl.Artifact], verdict: dsl.Output[dsl.Artifact], round: int = 1
) -> None:
    from firm.stage import execute

    execute("gate", config, {"bench": agreement.path}, verdict.path, number=round)


@launches
def rl(  # noqa: D103
    config: dict,
    verdict: dsl.Input[dsl.Artifact],
    policy: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    task_config: dsl.TaskConfig,
    round: int = 1,
    critic: dsl.Input[dsl.Model] = None,
    last_policy: dsl.Input[dsl.Model] = None,
) -> None:
    from firm.stage import execute

    inputs = {
        "critic": critic and critic.path,
        "verdict": verdict.path,
        "last_policy": last_policy and last_policy.path,
    }
    execute("rl", config, inputs, policy.path, metrics.log_metric, pod=vars(task_config), number=round)


@runs_model
def evaluate(  # noqa: D103
    config: dict,
    policy: dsl.Input[dsl.Model],
    samples: dsl.Output[dsl.Dataset],
    metrics: dsl.Output[dsl.Metrics],
    round: int = 1,
    gpus: str = "0",
    critic: dsl.Input[dsl.Model] = None,
) -> None:
    from firm.stage import execute

    inputs = {"critic": critic and critic.path, "policy": policy.path}
    execute("evaluate", config, inputs, samples.path, metrics.log_metric, number=round, gpus=gpus)


@runs_numbers
def report(  # noqa: D103
    config: dict,
    summary: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
    round: int = 1,
    data: dsl.Input[dsl.Dataset] = None,
    critic: dsl.Input[dsl.Model] = None,
    agreement: dsl.Input[dsl.Artifact] = None,
    verdict: dsl.Input[dsl.Artifact] = None,
    policy: dsl.Input[dsl.Model] = None,
    samples: dsl.Input[dsl.Dataset] = None,
    last_report: dsl.Input[dsl.Artifact] = None,
) -> None:
    from firm.stage import execute

    inputs = {
        "data": data and data.path,
        "critic": critic and critic.path,
        "bench": agreement and agreement.path,
        "verdict": verdict and verdict.path,
        "policy": policy and policy.path,
        "samples": samples and samples.path,
        "last_report": last_report and last_report.path,
    }
    execute("report", config, inputs, summary.path, copies={"report.html": page.path}, number=round)
