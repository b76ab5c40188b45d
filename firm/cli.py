"""The command line: ``firm run PRESET`` and what helps with it. Heavy imports happen inside commands only."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from firm import __version__
from firm.records import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
config_app = typer.Typer(no_args_is_help=True, help="Show presets and configurations.", rich_markup_mode=None)
app.add_typer(config_app, name="config")

Source = Annotated[str, typer.Argument(metavar="PRESET", help="A preset (`firm config list`) or a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as rl.max_epochs=20. Repeatable.")
]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """FIRM: train critics that can be trusted, and let only those steer RL of image generators.

    Start with `firm run gen-shapes`; see what can be changed with `firm config show gen-shapes`.
    """
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(source: Source, overrides: Overrides = []) -> None:  # noqa: B006 (typer's way of saying "none")
    """Run the whole pipeline on this machine. Run it again after a stop: it goes on where it was."""
    from firm import preflight
    from firm.presets import load_config
    from firm.runs import RunFolder

    config = load_config(source, overrides)
    preflight.check(config)
    try:
        with RunFolder.open(config) as run:
            from pipelines.local import run_locally

            page = run_locally(run.config, run.path)
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"The report is {page}")


@config_app.command("list")
def list_presets() -> None:
    """List the presets."""
    from firm.presets import preset_names

    print("\n".join(preset_names()))


@config_app.command()
def show(
    source: Source,
    overrides: Overrides = [],  # noqa: B006
    as_json: Annotated[
        bool, typer.Option("--json", help="One line of JSON, for `kfp run create ... config=`.")
    ] = False,
) -> None:
    """Show a configuration with all its keys, after overrides."""
    import yaml

    from firm.presets import load_config

    config = load_config(source, overrides).model_dump(mode="json", exclude_none=True)
    print(json.dumps(config) if as_json else yaml.safe_dump(config, sort_keys=False), end="\n" if as_json else "")


def main() -> None:
    """Entry point: a mistake or a failure is one clear message and exit code 2 or 1, never a traceback."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        from firm.store import disk_error

        print(f"error: {disk_error(error, error.filename or '')}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
