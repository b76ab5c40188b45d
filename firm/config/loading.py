"""How a configuration is loaded: a preset or a YAML file, plus ``--set key=value`` overrides.

A YAML file may name another preset or file as ``base`` and give only the differences. Every mistake is reported with
the path of its key.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from firm.config.data_path import is_remote
from firm.config.launch import LocalLaunch
from firm.config.run import RunConfig
from firm.config.section import NamedFile
from firm.records import UserError
from firm.seeds import seed_for
from firm.texts import check_text, read_text

MAX_CHARS = 2**17
"""Most characters of YAML: a value of three takes two thousand bytes while it is parsed."""
MAX_VALUES = 20_000
MAX_DEPTH = 50

_ALTERNATIVES = {"path": ("function",), "function": ("path",)}  # mutually exclusive keys of a section


def preset_names() -> list[str]:
    """Names of the presets shipped with the package."""
    files = resources.files("firm.presets").iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def _parse_yaml(text: str, where: str, what: str) -> Any:
    """The value of a YAML text, in which nothing is shared: a change of an alias must not change what it stands for.

    Values are counted as nodes, before any is made: a merge of aliases (``<<``) multiplies what they stand for.
    """
    if len(text) > MAX_CHARS:
        fault = f"{what} has {len(text)} characters, more than {MAX_CHARS}"
        raise UserError(fault, where, "a configuration has some thousand", usage=True)
    number = count()

    def copied(node: yaml.Node, depth: int) -> yaml.Node:
        if depth > MAX_DEPTH or next(number) > MAX_VALUES:
            limits = f"more than {MAX_VALUES} values, aliases included, or {MAX_DEPTH} levels"
            raise UserError(f"{what} has {limits}", where, "a configuration has some hundred values", usage=True)
        if isinstance(node, yaml.MappingNode):
            pairs = [(copied(key, depth + 1), copied(item, depth + 1)) for key, item in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, node.end_mark)
        if isinstance(node, yaml.SequenceNode):
            items = [copied(item, depth + 1) for item in node.value]
            return yaml.SequenceNode(node.tag, items, node.start_mark, node.end_mark)
        check_text(node.value, where)
        return node

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_document(copied(node, 0))
    except UserError:
        raise
    except Exception as error:  # PyYAML raises anything, such as IndexError for an empty !!int
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} is not valid YAML", where, reason, usage=True) from error


def _read_yaml(text: str, where: str) -> dict[str, Any]:
    data = _parse_yaml(text, where, "the configuration")
    if not isinstance(data, dict):
        raise UserError("the configuration must be a mapping of keys", where, "see `firm config show PRESET`", True)
    return data


def _read_source(name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read a preset by name or a YAML file by path, following ``base`` (a path is relative to the file naming it)."""
    if name in seen:
        raise UserError("a configuration is its own base", " -> ".join((*seen, name)), "remove one `base`", True)
    if name in preset_names():
        data = _read_yaml(resources.files("firm.presets").joinpath(f"{name}.yaml").read_text(), name)
    elif Path(name).suffix in (".yaml", ".yml") and Path(name).is_file():
        data = _read_yaml(read_text(Path(name), "the configuration"), name)
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
    value = _parse_yaml(text, f"--set {key}", f"the value {text[:200]!r}")
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


def data_files(config: RunConfig) -> Iterator[tuple[str, NamedFile]]:
    """Files of prompts, candidates and scores that a run names in any round, each with its key."""
    for number in range(1, min(config.rounds, 2) + 1):
        for key, section in of_round(config, number).walk(""):
            for file in section.named_files():
                if not (file.is_model or file.is_code):
                    yield f"{key}.{file.key}", file


def check_for_cluster(config: RunConfig, in_pod: bool = True) -> None:
    """Check that every step of a run can be a pod of its own.

    Args:
        config: The run.
        in_pod: Whether this is one of its pods. Outside, an absolute path that is not here may be there.

    Raises:
        UserError: Its artifacts are in a folder, its jobs are processes of this machine, or its data is in a file that
            pods do not have.
    """
    if not config.store.startswith(("s3://", "minio://")):
        fix = "set it to s3://bucket/prefix, as the preset gen-shapes-kind does"
        raise UserError("steps on a cluster do not share a folder", f"store: {config.store}", fix, usage=True)
    if isinstance(config.launch, LocalLaunch):
        fix = "set it to pytorchjob, as the preset gen-shapes-kind does"
        raise UserError("the steps sft and rl on a cluster start jobs there", "launch.kind: local", fix, usage=True)
    for key, file in data_files(config):
        path = Path(file.path)
        if not is_remote(file.path) and (not path.exists() if in_pod else path.exists() or not path.is_absolute()):
            bucket = "/".join(config.store.split("/")[:3])
            fix = f"upload it with `firm put {file.path} {bucket}/data`, and set {key} to the path that it prints"
            raise UserError("pods do not have this file", f"{key}: {file.path}", fix, usage=True)


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
