"""How a configuration is loaded: a preset or a YAML file, plus ``--set key=value`` overrides.

A YAML file may name another preset or file as ``base`` and give only the differences. Every mistake is reported with
the path of its key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firm.config.run import RunConfig
from firm.records import UserError
from firm.seeds import seed_for

_ALTERNATIVES = {"path": ("function",), "function": ("path",)}  # mutually exclusive keys of a section


def preset_names() -> list[str]:
    """Names of the presets shipped with the package."""
    files = resources.files("firm.presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError("the configuration is not valid YAML", where, str(error).replace("\n", " "), True) from error
    if not isinstance(data, dict):
        raise UserError("the configuration must be a mapping of keys", where, "see `firm config show PRESET`", True)
    return dict(_unshared(data))


def _unshared(node: Any) -> Any:
    """A copy in which nothing is shared: an override of a YAML alias must not change what it is an alias of."""
    if isinstance(node, dict):
        return {key: _unshared(value) for key, value in node.items()}
    return [_unshared(item) for item in node] if isinstance(node, list) else node


def _read_source(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a preset by name or a YAML file by path, following ``base`` (a path is relative to the file naming it)."""
    if name in seen:
        raise UserError("a configuration is its own base", " -> ".join((*seen, name)), "remove one `base`", True)
    if name in preset_names():
        data = _read_yaml(resources.files("firm.presets").joinpath(f"{name}.yaml").read_text(), name)
    elif Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError("the configuration is not UTF-8 text", name, "save it as UTF-8", usage=True) from error
        data = _read_yaml(text, name)
    else:
        known = ", ".join(preset_names())
        raise UserError(f"unknown preset {name!r}", "", f"use one of {known}, or the path of a YAML file", True)
    base = data.pop("base", None)
    if base is None:
        return data
    relative = Path(name).parent / str(base)
    return _merge(_read_source(str(relative) if relative.is_file() else str(base), (*seen, name)), data)


def _merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The base overridden by the change; a section whose ``kind`` changes is replaced as a whole."""
    merged = dict(base)
    for key, value in change.items():
        _make_room(merged, key, value)
    for key, value in change.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _make_room(section: dict[str, Any], key: str, value: Any) -> None:
    """Remove keys of a section that contradict a new value of another of its keys."""
    if key == "kind" and section.get("kind", value) != value:
        section.clear()
    for other in _ALTERNATIVES.get(key, ()) if value is not None else ():
        section.pop(other, None)


def _override(data: dict[str, Any], assignment: str) -> dict[str, Any]:
    """Apply one ``a.b=value``; the value is YAML; list items are addressed by index (``curation.sources.0.name``)."""
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise UserError(
            f"--set {assignment!r} is not of the form key=value", "", "for example --set rl.max_epochs=20", True
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the value {text!r} is not valid YAML", f"--set {key}", "quote the value", True) from error
    data = copy.deepcopy(data)
    node: Any = data
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            _make_room(node, last, value)
            node[last] = value
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError("there is no such key", f"--set {key}", "see `firm config show PRESET`", True) from error
    return data


def parse_config(data: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Validate a mapping; all mistakes are reported together, each with the path of its key."""
    config = _validated(data, where)
    if config.rounds > 1:
        of_round(config, 2)
    return config


def of_round(config: RunConfig, number: int) -> RunConfig:
    """The configuration of a round, counted from 1: further rounds have other draws, and what ``further_rounds`` says.

    Raises:
        UserError: The run has no such round, or ``further_rounds`` does not fit the other sections.
    """
    if number == 1:
        return config
    if number > config.rounds:
        fix = "set rounds, or use the pipeline of that number of rounds"
        raise UserError(f"there is no round {number}: the run has {config.rounds}", "rounds", fix, usage=True)
    data = _merge(config.model_dump(mode="json"), {str(key): value for key, value in config.further_rounds.items()})
    seed = seed_for(config.seed, "round", number) % 2**31
    return _validated({**data, "seed": seed, "rounds": 1, "further_rounds": {}}, "further_rounds")


def _validated(data: Mapping[str, Any], where: str) -> RunConfig:
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or '(top level)'}: {e['msg']}" for e in error.errors()]
        fix = "see `firm config show PRESET` for the keys\n     " + "\n     ".join(lines)
        raise UserError(f"{len(lines)} impossible or unknown value(s)", where, fix, True) from error


def load_config(name: str, overrides: Iterable[str] = ()) -> RunConfig:
    """Load a preset or YAML file and apply ``key=value`` overrides, those of a section's ``kind`` first.

    Raises:
        UserError: Unknown preset, unknown key or impossible value, naming the key path (exit code 2).
    """
    data = _read_source(name)
    for assignment in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith("kind")):
        data = _override(data, assignment)
    return parse_config(data, name)
