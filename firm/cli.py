"""The command line: ``firm run PRESET`` and what helps with it. Heavy imports happen inside commands only."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from firm import __version__
from firm.plan.assumptions import Assumptions
from firm.records import UserError
from firm.terminal import visible

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(no_args_is_help=True, help="Show presets and configurations.", rich_markup_mode=None)
app.add_typer(config_app, name="config")
ablate_app = typer.Typer(
    no_args_is_help=True, help="Compare runs in which one thing is different.", rich_markup_mode=None
)
app.add_typer(ablate_app, name="ablate")

Source = Annotated[str, typer.Argument(metavar="PRESET", help="A preset (`firm config list`) or a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as rl.max_epochs=20. Repeatable.")
]


def _say(text: str) -> None:
    """Print what others may have written, such as a server."""
    print(visible(text))


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """FIRM: train critics that can be trusted, and let only those steer RL of image generators and editors.

    Start with `firm run gen-shapes`; see what can be changed with `firm config show gen-shapes`.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(source: Source, overrides: Overrides = []) -> None:  # noqa: B006 (typer's way of saying "none")
    """Run the stages that a configuration describes on this machine. Run it again after an interruption: it resumes."""
    from firm import preflight, reach
    from firm.config import stages_of
    from firm.config.loading import load_config
    from firm.storage.put import uploaded
    from pipelines.runs import RunFolder

    config = load_config(source, overrides)
    stages_of(config)  # refuses what makes no run
    preflight.check(config)
    reach.check(config)
    with _resumable(), RunFolder.open(uploaded(config)) as run:
        from pipelines.local import run_locally

        page = run_locally(run.config, run.path)
    print(f"The report is {page}")


@app.command()
def plan(
    source: Source,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="For machines: bytes, FLOPs and hours.")] = False,
    tflops: Annotated[float, typer.Option(min=1, help="What a GPU can compute in bfloat16.")] = Assumptions.tflops,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of it that is reached.")] = Assumptions.mfu,
    bandwidth: Annotated[float, typer.Option(min=1, help="GB/s of a GPU's memory.")] = Assumptions.bandwidth,
    mbu: Annotated[
        float, typer.Option(min=0.001, max=1, help="Share of it that is reached where answers are written.")
    ] = Assumptions.mbu,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Of a prompt.")] = Assumptions.prompt_tokens,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = Assumptions.answer_tokens,
    image_side: Annotated[
        int, typer.Option(min=0, help="Pixels of a side of curated images; 0: as large as the policy's.")
    ] = Assumptions.image_side,
    num_candidates: Annotated[
        int, typer.Option("--candidates", min=1, help="Rows of a file of candidates that is not there.")
    ] = Assumptions.candidates,
) -> None:
    """Say what a run will cost, from configurations alone: memory of a GPU, FLOPs, hours, calls to others."""
    from firm.config.loading import load_config
    from firm.critics.rubrics import check_rubrics
    from firm.plan import table
    from firm.plan.stages import Planner

    config = load_config(source, overrides)
    check_rubrics(config)
    given = Assumptions(
        tflops, mfu, bandwidth, mbu, prompt_tokens, answer_tokens, image_side, candidates=num_candidates
    )
    stages = Planner(config, given).stages()
    if as_json:
        print(json.dumps(table.as_json(stages, given)))
    else:
        table.show(stages, given)


@app.command()
def put(
    path: Annotated[Path, typer.Argument(help="A file of prompts, candidates or scores: text, JSON, JSONL, Parquet.")],
    uri: Annotated[str, typer.Argument(metavar="URI", help="s3://bucket/folder, with the keys of the run's store.")],
) -> None:
    """Upload prompts, candidates or scores with their images for a run on a cluster, and print what to set."""
    from firm.storage.put import put as upload

    def note(text: str) -> None:
        print(visible(text), file=sys.stderr)

    with _resumable():
        _say(upload(path, uri, say=note))
    note("set this as prompts.path, or as the path of a source of curation or bench")


