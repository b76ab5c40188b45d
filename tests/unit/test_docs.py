"""Every YAML and command in README and docs works word for word, as far as it needs no cluster."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from firm import preflight
from firm.ablation.rewards import Planned, plan
from firm.cli import app
from firm.config import RunConfig
from firm.config.loading import load_config
from firm.images import encode_image

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands whose words others check: the charts' tests and tests/cluster run them on a cluster.
ON_A_CLUSTER = (
    "helm ",
    "kubectl ",
    "kfp ",
    "firm doctor",
    "firm status",
    "firm cancel",
    "firm put",  # tests/integration/test_given.py has a server
    "rclone ",
    "firm reap",
    "make kind-",
    "make images",
)
BRING = (ROOT / "docs" / "bring-your-own.md").read_text()


def yamls(text: str) -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """Commands of indented blocks and inline code, without their comments; continued lines are joined."""
    joined = text.replace("\\\n", " ")
    starts = r"(?:firm|make|helm|kubectl|kfp|rclone|python)"
    indented = re.findall(rf"^ {{4}}({starts} .*)$", joined, re.MULTILINE)
    inline = re.findall(rf"`({starts} [^`\n]+)`", joined)
    return [re.sub(r"\s+#.*$", "", line).strip() for line in (*indented, *inline)]


COMMANDS = sorted({command for page in PAGES for command in commands(page.read_text())})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the examples of docs/bring-your-own.md are about: my.yaml, the user's prompts, people's scores and edits."""
    (tmp_path / "my.yaml").write_text(yamls(BRING)[0])
    (tmp_path / "prompts.json").write_text(str([f"prompt {i}" for i in range(100)]).replace("'", '"'))
    [row] = re.findall(r'^ {4}(\{"prompt".*"scores".*)$', BRING, re.MULTILINE)
    (tmp_path / "scores.jsonl").write_text(row)
    [edit] = re.findall(r'(\{"prompt": "make the car red",.*?\})', BRING, re.DOTALL)
    edits = [{**json.loads(edit), "prompt": f"make the car red, {i}"} for i in range(100)]
    (tmp_path / "edits.jsonl").write_text("\n".join(map(json.dumps, edits)))
    for name in ("0001.png", "car.png", "red.png"):
        (tmp_path / name).write_bytes(encode_image(Image.new("RGB", (8, 8))))
    (tmp_path / "vllm").touch(mode=0o755)
    return tmp_path


@pytest.mark.parametrize(("page", "text"), [(p.name, y) for p in PAGES for y in yamls(p.read_text())])
def test_every_yaml_is_a_configuration(page: str, text: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    given = yaml.safe_load(text)
    Path("other.yaml").write_text(text if "base" in given else f"base: my.yaml\n{text}")
    config = load_config("other.yaml")
    preflight.check(config)
    shown = config.model_dump(mode="json")
    assert all(within(values, shown[section]) for section, values in given.items() if section != "base")


def within(given: Any, shown: Any) -> bool:
    """Whether what is given is in the whole configuration, whose defaults it may leave out."""
    if isinstance(given, dict):
        shown = {str(key): value for key, value in shown.items()}
        return all(str(key) in shown and within(value, shown[str(key)]) for key, value in given.items())
    if isinstance(given, list):
        return len(given) == len(shown) and all(map(within, given, shown))
    return bool(given == shown)


def test_there_are_yamls_and_commands() -> None:
    assert len(yamls(BRING)) >= 3 and len(COMMANDS) > 15


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith(ON_A_CLUSTER)])
def test_every_command_works(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = command.split()
    words = [word.replace("=N", "=1") for word in words]  # a number for the reader to choose
    if program == "make":
        subprocess.run(["make", "-n", f"PYTHON={sys.executable}", *words], cwd=ROOT, check=True, capture_output=True)
    elif program == "firm" and words[0] == "run" and len(words) > 1:
        monkeypatch.chdir(folder)
        check_run(words[1], words[3::2], monkeypatch)
    elif program == "firm" and words[0] == "ablate":
        monkeypatch.chdir(folder)
        check_ablation(words[2], words[3:], monkeypatch)
    elif program == "firm" and words[0] == "plan" and len(words) > 1:
        check_plan(words[1:], monkeypatch)
    elif program == "firm" and len(words) > 1:
        subprocess.run([sys.executable, "-m", "firm.cli", *words], cwd=folder, check=True, capture_output=True)
    else:  # a mention of the command, or a server
        words = ["-m", "firm.cli", *words] if program == "firm" else words
        subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, check=True, capture_output=True)


