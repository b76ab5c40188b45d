"""A second installation of both charts, in a namespace of its own: its scenario files are run beside the first one."""

import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from authority import Authority

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.records import UserError
from firm.storage.artifacts import Output

ROOT = Path(__file__).parents[2]


def gateway(kind: Any) -> str:
    """Address of this machine, as pods see it."""
    networks = kind.run(os.environ.get("DOCKER", "docker"), "network", "inspect", "kind")
    gateways = [each.get("Gateway", "") for each in json.loads(networks)[0]["IPAM"]["Config"]]
    return str(next(address for address in gateways if "." in address))


def reaching(own: Any, address: str, authority: Authority) -> Any:
    """The installation with a store of this machine in reach, behind TLS; any keys will do."""
    keys = {"AWS_ACCESS_KEY_ID": "own", "AWS_SECRET_ACCESS_KEY": "own-secret", "AWS_REGION": "us-east-1"}
    return replace(own, env={**keys, "FIRM_S3_ENDPOINT": f"https://{address}", "FIRM_CA_BUNDLE": str(authority.file)})


@contextmanager
def namespace(kind: Any, name: str) -> Iterator[Any]:
    """An empty namespace, which goes with all that is in it; nobody waits for that but the next of the name."""
    kind.run("kubectl", "delete", "namespace", name, "--ignore-not-found", "--timeout=120s")
    kind.run("kubectl", "create", "namespace", name)
    try:
        yield replace(kind, namespace=name, kfp=False)
    finally:
        kind.run("kubectl", "delete", "namespace", name, "--wait=false")


@contextmanager
def installed(
    first: Any,
    own: Any,
    folder: Path,
    scenarios: Mapping[str, Sequence[str]],
    settings: Mapping[str, Mapping[str, str]],
) -> Iterator[None]:
    """Chart platform is rendered and applied, as by Argo CD, and chart firm is installed by helm; without KFP.

    Args:
        first: The installation whose settings, such as images, both start from.
        own: The namespace to install into.
        folder: For files.
        scenarios: Files in ``ci`` by chart, the last one wins.
        settings: By chart, over the files.
    """
    more = {
        "platform": {"crds.enabled": "false", "trainingOperator.certificate.caBundle": secrets_by_hand(own, folder)},
        "firm": {"kfp.enabled": "false"},
    }

    def flags(chart: str) -> list[str]:
        values = folder / f"{chart}.json"
        values.write_text(first.run("helm", "get", "values", chart, "-n", first.namespace, "-o", "json"))
        files = [str(values), *(f"charts/{chart}/ci/{name}-values.yaml" for name in scenarios[chart])]
        words = [word for file in files for word in ("-f", file)]
        words += [word for pair in {**more[chart], **settings[chart]}.items() for word in ("--set", "=".join(pair))]
        return [chart, f"charts/{chart}", "-n", own.namespace, *words]

    with ExitStack() as stack:
        objects = own.run("helm", "template", *flags("platform"))
        stack.callback(own.kubectl, "delete", "-f", "-", "--ignore-not-found", "--wait=false", input=objects)
        own.kubectl("apply", "-f", "-", input=objects)
        own.run("helm", "install", *flags("firm"))
        stack.callback(own.run, "helm", "uninstall", "firm", "-n", own.namespace)
        yield


def secrets_by_hand(own: Any, folder: Path) -> str:
    """Run what the README says about GitOps; returns what it prints, the authority of the operator's certificate."""
    readme = (ROOT / "charts/platform/README.md").read_text().partition("## GitOps")[2]
    commands = readme.partition("```sh\n")[2].partition("```")[0]
    here = commands.replace("-n firm", f"-n {own.namespace}").replace(".firm.svc", f".{own.namespace}.svc")
    return str(own.run("bash", "-ec", f"cd {folder}\n{here}").split()[-1])


def all_is_well(own: Any, bucket: str) -> None:
    """`firm doctor` and `helm test` complain of nothing."""
    said = own.run("firm", "doctor", "-n", own.namespace)
    assert f"✔ object store: s3://{bucket}/runs" in said and "✘" not in said, said
    said = own.run("helm", "test", "firm", "-n", own.namespace, "--timeout", "10m")
    assert "Phase:" in said and "Failed" not in said, said


def a_job_reads_its_request(own: Any, bucket: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    """The request is in the store: a worker that complains of it has read it."""
    for name, value in {**own.env, "KUBECONFIG": str(own.kubeconfig)}.items():
        monkeypatch.setenv(name, value)
    output = Output.open(f"s3://{bucket}/runs/own/sft-{secrets.token_hex(6)}")
    small: dict[str, Any] = {"cpu": "50m", "cpu_limit": "1", "memory": "1Gi", "shm": "64Mi", "ttl_s": 60, **settings}
    config = PyTorchJobLaunch(namespace=own.namespace, backoff_limit=0, **small)
    with pytest.raises(UserError, match="ended with exit code 1") as caught:
        launch(TrainingJob("own", "sft", "firm.sft.train", {"seed": 0}, {}), output, config)
    assert "KeyError: 'critic'" in str(caught.value), str(caught.value)
