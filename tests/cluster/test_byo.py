"""Chart platform where all but KFP exists: a run through it leaves its artifacts in another store, behind TLS."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import urllib3
import yaml
from authority import Authority, moto
from cluster import kubeflow, second
from minio import Minio

pytestmark = pytest.mark.kfp
ROOT = Path(__file__).parents[2]
SCENARIO = "charts/platform/ci/byo-values.yaml"
VALUES = yaml.safe_load((ROOT / SCENARIO).read_text())
BUCKET, MIRROR = VALUES["objectStore"]["bucket"], VALUES["imageRegistry"]
DATABASE, DATABASES, _ = VALUES["database"]["host"].split(".")
PASSWORDS = {"password": "own"}  # of the database
KEYS = {"accesskey": "own", "secretkey": "own-secret"}


def there(name: str, image: str, port: int, *args: str, **env: str) -> str:
    """What exists already: a Deployment and its Service, as JSON."""
    labels = {"app": name}
    variables = [{"name": key, "value": value} for key, value in env.items()]
    container = {"name": name, "image": image, "imagePullPolicy": "IfNotPresent", "args": list(args), "env": variables}
    container["readinessProbe"] = {"tcpSocket": {"port": port}}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [container]}}
    deployment = {"selector": {"matchLabels": labels}, "template": pod}
    service = {"selector": labels, "ports": [{"port": port}]}
    objects = [
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}, "spec": deployment},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service},
    ]
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})


def mirror(kind: Any, objects: str) -> None:
    """Give the node the scenario's images under the names of the mirror."""
    docker = os.environ.get("DOCKER", "docker")
    node = f"{kind.name}-control-plane"
    nodes_own = kind.run(docker, "exec", node, "ctr", "-n", "k8s.io", "images", "ls", "-q").split()
    for path in set(re.findall(rf"{re.escape(MIRROR)}(/[\w./-]+:[\w.-]+)", objects)):
        original = next((image for image in nodes_own if image.endswith(path)), None)
        assert original, f"the node has no image {path}"
        kind.run(docker, "exec", node, "ctr", "-n", "k8s.io", "images", "tag", "--force", original, MIRROR + path)


@pytest.fixture(scope="module")
def own(kind: Any, backend: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The installation: KFP and its Argo of the scenario file, and chart firm with the same store."""
    folder = tmp_path_factory.mktemp("byo")
    authority = Authority(folder)
    with ExitStack() as stack:
        address = stack.enter_context(moto(authority, BUCKET, second.gateway(kind)))
        databases = stack.enter_context(second.namespace(kind, DATABASES))
        own = stack.enter_context(second.namespace(kind, "byo"))
        account = {"MYSQL_DATABASE": "mlpipeline", "MYSQL_USER": VALUES["database"]["user"]}
        account |= {"MYSQL_PASSWORD": PASSWORDS["password"], "MYSQL_ROOT_PASSWORD": "other"}
        databases.kubectl("apply", "-f", "-", input=there(DATABASE, "mysql:8.4", 3306, **account))
        store = "gcr.io/tfx-oss-public/ml_metadata_store_server:1.14.0"
        own.kubectl("apply", "-f", "-", input=there(VALUES["mlmd"]["serviceName"], store, 8080, "--grpc_port=8080"))
        for name, data in ((VALUES["objectStore"]["existingSecret"], KEYS), ("team-mysql", PASSWORDS)):
            literals = [f"--from-literal={key}={value}" for key, value in data.items()]
            own.kubectl("create", "secret", "generic", name, *literals)
        own.kubectl("create", "secret", "generic", "company-ca", f"--from-file=ca.crt={authority.file}")
        same = {key: VALUES[key] for key in ("objectStore", "caBundle")}
        same["objectStore"]["endpoint"] = address
        (folder / "same.json").write_text(json.dumps(same))
        for chart, files, more in (
            ("platform", ["charts/platform/ci/kind-values.yaml", SCENARIO], ["--set", "kfp.ui.enabled=false"]),
            ("firm", [str(folder / "firm.json")], []),
        ):
            (folder / "firm.json").write_text(
                kind.run("helm", "get", "values", "firm", "-n", kind.namespace, "-o", "json")
            )
            words = [word for file in (*files, str(folder / "same.json")) for word in ("-f", file)]
            flags = (chart, f"charts/{chart}", "-n", own.namespace, *words, *more)
            mirror(kind, own.run("helm", "template", *flags))
            own.run("helm", "install", *flags)
            stack.callback(own.run, "helm", "uninstall", chart, "-n", own.namespace)
        own.kubectl("wait", "--for=condition=Available", "deployment", "--all", "--timeout=300s")
        yield second.reaching(own, address, authority)


def test_a_pipeline_runs_and_its_artifacts_are_in_the_store_of_others(own: Any, small: Path, tmp_path: Path) -> None:
    pipeline = kubeflow.package(
        own, tmp_path / "curation.yaml", "--py", "pipelines/stages.py", "--function", "curation"
    )
    overrides = ("--set", "name=byo", "--set", f"store=s3://{BUCKET}/runs")
    config = own.run("firm", "config", "show", str(small), "--json", *overrides)
    with own.forward("ml-pipeline", 8888) as api:
        own.wait_for("the KFP API", lambda: kubeflow.call(api, "healthz"), 120)
        run_id = kubeflow.submit(own, api, pipeline, "byo", f"config={config}")
        kubeflow.finish(own, api, run_id)
    pool = urllib3.PoolManager(ca_certs=own.env["FIRM_CA_BUNDLE"])
    host = own.env["FIRM_S3_ENDPOINT"].removeprefix("https://")
    store = Minio(host, *KEYS.values(), region=VALUES["objectStore"]["region"], http_client=pool)
    names = [str(o.object_name) for o in store.list_objects(BUCKET, recursive=True)]
    assert any(name.startswith("runs/byo/curation-") and name.endswith("/manifest.json") for name in names), names
    assert any(name.startswith("kfp/") for name in names), names


def test_doctor_and_helm_test_are_green(own: Any) -> None:
    second.all_is_well(own, BUCKET)
