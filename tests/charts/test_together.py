"""Both charts in one namespace: what one refers to, it or the other makes."""

from pathlib import Path

import pytest
import yaml

import firm

CHARTS = Path(__file__).parents[2] / "charts"
SCENARIOS = [None, *sorted(f.name for f in (CHARTS / "firm").glob("ci/*-values.yaml") if f.name != "byo-values.yaml")]

REFERENCES = {
    "configMap": ("ConfigMap", "name"),
    "configMapRef": ("ConfigMap", "name"),
    "configMapKeyRef": ("ConfigMap", "name"),
    "secret": ("Secret", "secretName"),
    "secretRef": ("Secret", "name"),
    "secretKeyRef": ("Secret", "name"),
    "persistentVolumeClaim": ("PersistentVolumeClaim", "claimName"),
}


@pytest.fixture
def both(request, render):
    """Objects of both charts in a scenario; in byo the other half is there already, and not ours to see."""
    results = [
        render(chart, CHARTS / chart / "ci" / request.param if request.param else None)
        for chart in ("platform", "firm")
    ]
    for result in results:
        assert not result.error, result.error
    return results


def references(node):
    """Kind and name of what a pod cannot start without."""
    if isinstance(node, list):
        for item in node:
            yield from references(item)
    elif isinstance(node, dict):
        for key, value in node.items():
            if key == "serviceAccountName":
                yield "ServiceAccount", value
            elif key in REFERENCES and isinstance(value, dict):
                kind, name = REFERENCES[key]
                if not value.get("optional"):
                    yield kind, value.get(name) or value["name"]
            else:
                yield from references(value)


@pytest.mark.parametrize("both", SCENARIOS, indirect=True)
def test_no_reference_dangles(both):
    names = set().union(*(result.names for result in both))
    lacking = {
        f"{pod.owner} -> {kind}/{name}"
        for result in both
        for pod in result.pods
        for kind, name in references(pod.spec)
        if f"{kind}/{name}" not in names
    }
    assert lacking == set()


@pytest.mark.parametrize("both", SCENARIOS, indirect=True)
def test_no_object_belongs_to_both(both):
    platform, firm_chart = both
    assert platform.names & firm_chart.names == set()


@pytest.mark.parametrize("both", [None], indirect=True)
def test_what_firm_calls_exists(both):
    platform, firm_chart = both
    services = {thing["metadata"]["name"]: thing["spec"]["ports"] for thing in platform.of_kind("Service")}
    assert 9000 in [port["port"] for port in services["minio"]]
    assert firm_chart.get("ConfigMap/firm")["data"]["FIRM_S3_ENDPOINT"] == "http://minio:9000"
    assert 8888 in [port["port"] for port in services["ml-pipeline"]]


@pytest.mark.parametrize("both", [None], indirect=True)
def test_the_operator_owns_the_label_that_policies_select(both):
    _, firm_chart = both
    from firm.launch.k8s import cluster

    selector = firm_chart.get("NetworkPolicy/firm-training")["spec"]["podSelector"]["matchExpressions"]
    assert selector == [{"key": cluster.JOB_NAME, "operator": "Exists"}]


def test_one_object_store_block_feeds_both(render):
    block = {"objectStore": {"endpoint": "s3.example.com", "secure": True, "bucket": "lab", "existingSecret": "keys"}}
    for chart in ("platform", "firm"):
        result = render(chart, values=block | ({"minio": {"enabled": False}} if chart == "platform" else {}))
        assert not result.error, result.error
        text = yaml.safe_dump(result.objects)
        assert "s3.example.com" in text and "keys" in text and "object-store" not in text, chart


def test_charts_have_the_version_of_the_package(chart):
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["version"] == firm.__version__
