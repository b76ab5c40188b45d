"""The command line points to the next step, and a mistake is one message."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

from firm import __version__
from firm.cli import main
from firm.config.loading import preset_names

Firm = Callable[..., tuple[int, str, str]]


@pytest.fixture
def firm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Firm:
    """firm(*words): exit code and output of the command line, in this process."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["firm", *words])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


def test_help_names_the_first_step(firm: Firm) -> None:
    code, said, _ = firm("--help")
    assert code == 0 and "firm run gen-shapes" in said


def test_version() -> None:
    command = [sys.executable, "-m", "firm.cli", "--version"]
    assert subprocess.check_output(command, text=True, timeout=60).strip() == __version__


def test_config_list_and_show(firm: Firm) -> None:
    assert firm("config", "list")[1].split() == preset_names()
    shown = yaml.safe_load(firm("config", "show", "gen-shapes", "--set", "rl.group_size=8")[1])
    assert shown["rl"]["group_size"] == 8 and shown["name"] == "gen-shapes"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "gen-shape"), ["unknown preset 'gen-shape'", "gen-shapes"]),
        (("run", "gen-shapes", "--set", "rl.group=3"), ["rl.group"]),
        (("config", "show", "gen-shapes", "--set", "rl.group_size=1"), ["rl.group_size", "greater than or equal to 2"]),
        (("fly",), ["No such command"]),
        (("ablate", "rewards", "gen-shape"), ["unknown preset 'gen-shape'"]),
        (("ablate", "rewards", "gen-shapes", "--reward", "cme"), ["no reward 'cme'", "--reward", "base-only"]),
        (("ablate", "rewards", "gen-shapes", "--seed", "-1"), ["seed: Input should be greater"]),
        (("ablate", "rewards", "gen-shapes", "--seed", "many"), ["--seed", "valid integer"]),
        (("ablate", "rewards", "gen-shapes", "--set", "seed=1"), ["takes its seeds from --seed"]),
        (("ablate", "rewards", "gen-shapes", "--set", "rounds=2"), ["runs of one round"]),
        (("ablate", "rewards", "gen-shapes", "--name", "gen-shapes"), ["a folder of its own", "--name"]),
        (("ablate", "rewards", "gen-shapes", "--name", "../x"), ["name: String should match"]),
        (
            ("ablate", "rewards", "gen-shapes", "--set", "reward={formula: base_only, base: quality}"),
            ["no rewards are known for base quality", "base execution and bonuses ['consistency'] (cme)"],
        ),
    ],
)
def test_a_mistake_is_named_with_exit_code_2(firm: Firm, arguments: tuple[str, ...], words: list[str]) -> None:
    code, _, said = firm(*arguments)
    assert code == 2
    assert all(word in said for word in words), said
    assert "Traceback" not in said


def test_a_mistake_ends_the_command_without_a_traceback() -> None:
    command = [sys.executable, "-m", "firm.cli", "config", "show", "gen-shapes", "--set", "rl.group_size=1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and "rl.group_size" in result.stderr and "Traceback" not in result.stderr
