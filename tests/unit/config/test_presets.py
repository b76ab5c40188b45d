"""Every preset loads, and the numbers of the preset that follows the paper say where they come from."""

from collections.abc import Iterator
from importlib import resources

import pytest
import yaml

from firm.config.loading import load_config, preset_names


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
    assert {"gen-shapes", "gen-sd35"} <= set(preset_names())


def test_numbers_of_the_preset_of_the_paper_name_their_source() -> None:
    text = resources.files("firm.presets").joinpath("gen-sd35.yaml").read_text()
    lines = text.splitlines()
    found = list(numbers(yaml.compose(text)))
    bare = [key for key, first, last in found if not any("#" in line for line in lines[max(first - 1, 0) : last + 1])]
    assert found
    assert not bare, "say in a comment on the line or above it where the number comes from"
