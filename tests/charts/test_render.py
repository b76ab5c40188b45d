"""Each chart renders in each scenario, to objects that Kubernetes and the CRDs accept, and refuses wrong values."""

import functools
import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.k8s.manifest import manifest

CHARTS = Path(__file__).parents[2] / "charts"
NEWEST = "1.34"
FOREIGN = {"monitoring.coreos.com/v1"}  # groups whose CRDs come from elsewhere


@functools.cache
def validators():
    files = CHARTS.glob("platform/files/crds/*.yaml")
    crds = [crd for file in files for crd in yaml.load(file.read_text(), yaml.CSafeLoader)]
    return {
        (f"{spec['group']}/{version['name']}", spec["names"]["kind"]): jsonschema.Draft202012Validator(
            version["schema"]["openAPIV3Schema"]
        )
        for spec in (crd["spec"] for crd in crds)
        for version in spec["versions"]
    }


@functools.cache  # most objects are the same in all scenarios
def fault(text, version):
    """What its kind does not allow in the object ``text``; fields that do not exist are faults too."""
    thing = json.loads(text)
    api, kind = thing["apiVersion"], thing["kind"]
    try:
        if validator := validators().get((api, kind)):
            validator.validate(thing)
        elif api not in FOREIGN:
            kubernetes_validate.validate(thing, version, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return f"{kind}/{thing['metadata']['name']}: {'.'.join(map(str, error.path))}: {error.message}"
    return ""


def test_lint(scenario, helm):
    chart, file = scenario
    done = helm("lint", "--strict", str(chart), *(("-f", str(file)) if file else ()))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_chart_has_the_scenarios(chart):
    assert {"kind", "gpu", "byo", "restricted"} <= {file.name.split("-")[0] for file in chart.glob("ci/*-values.yaml")}


@pytest.mark.parametrize("settings", [{}, {"num_workers": 3, "gpus": 8, "queue": "team"}, {"min_workers": 1}])
def test_the_jobs_that_firm_launches_are_valid(settings):
    job = TrainingJob("run", "rl", "firm.rl.train", {}, {})
    defaults = {"FIRM_MODEL_CACHE": "cache", "FIRM_PRIORITY_CLASS": "low"}
    body = manifest(job, "s3://firm/runs/run/rl-0123456789ab", PyTorchJobLaunch(**settings), defaults, {})
    assert fault(json.dumps(body), NEWEST) == ""
    for replica in body["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": replica["template"]["spec"]}
        assert fault(json.dumps(pod), NEWEST) == ""


@pytest.mark.parametrize("age", ["oldest", "newest"])
def test_objects_are_valid(scenario, render, age):
    oldest = yaml.safe_load((scenario[0] / "Chart.yaml").read_text())["kubeVersion"]  # such as >=1.28.0-0
    version = oldest.removeprefix(">=").removesuffix(".0-0") if age == "oldest" else NEWEST
    rendered = render(*scenario, kubernetes=version)
    assert rendered.objects
    assert list(filter(None, (fault(json.dumps(thing), version) for thing in rendered.objects))) == []


def test_no_object_is_rendered_twice(rendered):
    assert len(rendered.names) == len(rendered.objects)


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        ({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "dat": {}}, "dat"),
        ({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}, "data": {"a": 1}}, "data.a"),
        ({"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "metadata": {"name": "x"}, "spec": {}}, "spec"),
    ],
)
def test_wrong_objects_are_found(thing, message):
    assert message in fault(json.dumps(thing), NEWEST)


def wrong_values(chart):
    """A misspelt key and a value of the wrong type, at every place of the schema where either can stand."""
    wrong = {"string": 1, "integer": "one", "boolean": "yes", "array": "one", "object": "one"}

    def walk(schema, path):
        kinds = schema.get("type", [])
        if isinstance(kinds, str) and kinds in wrong:
            yield path, wrong[kinds]
        if schema.get("additionalProperties") is False:
            yield (*path, "misspelt"), 1
        for key, inner in schema.get("properties", {}).items():
            if (*path, key) != ("global",):
                yield from walk(inner, (*path, key))

    for path, value in walk(json.loads((chart / "values.schema.json").read_text()), ()):
        for key in reversed(path):
            value = {key: value}
        if path:
            yield ".".join(path), value


def test_schema_refuses_misspelt_keys_and_wrong_types(chart):
    schema = json.loads((chart / "values.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    assert validator.is_valid(yaml.safe_load((chart / "values.yaml").read_text()))
    wrong = list(wrong_values(chart))
    assert len(wrong) > 50
    assert [path for path, values in wrong if validator.is_valid(values)] == []


def test_helm_applies_the_schema(chart, render):
    for path, values in list(wrong_values(chart))[:3]:
        error = render(chart, values=values).error
        assert "schema" in error and path.split(".")[-1] in error
