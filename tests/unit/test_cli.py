"""The command line points to the next step, and a mistake is one message."""

import subprocess
import sys

import pytest
import yaml

from firm import __version__
from firm.config.loading import preset_names


def firm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "firm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_help_names_the_first_step() -> None:
    result = firm("--help")
    assert result.returncode == 0 and "firm run gen-shapes" in result.stdout


def test_version() -> None:
    assert firm("--version").stdout.strip() == __version__


def test_config_list_and_show() -> None:
    assert firm("config", "list").stdout.split() == preset_names()
    shown = yaml.safe_load(firm("config", "show", "gen-shapes", "--set", "rl.group_size=8").stdout)
    assert shown["rl"]["group_size"] == 8 and shown["name"] == "gen-shapes"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "gen-shape"), ["unknown preset 'gen-shape'", "gen-shapes"]),
        (("run", "gen-shapes", "--set", "rl.group=3"), ["rl.group"]),
        (("config", "show", "gen-shapes", "--set", "rl.group_size=1"), ["rl.group_size", "greater than or equal to 2"]),
        (("fly",), ["No such command"]),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(arguments: tuple[str, ...], words: list[str]) -> None:
    result = firm(*arguments)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert "Traceback" not in result.stderr
