"""A private certificate authority (caBundle) reaches everything that talks to the object store or to model servers."""

import json
import shutil
import subprocess

import pytest
import yaml

CA = {"caBundle": {"existingSecret": "company", "key": "root.pem"}}
CRITIC = {"critic": {"enabled": True, "model": "s3://firm/runs/first/critic"}}
FILE = "/etc/firm/ca/root.pem"
VOLUME = {"name": "ca", "secret": {"secretName": "company", "items": [{"key": "root.pem", "path": "root.pem"}]}}
MOUNT = {"name": "ca", "mountPath": "/etc/firm/ca", "readOnly": True}
STORE = ("FIRM_S3_ENDPOINT", "OBJECTSTORECONFIG_HOST", "MINIO_HOST")
# How each program is told; the ConfigMap `firm` tells FIRM's own.
TOLD = {
    "ml-pipeline": {"SSL_CERT_DIR": "/etc/ssl/certs:/etc/firm/ca"},
    "ml-pipeline-ui": {"NODE_EXTRA_CA_CERTS": FILE},
}


def environment(result, container):
    """What a container gets by name and from the ConfigMap `firm`."""
    found = {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}
    for source in container.get("envFrom", []):
        found |= result.get(f"ConfigMap/{source['configMapRef']['name']}")["data"]
    return found


@pytest.fixture
def both(render):
    results = {"platform": render("platform", values=CA), "firm": render("firm", values=CA | CRITIC)}
    for result in results.values():
        assert not result.error, result.error
    return results


def test_every_container_that_knows_the_store_has_it(both):
    owners = set()
    for result in both.values():
        for pod in result.pods:
            for container in pod.containers:
                env = environment(result, container)
                if not set(STORE) & env.keys():
                    continue
                owners.add(f"{pod.owner} {container['name']}")
                assert VOLUME in pod.spec["volumes"] and MOUNT in container["volumeMounts"], owners
                told = TOLD.get(pod.owner.partition("/")[2], {"FIRM_CA_BUNDLE": FILE})
                assert told.items() <= env.items(), owners
    assert owners == {
        "Deployment/ml-pipeline api-server", "Deployment/ml-pipeline-ui ui", "Deployment/critic fetch",
        "Deployment/critic critic", "Job/firm-store-users-1 users", "Pod/firm-test-doctor doctor",
    }  # fmt: skip


def test_nothing_of_it_is_there_by_default(render):
    for chart, values in (("platform", None), ("firm", CRITIC)):
        text = yaml.safe_dump(render(chart, values=values).objects)
        assert "/etc/firm/ca" not in text and "name: ca\n" not in text and "CERT" not in text.replace("CERTIFICATE", "")


def patched(result, pod):
    """A pod after the patch that Argo applies to those of all steps, by Kubernetes's own code."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not on PATH")
    data = result.get("ConfigMap/workflow-controller-configmap")["data"]
    patch = yaml.safe_load(data["workflowDefaults"])["spec"]["podSpecPatch"]
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "step"}, "spec": pod}
    command = ["kubectl", "patch", "--local", "--type=strategic", "-o", "json", "-f", "-"]
    command += ["-p", json.dumps({"spec": yaml.safe_load(patch)})]
    done = subprocess.run(command, input=json.dumps(whole), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["spec"]


STEP = {
    "containers": [
        {"name": "wait", "image": "argoexec"},
        {"name": "main", "image": "step", "env": [{"name": "A", "value": "1"}], "volumeMounts": []},
    ],
    "volumes": [{"name": "scratch", "emptyDir": {}}],
}


@pytest.mark.parametrize(
    ("patch", "more"),
    [
        (None, {}),
        ("", {}),
        ('{"nodeSelector": {"pool": "cpu"}}', {"nodeSelector": {"pool": "cpu"}}),
        ("containers: [{name: main, stdin: true}]\nhostname: here", {"hostname": "here"}),
    ],
)
def test_it_reaches_the_program_of_every_step(render, patch, more):
    argo = {} if patch is None else {"argo": {"workflow": {"podSpecPatch": patch}}}
    spec = patched(render("platform", values=CA | argo), STEP)
    containers = {container["name"]: container for container in spec["containers"]}
    env = {entry["name"]: entry["value"] for entry in containers["main"]["env"]}
    assert env == {"A": "1", "FIRM_CA_BUNDLE": FILE, "SSL_CERT_DIR": "/etc/ssl/certs:/etc/firm/ca"}
    assert containers["main"]["volumeMounts"] == [MOUNT] and VOLUME in spec["volumes"] and len(spec["volumes"]) == 2
    assert more.items() <= spec.items() and containers["main"].get("stdin", False) == ("stdin" in (patch or ""))
    if patch is None:  # the default's purpose
        assert list(containers) == ["main", "wait"]


def test_a_patch_that_cannot_be_read_is_refused(render):
    error = render("platform", values=CA | {"argo": {"workflow": {"podSpecPatch": "{a: {{x}}}"}}}).error
    assert "argo.workflow.podSpecPatch: with caBundle" in error


def test_logs_of_steps_are_stored_with_it(both):
    data = both["platform"].get("ConfigMap/workflow-controller-configmap")["data"]
    store = yaml.safe_load(data["artifactRepository"])["s3"]
    assert store["caSecret"] == {"name": "company", "key": "root.pem"}


def test_jobs_are_told_of_it_and_let_in(both):
    result = both["firm"]
    data = result.get("ConfigMap/firm")["data"]
    assert (data["FIRM_CA_SECRET"], data["FIRM_CA_BUNDLE"]) == ("company", FILE)
    for pods in ("jobs", "steps"):
        spec = result.get(f"ValidatingAdmissionPolicy/firm-{pods}-team-a")["spec"]
        (secrets,) = (v["expression"] for v in spec["variables"] if v["name"] == "secrets")
        assert "'company'" in secrets
    jobs = result.get("ValidatingAdmissionPolicy/firm-jobs-team-a")["spec"]["validations"]
    assert any("volume.secret.secretName == 'company'" in rule["expression"] for rule in jobs)


def test_the_importers_of_kfp_speak_no_tls(both):
    """KFP 2.17 with CABUNDLE_SECRET_NAME: an importer then speaks TLS to the metadata store, which has none."""
    assert "CABUNDLE" not in yaml.safe_dump(both["platform"].objects)


def test_the_minio_of_the_chart_speaks_no_tls(render):
    assert "speaks no TLS" in render("platform", values={"objectStore": {"secure": True}}).error
