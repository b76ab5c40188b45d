"""What holds for every object of every chart: Pod Security restricted, bounds, pinned images, least rights."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

CHARTS = Path(__file__).parents[2] / "charts"
VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret",
}  # fmt: skip
IMAGE = re.compile(r"^(?:[\w.-]+(?::\d+)?/)*[\w.-]+(?::(?P<tag>[\w.-]+)|@sha256:[0-9a-f]{64})?$")


def violations(spec):
    """What Pod Security "restricted" forbids in a pod (kubernetes.io, Pod Security Standards)."""
    pod = spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    found += [f"volume {v['name']}" for v in spec.get("volumes", []) if not (set(v) - {"name"}) <= VOLUMES]
    found += ["sysctls"] if pod.get("sysctls") else []
    found += ["runAsUser 0"] if pod.get("runAsUser") == 0 else []
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        context, name = container.get("securityContext", {}), container["name"]
        capabilities = context.get("capabilities", {})
        bad = {
            "privileged": context.get("privileged"),
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is not False,
            "capabilities": "ALL" not in capabilities.get("drop", []),
            "added capabilities": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
            "runAsNonRoot": context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True,
            "runAsUser 0": context.get("runAsUser") == 0,
            "seccomp": context.get("seccompProfile", pod.get("seccompProfile", {})).get("type")
            not in ("RuntimeDefault", "Localhost"),
            "procMount": context.get("procMount", "Default") != "Default",
            "seLinuxOptions": context.get("seLinuxOptions") or pod.get("seLinuxOptions"),
            "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
        }
        found += [f"{name}: {rule}" for rule, broken in bad.items() if broken]
    return found


def images(pods):
    """Images of containers, and those that a container gets as a setting."""
    for pod in pods:
        for container in pod.containers:
            yield f"{pod.owner} {container['name']}", container["image"]
            for env in container.get("env", []):
                if env["name"].endswith("IMAGE"):
                    yield f"{pod.owner} {env['name']}", env["value"]
            for argument in [*container.get("command", []), *container.get("args", [])]:
                flag, _, value = str(argument).partition("=")
                if flag.startswith("--") and flag.endswith("image") and value:
                    yield f"{pod.owner} {flag}", value


def is_pinned(image):
    match = IMAGE.match(image)
    return bool(match) and ("@sha256:" in image or match["tag"] not in (None, "latest"))


def test_pods_satisfy_pod_security_restricted(pods):
    assert {pod.owner: found for pod in pods if (found := violations(pod.spec))} == {}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"hostNetwork": True}, "hostNetwork"),
        ({"securityContext": {}}, "c: runAsNonRoot"),
        ({"securityContext": {"runAsNonRoot": True}}, "c: seccomp"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v"),
        ({"initContainers": [{"name": "i"}]}, "i: allowPrivilegeEscalation"),
        ({"initContainers": [{"name": "i", "securityContext": {"privileged": True}}]}, "i: privileged"),
    ],
)
def test_violations_are_found(change, rule):
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    good = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{"name": "c", "securityContext": context}],
    }
    assert violations(good) == []
    assert rule in violations(good | change)


def test_containers_have_requests_and_limits(pods):
    lacking = [
        f"{pod.owner} {container['name']}: {kind}.{resource}"
        for pod in pods
        for container in pod.containers
        for kind in ("requests", "limits")
        for resource in ("cpu", "memory")
        if resource not in container.get("resources", {}).get(kind, {})
    ]
    assert lacking == []


def test_images_are_pinned(pods):
    assert [(where, image) for where, image in images(pods) if not is_pinned(image)] == []


@pytest.mark.parametrize(
    ("image", "good"),
    [
        ("localhost:5001/firm/slim:0.1.0", True),
        ("firm/slim@sha256:" + "a" * 64, True),
        ("mysql", False),
        ("localhost:5001/firm/slim", False),
        ("quay.io/x/y:latest", False),
        ("x:y:z", False),
    ],
)
def test_unpinned_images_are_found(image, good):
    assert is_pinned(image) is good


@pytest.mark.parametrize(
    "file", [None, *sorted((CHARTS / "firm").glob("ci/*.yaml"))], ids=lambda file: file.stem if file else "default"
)
def test_firm_is_least_privileged(render, file):
    result = render("firm", file)
    roots = [c["securityContext"]["readOnlyRootFilesystem"] for pod in result.pods for c in pod.containers]
    assert roots and all(roots)
    assert not [*result.of_kind("ClusterRole"), *result.of_kind("ClusterRoleBinding")]
    for role in result.of_kind("Role"):
        for rule in role["rules"]:
            assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]], role["metadata"]["name"]
            if "secrets" in rule["resources"]:
                assert rule["resourceNames"] and rule["verbs"] == ["get"]


def test_pods_without_an_account_have_no_token(pods):
    for pod in pods:
        assert "serviceAccountName" in pod.spec or pod.spec.get("automountServiceAccountToken") is False, pod.owner


def test_roles_of_firm_say_why():
    lines = [line.strip() for file in CHARTS.glob("firm/templates/**/*.yaml") for line in file.read_text().splitlines()]
    rules = [(before, line) for before, line in itertools.pairwise(lines) if line.startswith("- apiGroups")]
    assert rules and all(before.startswith("#") for before, _ in rules)


def test_no_namespace_is_written_down(chart, rendered):
    for thing in rendered.objects:
        places = [thing["metadata"], *thing.get("subjects", [])]
        assert {place["namespace"] for place in places if "namespace" in place} <= {"team-a"}, thing["metadata"]["name"]
    for file in [*chart.glob("templates/**/*"), *chart.glob("files/**/*"), chart / "values.yaml"]:
        if file.is_file():
            found = re.search(r"namespace: *[a-z]\S*|\w\.kubeflow(?=[.:/]svc|[:/]|\s|$)", file.read_text())
            assert not found, f"{file.name}: {found}"


def test_no_password_is_a_default(chart, render):
    def secrets(result):
        return {
            (secret["metadata"]["name"], key): value
            for secret in result.of_kind("Secret")
            for key, value in (secret.get("data", {}) | secret.get("stringData", {})).items()
            if "access" not in key  # a user's name
        }

    once, again = secrets(render(chart)), secrets(render(chart, values={"global": {"again": True}}))
    assert [key for key in once if once[key] == again[key]] == []


def test_images_come_from_values(chart):
    lines = [line.strip() for file in chart.glob("templates/**/*.yaml") for line in file.read_text().splitlines()]
    found = [line for line in lines if re.match(r"(- )?image:", line)]
    assert found and all("{{" in line for line in found), found


def test_only_a_mirror_of_foreign_images_is_a_default():
    values = yaml.safe_load((CHARTS / "firm" / "values.yaml").read_text())
    assert values["imageRegistry"] == ""
