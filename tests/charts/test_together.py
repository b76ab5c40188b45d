"""Both charts in one namespace: what one refers to, it or the other makes."""

from pathlib import Path

import pytest
import yaml

import firm
from firm import submission
from firm.config.loading import load_config
from firm.launch.job import TrainingJob
from firm.launch.k8s import names
from firm.launch.k8s.manifest import manifest

CHARTS = Path(__file__).parents[2] / "charts"
SCENARIOS = [
    None,
    *sorted(
        f.name
        for f in (CHARTS / "firm").glob("ci/*-values.yaml")
        if f.name not in ("byo-values.yaml", "gitops-values.yaml")
    ),
]

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
    """Objects of both charts in a scenario; in byo and gitops the rest is there already, and not ours to see."""
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


ALL = [None, *sorted(f.name for f in (CHARTS / "firm").glob("ci/*-values.yaml"))]
OWN = {"objectStore": {"existingSecret": "seaweedfs-s3"}, "endpoints": {"existingSecret": "team-keys"}}


def secrets_of_environment(container):
    return {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]["name"]
        for entry in container["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }


@pytest.mark.parametrize("values", [None, OWN], ids=["names-of-the-scenario", "own-names"])
@pytest.mark.parametrize("scenario_file", ALL)
def test_steps_jobs_and_charts_agree_on_the_names_of_secrets(render, scenario_file, values, monkeypatch):
    """What the first step and a job read in ConfigMap `firm` are the Secrets that the chart itself uses."""
    result = render("firm", CHARTS / "firm" / "ci" / scenario_file if scenario_file else None, values)
    assert not result.error, result.error
    doctor = secrets_of_environment(result.get("Pod/firm-test-doctor")["spec"]["containers"][0])
    data = result.get("ConfigMap/firm")["data"]

    monkeypatch.setattr(submission.preflight, "check", lambda *_, **__: None)  # models and prompts are not the subject
    for name in (names.STORE_SECRET_KEY, names.ENDPOINTS_SECRET_KEY):
        monkeypatch.setenv(name, data[name])
    config = load_config("gen-shapes-kind")
    found = submission.execute(config.model_dump(mode="json"), "0", 1)
    steps = dict.fromkeys(names.STORE_KEYS.values(), found.store_secret)
    steps |= dict.fromkeys(names.ENDPOINTS_KEYS.values(), found.endpoints_secret)
    assert steps == doctor

    job = TrainingJob("run", "sft", "firm.sft.train", {}, {})
    pod = manifest(job, "s3://firm/runs/run/sft-0", config.launch, data, {})["spec"]["pytorchReplicaSpecs"]["Master"]
    assert secrets_of_environment(pod["template"]["spec"]["containers"][0]) == doctor
    if values:
        assert set(doctor.values()) == {"seaweedfs-s3", "team-keys"}


def test_charts_have_the_version_of_the_package(chart):
    assert yaml.safe_load((chart / "Chart.yaml").read_text())["version"] == firm.__version__


def test_names_depend_on_the_namespace_alone(chart, helm):
    """Neither chart has nameOverride: the README says why. Two releases live in two namespaces."""

    def names(release, namespace):
        file = chart / "ci" / "gitops-values.yaml"
        done = helm("template", release, str(chart), "-n", namespace, "-f", str(file), "--kube-version=1.34")
        assert done.returncode == 0, done.stderr
        things = [thing for thing in yaml.safe_load_all(done.stdout) if thing]
        wide = ("CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "PriorityClass")
        wide = (
            *wide,
            "ValidatingAdmissionPolicy",
            "ValidatingAdmissionPolicyBinding",
            "ValidatingWebhookConfiguration",
        )
        own = {(thing["kind"], thing["metadata"]["name"]) for thing in things}
        return own, {name for kind, name in own if kind in wide and kind != "CustomResourceDefinition"}

    (one, wide), (other, _), (elsewhere, far) = names("a", "team-a"), names("b", "team-a"), names("a", "team-b")
    assert one == other and len(one & elsewhere) > 10
    assert wide and not wide & far, "objects of the cluster carry the namespace in their names"
