"""Write each chart's ``values.schema.json`` and the values table of its ``README.md`` from its ``values.yaml``.

Every key that stands on a line of its own has a comment that starts with ``# --``; more comment lines may follow. An
object needs none when its keys have theirs:

    # -- [debug|info|error] How much is logged.
    level: info
    # -- (integer) Deadline in seconds; none by default.
    deadline: null
    # -- (object, free-form) Extra labels.
    labels: {}

Types come from the defaults. ``(type)`` says what a default cannot: see TYPES; a null default stays allowed.
Objects take the keys that are listed and no other, except where free-form. An enum holds "" when it starts with ``|``.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHARTS = Path(__file__).parent
START, END = "<!-- values: written by charts/generate.py -->", "<!-- /values -->"
ANNOTATION = re.compile(r"^(?:\((?P<type>[a-z, -]+)\) *)?(?:\[(?P<enum>[\w./-]*(?:\|[\w./-]+)+)\] *)?(?P<text>.*)$")
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
# `null` takes a default out, such as a CPU limit
RESOURCES = {name: QUANTITIES | {"type": ["object", "null"]} for name in ("requests", "limits")}
TYPES: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "integer": {"type": "integer"},
    "number": {"type": "number"},
    "boolean": {"type": "boolean"},
    "object, free-form": {"type": "object"},
    "map of strings": {"type": "object", "additionalProperties": {"type": "string"}},
    "quantity": {"type": ["string", "number"]},
    "quantities": QUANTITIES,
    "resources": {"type": "object", "properties": RESOURCES, "additionalProperties": False},
    "list": {"type": "array"},
    "list of strings": {"type": "array", "items": {"type": "string"}},
    "list of objects": {"type": "array", "items": {"type": "object"}},
}
SCHEDULING = {
    "nodeSelector": TYPES["map of strings"],
    "tolerations": TYPES["list of objects"],
    "affinity": TYPES["object, free-form"],
    "topologySpreadConstraints": TYPES["list of objects"],
    "priorityClassName": TYPES["string"],
    "labels": TYPES["map of strings"],
    "annotations": TYPES["map of strings"],
    "disruptionBudget": TYPES["object, free-form"],
    "replicas": {"type": "integer", "minimum": 1},
}
COMPONENT = {"type": "object", "properties": SCHEDULING, "additionalProperties": False}
TYPES["components"] = {"type": "object", "additionalProperties": COMPONENT}
INFERRED = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list"}


@dataclass(frozen=True)
class Row:
    """One line of the table; a group has no default of its own."""

    key: str
    type: str
    default: str
    text: str


class Chart:
    """The values of one chart: its schema and its rows, made in one walk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        source = (folder / "values.yaml").read_text()
        self.lines = source.splitlines()
        self.rows: list[Row] = []
        self.schema: dict[str, Any] = {"$schema": "http://json-schema.org/draft-07/schema#"}
        self.schema |= self._object(yaml.compose(source, yaml.SafeLoader), yaml.safe_load(source), "")
        self.schema["properties"]["global"] = {"type": "object", "description": "Left to charts that contain this one."}

    def files(self) -> dict[Path, str]:
        """Return what is generated, by path."""
        readme = self.folder / "README.md"
        before, start, rest = readme.read_text().partition(START)
        _, end, after = rest.partition(END)
        if not (start and end):
            sys.exit(f"{readme}: write the lines {START} and {END} where the table belongs")
        lines = ["| Key | Type | Default | Description |", "|---|---|---|---|"]
        lines += [f"| `{row.key}` | {row.type} | {row.default} | {row.text} |" for row in self.rows]
        return {
            self.folder / "values.schema.json": json.dumps(self.schema, indent=2, ensure_ascii=False) + "\n",
            readme: "\n".join([before + START, "", *lines, "", END + after]),
        }

    def _object(self, node: yaml.Node | None, values: dict[str, Any], prefix: str) -> dict[str, Any]:
        assert isinstance(node, yaml.MappingNode)
        properties = {}
        for (key_node, value_node), (key, value) in zip(node.value, values.items(), strict=True):
            comment = None if node.flow_style else self._comment(key_node, value_node, prefix + key)
            properties[key] = self._key(value_node, value, prefix + key, comment)
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _key(self, node: yaml.Node, value: Any, path: str, comment: str | None) -> dict[str, Any]:
        annotation = ANNOTATION.match(comment or "")
        assert annotation  # its last part takes anything
        kind, enum, text = annotation["type"], annotation["enum"], annotation["text"]
        first = len(self.rows)
        if isinstance(value, dict) and value and not kind:
            kind, schema = "object", self._object(node, value, path + ".")
        else:
            kind = kind or INFERRED.get(type(value), "")
            if kind not in TYPES:
                sys.exit(f"{self.folder / 'values.yaml'}: {path}: write a type, one of ({'), ('.join(TYPES)})")
            schema = dict(TYPES[kind])
        if enum:
            schema["enum"] = enum.split("|") + [None] * (value is None)
            text += f" One of `{enum.strip('|').replace('|', '`, `')}`."
        if value is None:
            schema["type"] = [*([schema["type"]] if isinstance(schema["type"], str) else schema["type"]), "null"]
        if comment is not None:
            schema["description"] = text
            default = "" if len(self.rows) > first else f"`{json.dumps(value, ensure_ascii=False)}`"
            self.rows.insert(first, Row(path, kind.removesuffix(", free-form"), default, text.replace("|", "\\|")))
        return schema

    def _comment(self, key: yaml.Node, value: yaml.Node, path: str) -> str | None:
        """Return the text above a key; keys inside {braces} are described by the key that holds them."""
        words: list[str] = []
        for line in reversed(self.lines[: key.start_mark.line]):
            stripped = line.strip()
            if not stripped.startswith("#"):
                break
            words.insert(0, stripped.lstrip("#").removeprefix(" --").strip())
            if stripped.startswith("# --"):
                return " ".join(words)
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            return None
        sys.exit(f"{self.folder / 'values.yaml'}:{key.start_mark.line + 1}: {path} has no `# --` comment")


def main() -> None:
    """Write the files of every chart, or with ``--check`` fail where one is stale."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is stale")
    parser.add_argument("charts", nargs="*", type=Path, help="chart folders; all by default")
    arguments = parser.parse_args()
    folders = arguments.charts or sorted(path.parent for path in CHARTS.glob("*/values.yaml"))
    files = {path: text for folder in folders for path, text in Chart(folder).files().items()}
    stale = [path for path, text in files.items() if not path.exists() or path.read_text() != text]
    if arguments.check and stale:
        sys.exit(f"stale: {', '.join(map(str, stale))}; run `make generate` and review")
    for path in stale:
        path.write_text(files[path])


if __name__ == "__main__":
    main()
