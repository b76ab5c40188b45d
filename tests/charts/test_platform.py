"""Chart platform: every toggle, and where the object store is named."""

import re
from pathlib import Path

import pytest
import yaml

PLATFORM = Path(__file__).parents[2] / "charts" / "platform"
S3 = {"objectStore": {"endpoint": "s3:80", "existingSecret": "x"}}
DATABASE = {"database": {"host": "db", "existingSecret": "x"}}
# key -> values that its absence needs, and what the objects that go with it look like
TOGGLES = {
    "crds.enabled": ({}, r"CustomResourceDefinition/.*"),
    "networkPolicy.enabled": ({}, r"NetworkPolicy/.*"),
    "kfp.enabled": ({}, r".*/(ml-pipeline.*|metadata-envoy-service|scheduledworkflows\.kubeflow\.org)"),
    "kfp.scheduledWorkflows.enabled": ({}, r".*/ml-pipeline-scheduledworkflow"),
    "kfp.ui.enabled": ({}, r".*/(ml-pipeline-ui|metadata-envoy-service)"),
    "mlmd.enabled": ({}, r".*/metadata-grpc-service"),
    "argo.enabled": ({}, r".*/(argo|workflow-controller.*|.*\.argoproj\.io)"),
    "trainingOperator.enabled": ({}, r".*/(training-operator.*|pytorchjobs\.kubeflow\.org)"),
    "trainingOperator.webhook": ({}, r"ValidatingWebhookConfiguration/training-operator-team-a"),
    "minio.enabled": (S3, r".*/(minio|object-store.*)"),
    "mysql.enabled": (DATABASE, r".*/mysql"),
}


def without(toggle):
    value = False
    for key in reversed(toggle.split(".")):
        value = {key: value}
    return TOGGLES[toggle][0] | value


@pytest.fixture
def platform(render):
    def rendered(values=None):
        result = render("platform", values=values)
        assert not result.error, result.error
        return result

    return rendered


@pytest.mark.parametrize("toggle", TOGGLES)
def test_toggle(platform, toggle):
    pattern = re.compile(TOGGLES[toggle][1])
    on, off = platform().names, platform(without(toggle)).names
    assert off < on
    assert on - off == {name for name in on if pattern.fullmatch(name)}


def test_every_toggle_is_tested():
    def find(values, path=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from find(value, f"{path}{key}.")
            elif key == "enabled":
                yield path + key

    assert set(find(yaml.safe_load((PLATFORM / "values.yaml").read_text()))) <= {
        *TOGGLES, "monitoring.enabled", "kfp.ingress.enabled",
    }  # fmt: skip


def test_object_store_reaches_all_places(platform):
    store = {"endpoint": "s3.example.com:8333", "secure": True, "region": "mars-1", "bucket": "lab"}
    store["existingSecret"] = "keys"
    result = platform({"minio": {"enabled": False}, "objectStore": store})
    archive = yaml.safe_load(result.get("ConfigMap/workflow-controller-configmap")["data"]["artifactRepository"])["s3"]
    assert (archive["endpoint"], archive["bucket"], archive["region"]) == ("s3.example.com:8333", "lab", "mars-1")
    assert archive["insecure"] is False and archive["accessKeySecret"] == {"name": "keys", "key": "accesskey"}
    environments = {
        pod.owner: {
            env["name"]: env.get("value", env.get("valueFrom")) for env in pod.spec["containers"][0].get("env", [])
        }
        for pod in result.pods
    }
    api = environments["Deployment/ml-pipeline"]
    names = ("HOST", "PORT", "SECURE", "REGION", "BUCKETNAME")
    assert [api[f"OBJECTSTORECONFIG_{name}"] for name in names] == ["s3.example.com", "8333", "true", "mars-1", "lab"]
    assert api["OBJECTSTORECONFIG_ACCESSKEY"]["secretKeyRef"] == {"name": "keys", "key": "accesskey"}
    ui = environments["Deployment/ml-pipeline-ui"]
    assert (ui["MINIO_HOST"], ui["MINIO_PORT"], ui["MINIO_SSL"]) == ("s3.example.com", "8333", "true")
    assert "object-store" not in yaml.safe_dump(result.objects)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectStore": {"endpoint": "http://minio:9000"}}, "no scheme"),
        ({"objectStore": {"endpoint": "s3:80"}}, "minio.enabled=false"),
        ({"minio": {"enabled": False}}, "objectStore.existingSecret"),
        ({"mysql": {"enabled": False}}, "database.existingSecret"),
    ],
)
def test_impossible_values_are_refused(render, values, message):
    assert message in render("platform", values=values).error
