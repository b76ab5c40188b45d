"""Schema and README of each chart follow from its values.yaml."""

import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

import firm

GENERATE = Path(__file__).parents[2] / "charts" / "generate.py"
README = "# x\n<!-- values: written by charts/generate.py -->\n<!-- /values -->\nend\n"
VALUES = """\
# -- [debug|info] How much is logged,
# in words.
level: info
# -- Server.
server:
  # -- (integer) Deadline.
  deadline: null
  # -- Image.
  image: {tag: "1"}
  # -- (resources) Resources.
  resources:
    requests: {cpu: 1}
# -- (map of strings) Labels.
labels: {}
"""


def generate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GENERATE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def made(tmp_path):
    (tmp_path / "values.yaml").write_text(VALUES)
    (tmp_path / "README.md").write_text(README)
    assert generate(tmp_path).returncode == 0
    return tmp_path


def test_charts_are_up_to_date():
    done = generate("--check")
    assert done.returncode == 0, done.stderr


def test_version_is_that_of_the_package():
    chart = yaml.safe_load((GENERATE.parent / "firm" / "Chart.yaml").read_text())
    assert chart["appVersion"] == firm.__version__


def test_values_stay_readable(chart):
    assert len((chart / "values.yaml").read_text().splitlines()) <= 350


def test_table_has_every_key_and_keeps_the_text_around(made):
    text = (made / "README.md").read_text()
    assert text.startswith("# x\n") and text.endswith("<!-- /values -->\nend\n")
    assert '| `level` | string | `"info"` | How much is logged, in words. One of `debug`, `info`. |' in text
    assert "| `server.deadline` | integer | `null` | Deadline. |" in text
    assert '| `server.image` | object | `{"tag": "1"}` | Image. |' in text


@pytest.mark.parametrize(
    ("values", "good"),
    [
        ({}, True),
        ({"level": "debug", "server": {"deadline": 3, "image": {"tag": "2"}}, "labels": {"a": "b"}}, True),
        ({"global": {"anything": 1}}, True),
        ({"server": {"resources": {"limits": {"cpu": "2"}, "requests": None}}}, True),
        ({"level": "loud"}, False),
        ({"levle": "info"}, False),
        ({"server": {"deadline": "3"}}, False),
        ({"server": {"image": {"tga": "2"}}}, False),
        ({"server": {"image": {"tag": 2}}}, False),
        ({"server": {"resources": {"limit": {}}}}, False),
        ({"labels": {"a": 1}}, False),
    ],
)
def test_schema(made, values, good):
    schema = json.loads((made / "values.schema.json").read_text())
    assert jsonschema.Draft7Validator(schema).is_valid(values) is good


def test_stale_files_are_named_and_left_alone(made):
    (made / "values.yaml").write_text(VALUES.replace("info\n", "debug\n"))
    before = (made / "README.md").read_text()
    done = generate("--check", made)
    assert done.returncode == 1
    assert "README.md" in done.stderr
    assert (made / "README.md").read_text() == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("a: 1\n", "values.yaml:1: a has no `# --` comment"),
        ("# -- A.\na:\n  b: 1\n", "values.yaml:3: a.b has no `# --` comment"),
        ("# -- A.\na: {}\n", "a: write a type"),
        ("# -- A.\na: null\n", "a: write a type"),
        ("# -- (integre) A.\na: 1\n", "a: write a type"),
    ],
)
def test_careless_values_are_refused(tmp_path, values, message):
    (tmp_path / "values.yaml").write_text(values)
    (tmp_path / "README.md").write_text(README)
    done = generate(tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_every_object_of_a_schema_is_closed_or_free_on_purpose(chart):
    def walk(schema, path):
        if "properties" in schema:
            assert path == "" or schema["additionalProperties"] is False, path
            for key, inner in schema["properties"].items():
                walk(inner, f"{path}.{key}")

    schema = json.loads((chart / "values.schema.json").read_text())
    assert schema["additionalProperties"] is False
    walk(schema, "")
