"""Every preset loads, and the numbers of those that follow the paper say where they come from."""

from collections.abc import Callable, Iterator
from importlib import resources

import pytest
import yaml

from firm.config.loading import check_for_cluster, load_config, preset_names

PAPER = ("gen-sd35", "edit-qwen-image-edit-2509")


def numbers(node: yaml.Node, path: str = "") -> Iterator[tuple[str, int, int]]:
    """Key path, first and last line of every key whose value is a number or holds numbers."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        below = f"{path}.{key.value}".lstrip(".")
        yield from numbers(value, below)
        leaves = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if any(isinstance(yaml.safe_load(yaml.serialize(leaf)), int | float) for leaf in leaves):
            yield below, key.start_mark.line, value.start_mark.line


@pytest.mark.parametrize("name", preset_names())
def test_preset_loads(name: str) -> None:
    assert load_config(name).name


def test_there_are_presets() -> None:
    assert {"gen-shapes", "edit-shapes", *PAPER} <= set(preset_names())


@pytest.mark.parametrize(
    "name", ["gen-sd35", "gen-sd35-8xh100", "gen-sd35-kubernetes", "critic-gen-8b", "critic-gen-8b-lora"]
)
def test_the_critic_of_the_paper_has_the_papers_batch_wherever_it_is_trained(name: str) -> None:
    config = load_config(name)
    processes = config.launch.num_workers * (config.launch.gpus if config.launch.kind == "pytorchjob" else 1)
    assert config.sft and config.sft.batch_size * config.sft.gradient_accumulation * processes == 80
    assert config.launch.gpus >= 1


def test_a_preset_for_a_cluster_can_be_submitted() -> None:
    for name in ("gen-shapes-kind", "gen-sd35-kubernetes"):
        check_for_cluster(load_config(name))


@pytest.mark.parametrize("name", PAPER)
def test_numbers_of_the_presets_of_the_paper_name_their_source(name: str) -> None:
    text = resources.files("firm.presets").joinpath(f"{name}.yaml").read_text()
    lines = text.splitlines()
    found = list(numbers(yaml.compose(text)))
    bare = [key for key, first, last in found if not any("#" in line for line in lines[max(first - 1, 0) : last + 1])]
    assert found
    assert not bare, "say in a comment on the line or above it where the number comes from"


def table(node: yaml.Node, lines: list[str], path: str = "") -> Iterator[str]:
    """Each key with a value of its own, and the comment on its line: where the value is from."""
    for key, value in node.value:
        below = f"{path}.{key.value}".lstrip(".")
        if isinstance(value, yaml.MappingNode):
            yield from table(value, lines, below)
        else:
            _, _, source = lines[key.start_mark.line].partition("  # ")
            yield f"{below}: {yaml.safe_load(yaml.serialize(value))}" + (f"  # {source}" if source else "")


@pytest.mark.golden
@pytest.mark.parametrize("name", PAPER)
def test_the_values_of_the_presets_of_the_paper_are_those_of_the_golden_tables(
    name: str, golden: Callable[[str, str], None]
) -> None:
    """The paper's settings change on purpose only."""
    text = resources.files("firm.presets").joinpath(f"{name}.yaml").read_text()
    golden(f"{name}.txt", "\n".join(table(yaml.compose(text), text.splitlines())) + "\n")
