"""Renders without a cluster (Argo CD, `helm template`) and with one: no secret is ever made twice."""

import copy
import re
import ssl
import subprocess
from pathlib import Path

import lookups
import pytest
import yaml

CHARTS = Path(__file__).parents[2] / "charts"
GITOPS = yaml.safe_load((CHARTS / "platform" / "ci" / "gitops-values.yaml").read_text())
ARGO_CD = ("--include-crds", "--kube-version=1.34", "--api-versions=v1/Secret", "--api-versions=apps/v1/Deployment")
HELM = {
    "namespace": "team-a",
    "labels": {"app.kubernetes.io/managed-by": "Helm"},
    "annotations": {"meta.helm.sh/release-name": "release", "meta.helm.sh/release-namespace": "team-a"},
}
MYSQL = [
    {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "mysql", **HELM}},
    {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "mysql", **HELM}},
]


def without(path):
    values = copy.deepcopy(GITOPS)
    *groups, last = path.split(".")
    inner = values
    for group in groups:
        inner = inner[group]
    del inner[last]
    return values


@pytest.fixture
def cluster_with(tmp_path):
    """cluster_with(objects): context of a cluster, besides the namespaces that every one has."""
    namespaces = [{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "team-a"}}]
    return lambda objects: lookups.serve([*namespaces, *objects], tmp_path)


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        ("objectStore.existingSecret", "object-store"),
        ("minio.existingSecret", "minio"),
        ("database.existingSecret", "mysql"),
        ("trainingOperator.certificate", "training-operator-webhook-cert"),
    ],
)
def test_no_secret_is_made_without_a_cluster(template, path, secret):
    error = template("platform", *ARGO_CD, values=without(path)).error
    assert f"Secret {secret}: " in error and path in error and "gitops-values.yaml" in error


def test_all_secrets_missing_is_refused_too(template):
    assert "without a cluster" in template("platform").error


@pytest.mark.parametrize("file", ["gitops", "gpu", "kind"])
@pytest.mark.parametrize("name", ["platform", "firm"])
def test_renders_are_equal(template, name, file):
    folder = CHARTS / name / "ci"
    files = [f"-f={folder / f'{part}-values.yaml'}" for part in (file, "gitops")]
    once, again = template(name, *ARGO_CD, *files), template(name, *ARGO_CD, *files)
    assert not once.error and once.objects == again.objects
    assert not once.of_kind("Secret")


def test_every_secret_that_gitops_brings_is_used(template):
    firm = yaml.safe_load((CHARTS / "firm" / "ci" / "gitops-values.yaml").read_text())
    text = yaml.safe_dump(template("platform", values=GITOPS).objects + template("firm", values=firm).objects)
    names = [GITOPS["objectStore"], GITOPS["minio"], GITOPS["database"], GITOPS["trainingOperator"]["certificate"]]
    for secret in (value for group in names for key, value in group.items() if key != "caBundle"):
        assert re.search(rf"(name|secretName): {secret}$", text, re.MULTILINE), secret


def test_webhook_trusts_the_given_certificate(template, render):
    result = template("platform", values=GITOPS)
    (webhook,) = result.get("ValidatingWebhookConfiguration/training-operator-team-a")["webhooks"]
    assert webhook["clientConfig"]["caBundle"] == GITOPS["trainingOperator"]["certificate"]["caBundle"]
    assert "caBundle" in render("platform", values={"trainingOperator": {"certificate": {"existingSecret": "x"}}}).error


def test_an_upgrade_makes_the_same_objects(template, render, cluster_with):
    first = render("platform")
    secrets = [{**thing, "metadata": {**thing["metadata"], **HELM}} for thing in first.of_kind("Secret")]
    assert len(secrets) == 5
    with cluster_with([*secrets, *MYSQL]) as kubeconfig:
        assert template("platform", kubeconfig=kubeconfig).objects == first.objects


@pytest.mark.parametrize("left", [MYSQL, MYSQL[:1], MYSQL[1:]], ids=["both", "claim", "deployment"])
def test_a_lost_password_is_not_replaced(template, cluster_with, left):
    with cluster_with(left) as kubeconfig:
        error = template("platform", kubeconfig=kubeconfig).error
        assert "Secret mysql is gone and its database is not" in error and "printenv MYSQL_ROOT_PASSWORD" in error
        assert not template("platform", kubeconfig=kubeconfig, values={"database": {"existingSecret": "mine"}}).error


def test_the_documented_certificate_serves_the_webhook(tmp_path):
    commands = re.findall(r"openssl (?:genrsa|req) (?:.*\\\n)*.*", (CHARTS / "platform" / "README.md").read_text())
    assert len(commands) == 2
    for command in commands:
        subprocess.run(command.replace("\\\n", " "), shell=True, cwd=tmp_path, check=True, capture_output=True)
    assert "BEGIN RSA PRIVATE KEY" in (tmp_path / "tls.key").read_text()  # the one form that the operator reads
    # what the operator asks of it as a CA, and what the API server asks of it as a server
    for name in ("training-operator-ca", "training-operator.firm.svc"):
        context = ssl.create_default_context(cafile=tmp_path / "tls.crt")
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(tmp_path / "tls.crt", tmp_path / "tls.key")
        shake_hands(context, server, name)


def shake_hands(client_context, server_context, name):
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    for _ in range(5):
        for side in list(waiting):
            try:
                side.do_handshake()
                waiting.remove(side)
            except ssl.SSLWantReadError:
                pass
    assert not waiting