@contextmanager
def _resumable() -> Iterator[None]:
    """What may be interrupted: the user is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


@ablate_app.command()
def rewards(
    source: Source,
    seeds: Annotated[list[int], typer.Option("--seed", help="Seed of a run with each reward. Repeatable.")] = [0, 1, 2],  # noqa: B006
    only: Annotated[
        list[str],
        typer.Option(
            "--reward",
            metavar="NAME",
            help="cme or qma, base-only, or weighted-sum-A-B; default: the paper's. Repeatable.",
        ),
    ] = [],  # noqa: B006
    name: Annotated[str, typer.Option(help="Folder of the result in the store; default: ablate-rewards-NAME.")] = "",
    overrides: Overrides = [],  # noqa: B006
) -> None:
    """Run RL with several rewards and compare what the auditor sees. Run it again after an interruption: it resumes."""
    from firm import preflight, reach
    from firm.ablation.rewards import plan
    from firm.config.loading import load_config
    from firm.storage.put import uploaded
    from pipelines.runs import RunFolder

    if any(assignment.startswith("seed=") for assignment in overrides):
        raise UserError("an ablation takes its seeds from --seed", "--set seed", "for example --seed 0", usage=True)
    config = load_config(source, overrides)
    result = load_config(source, [*overrides, f"name={name or f'ablate-rewards-{config.name}'}"])
    if result.name == config.name:
        raise UserError("the result needs a folder of its own", "--name", "give another name", usage=True)
    first = plan(config, seeds, only)[0].config
    preflight.check(first)
    reach.check(first)
    planned = plan(uploaded(config), seeds, only)
    with _resumable(), RunFolder.open(config) as run, RunFolder.open(result) as to:
        from pipelines.ablation import compare

        page = compare([one.at(run.config.store) for one in planned], to.path, print)
    print(f"The comparison is {page}")


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A model folder, an sft artifact (folder or s3://...), or a hub id.")],
    host: str = "127.0.0.1",
    port: int = 8000,
    served_model_name: str = "",
    answer_style: str = "reason_first",
    dtype: str = "bfloat16",
    batch_size: int = 8,
    max_new_tokens: int = 1024,
    max_pixels: Annotated[int | None, typer.Option(help="Of an image: larger ones are scaled down.")] = None,
    no_key: Annotated[bool, typer.Option("--no-key", help="Other machines may ask, even if there is no key.")] = False,
    max_question_tokens: Annotated[int, typer.Option(help="Of text and images; the model may allow fewer.")] = 8192,
    max_question_pixels: Annotated[int, typer.Option(help="Of all images of a question.")] = 2**22,
    max_question_images: int = 8,
    max_waiting: Annotated[int, typer.Option(help="Requests that wait; beyond, the busiest callers get 429.")] = 512,
    max_connections: int = 512,
    max_client_connections: Annotated[int, typer.Option(help="Connections from one address.")] = 128,
) -> None:
    """Serve a critic behind an OpenAI-compatible endpoint; clients must send the key in OPENAI_API_KEY, if set."""
    from firm.critics import serve as server

    server.serve(
        model,
        host=host,
        port=port,
        served_model_name=served_model_name,
        answer_style=cast(Any, answer_style),  # validated by the server's configuration
        dtype=cast(Any, dtype),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        max_pixels=max_pixels,
        no_key=no_key,
        limits={
            "max_question_tokens": max_question_tokens,
            "max_question_pixels": max_question_pixels,
            "max_question_images": max_question_images,
            "max_waiting": max_waiting,
            "max_connections": max_connections,
            "max_client_connections": max_client_connections,
        },
    )


Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Default: the pod's, or the current context's.")]
Endpoint = Annotated[str, typer.Option(help="KFP API; default: KF_PIPELINES_ENDPOINT, or http://ml-pipeline:8888.")]


@app.command()
def doctor(
    namespace: Namespace = "",
    endpoint: Endpoint = "",
    store: Annotated[str, typer.Option(help="Where runs keep their artifacts; default: as the chart firm says.")] = "",
    gpus: Annotated[int, typer.Option(help="GPUs that the cluster must have.")] = 0,
) -> None:
    """Check a cluster, from inside or outside, and say how to fix what is wrong."""
    from firm.config.launch import PyTorchJobLaunch
    from firm.launch.k8s.backend import Backend
    from firm.launch.k8s.cluster import Cluster
    from firm.launch.k8s.doctor import examine

    marks = {"ok": "✔", "warning": "!", "failed": "✘", "unknown": "?"}
    launch = PyTorchJobLaunch(gpus=gpus)
    failed = False
    for found in examine(Cluster.connect(namespace or None), Backend(endpoint), store, launch):
        failed |= found.state == "failed"
        _say(f"{marks[found.state]} {found.check}: {found.detail}".replace("\n", "\n    "))
        if found.fix and found.state != "ok":
            _say(f"    -> {found.fix}")
    raise typer.Exit(int(failed))


@app.command()
def status(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Id or name of a KFP run, or name of a run.")],
    namespace: Namespace = "",
    endpoint: Endpoint = "",
) -> None:
    """Say where a run on the cluster stands: what ran or was reused, where artifacts are, and what waits for what."""
    from firm.launch.k8s.backend import Backend
    from firm.launch.k8s.cluster import Cluster
    from firm.launch.k8s.status import status as lines

    for line in lines(name, Cluster.connect(namespace or None), Backend(endpoint)):
        _say(line)


@app.command()
def cancel(
    name: Annotated[str, typer.Argument(metavar="RUN", help="Id or name of a KFP run, or name of a run.")],
    namespace: Namespace = "",
    endpoint: Endpoint = "",
) -> None:
    """End a run on the cluster with its jobs; what it has written stays, and the next run resumes from it."""
    from firm.launch.k8s.backend import Backend
    from firm.launch.k8s.cancel import cancel as end
    from firm.launch.k8s.cluster import Cluster

    end(name, Cluster.connect(namespace or None), Backend(endpoint), _say)


@app.command()
def reap(namespace: Namespace = "") -> None:
    """Delete unfinished PyTorchJobs of KFP runs that are over (what the chart's CronJob does)."""
    from firm.launch.k8s.cancel import reap as delete_orphans
    from firm.launch.k8s.cluster import Cluster

    delete_orphans(Cluster.connect(namespace or None), _say)


@config_app.command("list")
def list_presets() -> None:
    """List the presets."""
    from firm.config.loading import preset_names

    print("\n".join(preset_names()))


@config_app.command()
def show(
    source: Source,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One line of JSON for `kfp run create ... config=`, if it can run on a cluster."),
    ] = False,
) -> None:
    """Show a configuration with all its keys, after overrides."""
    import yaml

    from firm.config.loading import check_for_cluster, load_config
    from firm.critics.rubrics import check_rubrics

    config = load_config(source, overrides)
    check_rubrics(config)
    plain = config.model_dump(mode="json", exclude_none=True)
    if as_json:
        check_for_cluster(config, in_pod=False)
        print(json.dumps(plain))
    else:
        print(yaml.safe_dump(plain, sort_keys=False), end="")


def main() -> None:
    """Entry point: a mistake or a failure is one clear message and exit code 2 or 1, never a traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        from firm.storage.files import disk_error

        print(f"error: {disk_error(error, error.filename or '')}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
