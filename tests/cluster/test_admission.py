"""What steps and jobs may be made of: the chart's admission policies, asked by dry runs that create nothing."""

import copy
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from firm.config.launch import PyTorchJobLaunch
from firm.launch.job import TrainingJob
from firm.launch.k8s.manifest import manifest

pytestmark = pytest.mark.cluster

Change = Callable[[Any], None]
"""Changes a pod template."""


def container(**values: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0].update(values)


def context(**values: Any) -> Change:
    return lambda pod: pod["spec"]["containers"][0]["securityContext"].update(values)


def pod_context(**values: Any) -> Change:
    return lambda pod: pod["spec"]["securityContext"].update(values)


def init_container(**values: Any) -> Change:
    return lambda pod: pod["spec"].update(initContainers=[{**pod["spec"]["containers"][0], "name": "i", **values}])


def volume(**source: Any) -> Change:
    return lambda pod: pod["spec"]["volumes"].append({"name": "x", **source})


SECRET = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "mysql", "key": "password"}}}
ROOT = {"name": "X", "valueFrom": {"secretKeyRef": {"name": "minio", "key": "secretkey"}}}
MORE = {"drop": ["ALL"], "add": ["SYS_MODULE", "SYS_ADMIN"]}
BOUND = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
UNCONFINED = {"type": "Unconfined"}
APPARMOR = "container.apparmor.security.beta.kubernetes.io"
PODS: dict[str, tuple[Change, str]] = {  # what is changed in a pod template, and what is said of it
    "as it is": (lambda pod: None, ""),
    "no account": (lambda pod: pod["spec"].pop("serviceAccountName"), "service account"),
    "argo's account": (lambda pod: pod["spec"].update(serviceAccountName="argo"), "service account"),
    "database's password": (lambda pod: pod["spec"]["containers"][0]["env"].append(SECRET), "Secrets of"),
    "root of MinIO": (lambda pod: pod["spec"]["containers"][0]["env"].append(ROOT), "Secrets of"),
    "all of a Secret": (container(envFrom=[{"secretRef": {"name": "mysql"}}]), "Secrets of"),
    "an init container's Secret": (init_container(env=[SECRET]), "Secrets of"),
    "a Secret as volume": (volume(secret={"secretName": "mysql"}), "volumes of"),
    "a projected Secret": (volume(projected={"sources": [{"secret": {"name": "mysql"}}]}), "volumes of"),
    "the node's disk": (volume(hostPath={"path": "/"}), "volumes of"),
    "the database's disk": (volume(persistentVolumeClaim={"claimName": "mysql"}), "volumes of"),
    "the node's network": (lambda pod: pod["spec"].update(hostNetwork=True), "node's own"),
    "the node's processes": (lambda pod: pod["spec"].update(hostPID=True), "node's own"),
    "the node's messages": (lambda pod: pod["spec"].update(hostIPC=True), "node's own"),
    "a port of the node": (container(ports=[{"containerPort": 80, "hostPort": 80}]), "node's own"),
    "a setting of the kernel": (pod_context(sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "node's own"),
    "a probe of the node": (container(livenessProbe={"httpGet": {"port": 80, "host": "127.0.0.1"}}), "probes of"),
    "a probe of the pod": (container(livenessProbe={"httpGet": {"port": 80}}), ""),
    "a call of the node": (
        container(lifecycle={"postStart": {"httpGet": {"port": 80, "host": "127.0.0.1"}}}), "probes of"
    ),
    "privileged": (container(securityContext={"privileged": True}), "drop ALL"),
    "no context": (container(securityContext={}), "drop ALL"),
    "escalation": (context(allowPrivilegeEscalation=True), "drop ALL"),
    "capabilities kept": (context(capabilities={}), "drop ALL"),
    "capabilities added": (context(capabilities=MORE), "drop ALL"),
    "an init container's capabilities": (init_container(securityContext={**BOUND, "capabilities": MORE}), "drop ALL"),
    "an unmasked /proc": (
        lambda pod: (context(procMount="Unmasked")(pod), pod["spec"].update(hostUsers=False))[0], "drop ALL"
    ),
    "root": (context(runAsUser=0), "as root"),
    "root of the pod": (pod_context(runAsUser=0), "as root"),
    "root if the image wants it": (context(runAsNonRoot=False), "as root"),
    "another user": (context(runAsUser=1000), ""),
    "any system call": (context(seccompProfile=UNCONFINED), "Unconfined"),
    "any system call of the pod": (pod_context(seccompProfile=UNCONFINED), "Unconfined"),
    "no profile": (lambda pod: pod["spec"]["securityContext"].pop("seccompProfile"), "Unconfined"),
    "no AppArmor": (context(appArmorProfile=UNCONFINED), "Unconfined"),
    "no AppArmor, as of old": (
        lambda pod: pod["metadata"].update(
            annotations={f"{APPARMOR}/{pod['spec']['containers'][0]['name']}": "unconfined"}
        ),
        "Unconfined",
    ),
    "another type of SELinux": (context(seLinuxOptions={"type": "spc_t"}), "Unconfined"),
    "OpenShift's level": (pod_context(seLinuxOptions={"level": "s0:c27,c4"}), ""),
    "labels of the API server": (
        lambda pod: pod["metadata"]["labels"].update({"app.kubernetes.io/name": "ml-pipeline"}), "label"
    ),
}  # fmt: skip
JOBS: dict[str, tuple[Change, str]] = {  # Kubernetes itself refuses the last two of a pod, or a job has no such field
    "another image": (container(image="evil/image:1"), "images of jobs"),
    "an image with the same beginning": (
        lambda pod: container(image=re.sub("(/runtime).*", r"\1-evil:1", pod["spec"]["containers"][0]["image"]))(pod),
        "images of jobs",
    ),
    "a process of the node, on Windows": (context(windowsOptions={"hostProcess": True}), "node's own"),
}  # fmt: skip


def said(kind: Any, thing: Any, account: str) -> str:
    """What the API answers to ``account`` that wants to create ``thing``; empty where it may."""
    who = f"--as=system:serviceaccount:{kind.namespace}:{account}"
    answer = kind.kubectl("create", "--dry-run=server", who, "-f", "-", input=json.dumps(thing), check=False)
    return "" if "created (server dry run)" in answer else answer


@pytest.fixture(scope="module")
def defaults(kind: Any) -> dict[str, str]:
    """Data of the ConfigMap `firm`."""
    return dict(json.loads(kind.kubectl("get", "configmap", "firm", "-o", "json"))["data"])


def job(defaults: dict[str, str]) -> dict[str, Any]:
    """A job as a step makes it."""
    work = TrainingJob("run", "rl", "firm.rl.train", {}, {})
    return manifest(work, "s3://firm/runs/run/rl-0123456789ab", PyTorchJobLaunch(num_workers=2), defaults, {})


@pytest.mark.parametrize("case", [*PODS, *JOBS])
@pytest.mark.parametrize("replica", ["Master", "Worker"])
def test_a_job_of_a_step(kind: Any, defaults: dict[str, str], replica: str, case: str) -> None:
    change, message = {**PODS, **JOBS}[case]
    thing = job(defaults)
    change(thing["spec"]["pytorchReplicaSpecs"][replica]["template"])
    answer = said(kind, thing, "pipeline-runner")
    assert message in answer and bool(message) == bool(answer), answer


def test_a_changed_job_is_looked_at_too(kind: Any, defaults: dict[str, str]) -> None:
    thing = job(defaults)
    thing["spec"]["runPolicy"]["suspend"] = True
    kind.kubectl("create", "-f", "-", input=json.dumps(thing))
    who = f"--as=system:serviceaccount:{kind.namespace}:pipeline-runner"
    changed = copy.deepcopy(thing["spec"]["pytorchReplicaSpecs"])
    changed["Master"]["template"]["spec"]["serviceAccountName"] = "argo"
    patch = ["patch", "pytorchjob", thing["metadata"]["name"], "--type=merge", who, "--dry-run=server", "-p"]
    try:
        assert "patched" in kind.kubectl(*patch, json.dumps({"metadata": {"labels": {"a": "b"}}}))
        answer = kind.kubectl(*patch, json.dumps({"spec": {"pytorchReplicaSpecs": changed}}), check=False)
        assert "service account" in answer, answer
    finally:
        kind.kubectl("delete", "pytorchjob", thing["metadata"]["name"])


@pytest.mark.kfp
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("case", PODS)
def test_a_step(kind: Any, defaults: dict[str, str], case: str) -> None:
    template = job(defaults)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]
    template["metadata"] = {"name": "step", "labels": {"workflows.argoproj.io/workflow": "run"}}
    template["spec"]["serviceAccountName"] = "pipeline-runner"
    change, message = PODS[case]
    change(template)
    answer = said(kind, {"apiVersion": "v1", "kind": "Pod", **template}, "argo")
    assert message in answer and bool(message) == bool(answer), answer


def test_pods_of_others_are_left_alone(kind: Any) -> None:
    container = {"name": "c", "image": "evil/image:1", "env": [SECRET]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "other"}, "spec": {"containers": [container]}}
    answer = kind.kubectl("create", "--dry-run=server", "-f", "-", input=json.dumps(pod))
    assert "created" in answer