def check_run(source: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the first stage, for which tests/pipelines has shorter runs."""
    from pipelines import local

    started: list[RunConfig] = []
    monkeypatch.setattr(local, "run_locally", lambda config, folder: started.append(config))
    result = CliRunner().invoke(app, ["run", source, *(w for o in overrides for w in ("--set", o))])
    assert result.exit_code == 0, result.output
    expected = load_config(source, overrides)
    assert [c.model_copy(update={"store": expected.store}) for c in started] == [expected]


def check_ablation(source: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything up to the first run, for which tests/pipelines has shorter ones."""
    from pipelines import ablation

    started: list[Planned] = []
    monkeypatch.setattr(ablation, "compare", lambda planned, folder, say: started.extend(planned))
    result = CliRunner().invoke(app, ["ablate", "rewards", source, *options])
    assert result.exit_code == 0, result.output
    given = {name: options[i + 1] for i, name in enumerate(options) if name.startswith("--")}
    config = load_config(source, [given["--set"]] if "--set" in given else [])
    names = [options[i + 1] for i, name in enumerate(options) if name == "--reward"]
    seeds = [int(given["--seed"])] if "--seed" in given else [0, 1, 2]
    assert [one.at(config.store) for one in started] == plan(config, seeds, names)


def check_plan(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measuring, which takes minutes for large models."""
    from firm.plan.stages import Planner

    monkeypatch.setattr(Planner, "stages", lambda _: [])
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match("firm (doctor|status|cancel|reap) ", c)])
def test_commands_for_a_cluster_have_options_that_exist(command: str) -> None:
    help_ = CliRunner().invoke(app, [command.split()[1], "--help"]).output
    for option in re.findall(r"(?<= )--?[a-z]+", command):
        assert re.search(rf"(?<![a-z-]){option}\b", help_), f"{command}: no {option}"


def paths(text: str) -> list[str]:
    """Files and folders of this repository that a text names; ``{a,b}`` names several."""
    found = re.findall(r"(?<![\w/.-])((?:firm|pipelines|images|charts|tests|docs)/[\w./{},-]*[\w/}])", text)
    names = []
    for name in found:
        inner = re.search(r"\{([^}]*)\}", name)
        parts = inner[1].split(",") if inner else [""]
        names += [name.replace(inner[0], part) if inner else name for part in parts]
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "log.md"], ids=lambda p: p.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    """The experiment log alone may speak of what was."""
    text = page.read_text()
    images = ("firm/runtime", "firm/slim", "firm/run", "firm/kfp-run", "firm/stage", "firm/runs", "firm/spec")
    missing = [name for name in paths(text) if not name.startswith(images) and not any(ROOT.glob(f"{name}*"))]
    dotted = re.findall(r"`(firm(?:\.\w+)+)`", text)
    missing += [name for name in dotted if not importable(name)]
    assert not missing


def importable(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    path = ROOT / name.replace(".", "/")
    return (
        path.with_suffix(".py").exists()
        or path.is_dir()
        or name.rpartition(".")[2] in path.parent.with_suffix(".py").read_text()
    )


def test_the_tree_of_the_readme_is_whole() -> None:
    """Every file and folder at the top of firm is in it, and nothing else."""
    tree = re.search(r"^    firm/ .*?(?=^    pipelines/)", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert tree
    named = {name.rstrip("/") for name in re.findall(r"(?<![\w/])(?:\w+\.py|\w+/(?:\w+/)*)(?=\s)", tree[0])}
    there = {
        p.name for p in (ROOT / "firm").iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())
    }
    assert {n for n in named if n != "firm"} - {"launch/k8s"} == there - {"__init__.py"} - UNMENTIONED


UNMENTIONED = {"lifeline.py", "locate.py"}  # small print
