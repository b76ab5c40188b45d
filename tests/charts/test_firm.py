"""Chart firm: every toggle, where the object store is named, the critic server, policies."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FIRM = Path(__file__).parents[2] / "charts" / "firm"
CRITIC = {"critic": {"enabled": True, "model": "s3://firm/runs/first/critic"}}
REAPER = {f"{kind}/firm-reaper" for kind in ("ServiceAccount", "CronJob", "Role", "RoleBinding")}
# key -> values that it needs, and the objects that come and go with it
POLICIES = ("firm-training", "firm-steps", "firm-judges", "critic")
TOGGLES = {
    "kfp.enabled": ({}, {
        "ConfigMap/kfp-launcher", "ConfigMap/firm-test", "Pod/firm-test-pipeline", "NetworkPolicy/firm-steps",
        "ValidatingAdmissionPolicy/firm-steps-team-a", "ValidatingAdmissionPolicyBinding/firm-steps-team-a", *REAPER,
    }),
    "kfp.launcherConfig": ({}, {"ConfigMap/kfp-launcher"}),
    "storeUsers.enabled": ({}, {"Job/firm-store-users-1", "ConfigMap/firm-store-users"}),
    "admissionPolicy.enabled": (
        {}, {f"ValidatingAdmissionPolicy{of}/firm-{pod}-team-a" for of in ("", "Binding") for pod in ("jobs", "steps")},
    ),
    "runner.create": ({}, {"ServiceAccount/pipeline-runner"}),
    "rbac.enabled": (
        {}, {f"{kind}/{name}" for kind in ("Role", "RoleBinding") for name in ("firm-runner", "firm-reaper")},
    ),
    "modelCache.enabled": ({}, {"PersistentVolumeClaim/firm-model-cache"}),
    "critic.enabled": (
        CRITIC, {"Deployment/critic", "Service/critic", "ConfigMap/critic", "NetworkPolicy/critic"},
    ),
    "critic.autoscaling.enabled": (CRITIC, {"HorizontalPodAutoscaler/critic", "PodDisruptionBudget/critic"}),
    "critic.ingress.enabled": (
        {"critic": {**CRITIC["critic"], "ingress": {"host": "c"}}, "networkPolicy": {"clients": [{"podSelector": {}}]}},
        {"Ingress/critic"},
    ),
    "monitoring.enabled": (CRITIC, {"PodMonitor/critic"}),
    "networkPolicy.enabled": (CRITIC, {f"NetworkPolicy/{name}" for name in POLICIES}),
    "quota.enabled": ({}, {"ResourceQuota/firm"}),
    "limitRange.enabled": ({}, {"LimitRange/firm"}),
    "priorityClass.create": ({}, {"PriorityClass/team-a-training"}),
    "reaper.enabled": ({}, REAPER),
}  # fmt: skip


def merged(one, other):
    """Two trees of values, as helm merges them."""
    both = {key: merged(one[key], other[key]) for key in one.keys() & other.keys() if isinstance(one[key], dict)}
    return {**one, **other, **both}


def at(path, value):
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


@pytest.fixture
def firm(render):
    def rendered(values=None):
        result = render("firm", values=values)
        assert not result.error, result.error
        return result

    return rendered


def environment(container):
    return {env["name"]: env for env in container["env"]}


@pytest.mark.parametrize("toggle", TOGGLES)
def test_toggle(firm, toggle):
    needed, owned = TOGGLES[toggle]
    on, off = firm(merged(needed, at(toggle, True))), firm(merged(needed, at(toggle, False)))
    assert on.names - off.names == owned
    assert off.names <= on.names


def test_every_toggle_is_tested():
    def find(values, path):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from find(value, f"{path}{key}.")
            elif isinstance(value, bool):
                yield path + key

    settings = {"objectStore.secure", "networkPolicy.internet"}  # change objects, and own none
    assert set(find(yaml.safe_load((FIRM / "values.yaml").read_text()), "")) == set(TOGGLES) | settings


def test_object_store_reaches_all_places(firm):
    store = {"endpoint": "s3.example.com:8333", "secure": True, "region": "mars-1", "bucket": "lab"}
    store["existingSecret"] = "keys"
    result = firm(merged(CRITIC, {"objectStore": store}))
    data = result.get("ConfigMap/firm")["data"]
    assert (data["FIRM_S3_ENDPOINT"], data["AWS_REGION"]) == ("https://s3.example.com:8333", "mars-1")
    assert data["FIRM_STORE_SECRET"] == "keys" and data["FIRM_STORE"] == "s3://lab/runs"
    launcher = result.get("ConfigMap/kfp-launcher")["data"]
    assert launcher["defaultPipelineRoot"] == "minio://lab/kfp"
    for provider in yaml.safe_load(launcher["providers"]).values():
        assert provider["default"] == {
            "endpoint": "https://s3.example.com:8333",
            "region": "mars-1",
            "disableSSL": False,
            "forcePathStyle": True,
            "credentials": {
                "fromEnv": False,
                "secretRef": {"secretName": "keys", "accessKeyKey": "accesskey", "secretKeyKey": "secretkey"},
            },
        }
    (secrets,) = (rule for rule in result.get("Role/firm-runner")["rules"] if rule["resources"] == ["secrets"])
    assert secrets["resourceNames"] == ["keys"]
    assert "--store=s3://lab/runs" in result.get("Pod/firm-test-doctor")["spec"]["containers"][0]["command"]
    for policy in ("firm-training", "critic"):
        assert {"ports": [{"protocol": "TCP", "port": 8333}]} in result.get(f"NetworkPolicy/{policy}")["spec"]["egress"]
    for container in (
        result.get("Pod/firm-test-doctor")["spec"]["containers"][0],
        result.get("Deployment/critic")["spec"]["template"]["spec"]["initContainers"][0],
    ):
        assert environment(container)["AWS_ACCESS_KEY_ID"]["valueFrom"]["secretKeyRef"]["name"] == "keys"
    assert "object-store" not in yaml.safe_dump(result.objects)


@pytest.mark.parametrize(
    ("store", "url", "port"),
    [
        ({}, "http://minio:9000", 9000),
        ({"endpoint": "s3.example.com", "secure": True}, "https://s3.example.com", 443),
        ({"endpoint": "s3"}, "http://s3", 80),
    ],
)
def test_endpoint_and_its_port(firm, store, url, port):
    result = firm({"objectStore": store})
    assert result.get("ConfigMap/firm")["data"]["FIRM_S3_ENDPOINT"] == url
    assert {"ports": [{"protocol": "TCP", "port": port}]} in result.get("NetworkPolicy/firm-training")["spec"]["egress"]


def test_secrets_are_made_only_from_given_values(firm):
    assert firm().of_kind("Secret") == []
    keys = {"objectStore": {"accessKey": "a", "secretKey": "s"}, "endpoints": {"apiKey": "k", "hubToken": "h"}}
    result = firm(keys)
    assert result.get("Secret/object-store")["stringData"] == {"accesskey": "a", "secretkey": "s"}
    assert result.get("Secret/firm-endpoints")["stringData"] == {"api-key": "k", "hf-token": "h"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectStore": {"accessKey": "a"}}, "give both accessKey and secretKey"),
        ({"objectStore": {"accessKey": "a", "secretKey": "s", "existingSecret": "x"}}, "not both"),
        ({"endpoints": {"apiKey": "k", "existingSecret": "x"}}, "not both"),
        ({"critic": {"enabled": True}}, "critic.model"),
        ({"critic": {"engine": "tgi"}}, "critic/engine"),
        ({"environment": {"HTTPS_PROXY": "http://proxy:3128"}}, "name them in NO_PROXY"),
    ],
)
def test_impossible_values_are_refused(render, values, message):
    assert message in render("firm", values=values).error


@pytest.mark.parametrize(
    ("values", "reference"),
    [
        ({}, "firm/runtime:0.1.0"),
        ({"imageRegistry": "localhost:5001/"}, "localhost:5001/firm/runtime:0.1.0"),
        ({"image": {"runtime": {"tag": "9", "digest": "sha256:" + "0" * 64}}}, "firm/runtime@sha256:" + "0" * 64),
        ({"image": {"runtime": {"repository": "x", "tag": "9"}}}, "x:9"),
    ],
)
def test_image_reference(firm, values, reference):
    result = firm(merged(CRITIC, values))
    assert result.get("ConfigMap/firm")["data"]["FIRM_IMAGE"] == reference
    assert result.get("Deployment/critic")["spec"]["template"]["spec"]["containers"][0]["image"] == reference


def test_environment_for_jobs(firm):
    more = {
        "modelCache": {"enabled": True},
        "priorityClass": {"name": "batch"},
        "environment": {"HF_ENDPOINT": "http://h"},
    }
    data = firm(more).get("ConfigMap/firm")["data"]
    assert (data["FIRM_MODEL_CACHE"], data["FIRM_PRIORITY_CLASS"]) == ("firm-model-cache", "batch")
    assert data["HF_ENDPOINT"] == "http://h"
    assert data["FIRM_SERVICE_ACCOUNT"] == "firm-training"
    bare = firm().get("ConfigMap/firm")["data"]
    assert (bare["FIRM_MODEL_CACHE"], bare["FIRM_PRIORITY_CLASS"]) == ("", "")


def test_training_pods_have_no_rights(firm):
    result = firm()
    assert result.get("ServiceAccount/firm-training")["automountServiceAccountToken"] is False
    bound = [subject["name"] for binding in result.of_kind("RoleBinding") for subject in binding["subjects"]]
    assert sorted(bound) == ["firm-reaper", "pipeline-runner"]


def test_model_cache_survives_an_uninstall(firm):
    claim = firm(at("modelCache.enabled", True)).get("PersistentVolumeClaim/firm-model-cache")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def critic(firm, **values):
    spec = firm(merged(CRITIC, {"critic": values})).get("Deployment/critic")["spec"]
    pod = spec["template"]["spec"]
    return spec, pod, pod["containers"][0]


def test_critic_on_cpu(firm):
    spec, pod, server = critic(firm)
    assert (server["command"], server["args"][0]) == (["firm", "serve"], "/tmp/model")
    assert pod["initContainers"][0]["command"][2:] == ["s3://firm/runs/first/critic", "/tmp/model"]
    assert spec["replicas"] == 1
    assert "nvidia.com/gpu" not in server["resources"]["limits"]
    assert not any(name.startswith("AWS_") for name in environment(server))
    key = environment(server)["OPENAI_API_KEY"]["valueFrom"]["secretKeyRef"]  # firm.critics.serve.TOKEN
    assert key == {"name": "firm-endpoints", "key": "api-key", "optional": True}


@pytest.mark.parametrize(
    ("engine", "policies", "allowed"), [("firm", True, True), ("firm", False, False), ("vllm", True, False)]
)
def test_a_critic_without_a_key_is_served_only_behind_policies(firm, engine, policies, allowed):
    values = merged(CRITIC, {"critic": {"engine": engine}, "networkPolicy": {"enabled": policies}})
    pod = firm(values).get("Deployment/critic")["spec"]["template"]["spec"]
    assert ("--no-key" in pod["containers"][0]["args"]) == allowed


def test_critic_on_gpus(firm):
    spec, pod, server = critic(firm, engine="vllm", model="Qwen/Qwen3-VL-8B-Instruct", gpu={"count": 2})
    assert server["image"].startswith("docker.io/vllm/vllm-openai:v")
    assert (server["command"], server["args"][0]) == (["vllm", "serve"], "Qwen/Qwen3-VL-8B-Instruct")
    assert "--tensor-parallel-size=2" in server["args"]
    assert all(server["resources"][kind]["nvidia.com/gpu"] == "2" for kind in ("requests", "limits"))
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "--load-format=safetensors" in server["args"]  # pickles are never read
    assert "initContainers" not in pod
    shm = next(volume for volume in pod["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"


def test_critic_scaled_by_load_states_no_number(firm):
    spec, _, _ = critic(firm, autoscaling={"enabled": True})
    assert "replicas" not in spec


def test_service_finds_the_critic(firm):
    result = firm(CRITIC)
    selector = result.get("Service/critic")["spec"]["selector"]
    deployment = result.get("Deployment/critic")["spec"]
    assert selector == deployment["selector"]["matchLabels"]
    assert selector.items() <= deployment["template"]["metadata"]["labels"].items()


def test_configuration_rolls_the_critic(firm):
    def checksum(values):
        template = firm(merged(CRITIC, values)).get("Deployment/critic")["spec"]["template"]
        return template["metadata"]["annotations"]["checksum/config"]

    assert checksum({}) != checksum({"environment": {"A": "1"}})


@pytest.mark.parametrize("policy", ["firm-training", "critic"])
def test_policies_deny_by_default(firm, policy):
    spec = firm(CRITIC).get(f"NetworkPolicy/{policy}")["spec"]
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["podSelector"]
    for rule in spec["ingress"]:
        assert rule["ports"] and rule["from"] and all(peer["podSelector"] for peer in rule["from"])
    assert all(rule["ports"] for rule in spec["egress"])


def test_internet_is_reached_only_where_allowed(firm):
    def blocks(internet):
        spec = firm(at("networkPolicy.internet", internet)).get("NetworkPolicy/firm-training")["spec"]
        return [peer["ipBlock"]["cidr"] for rule in spec["egress"] for peer in rule.get("to", []) if "ipBlock" in peer]

    assert blocks(True) == ["0.0.0.0/0", "::/0"]
    assert blocks(False) == []


def test_pull_secrets_reach_steps_and_jobs(firm):
    accounts = firm({"imagePullSecrets": [{"name": "mirror"}]}).of_kind("ServiceAccount")
    assert len(accounts) == 3
    assert all(account["imagePullSecrets"] == [{"name": "mirror"}] for account in accounts)


def test_notes_fit_the_values(helm):
    def notes(**values):
        return helm("install", "x", str(FIRM), "-n", "team-a", "--dry-run=client", values=values or None).stdout

    assert "kfp --endpoint" in notes() and "-n team-a" in notes()
    assert "gen-shapes-kind" in notes(kfp={"enabled": False})
    assert "critic loads s3://firm/runs/first/critic" in notes(**CRITIC)


def test_pipeline_of_helm_test_compiles(firm, monkeypatch, tmp_path):
    from kfp import compiler

    script = firm().get("ConfigMap/firm-test")["data"]["two_steps.py"]
    assert script == (FIRM / "files" / "two_steps.py").read_text()
    monkeypatch.setenv("FIRM_TEST_IMAGE", "firm/slim:0.1.0")
    two_steps = runpy.run_path(str(FIRM / "files" / "two_steps.py"))["two_steps"]
    compiler.Compiler().compile(two_steps, str(tmp_path / "p.yaml"))
    spec = yaml.safe_load((tmp_path / "p.yaml").read_text())
    containers = [executor["container"] for executor in spec["deploymentSpec"]["executors"].values()]
    assert [container["image"] for container in containers] == ["firm/slim:0.1.0"] * 2
    assert all(container["resources"]["resourceMemoryLimit"] for container in containers)


@pytest.mark.parametrize("whole", [True, False], ids=["artifact", "folder"])
def test_fetch(whole, tmp_path):
    from firm.storage.artifacts import Output

    fetch = runpy.run_path(str(FIRM / "files" / "fetch.py"))["fetch"]
    source = tmp_path / "source"
    if whole:
        out = Output.open(str(source))
        (out.folder / "critic").mkdir()
        (out.folder / "critic" / "config.json").write_text("{}")
        out.commit("sft", "key", {}, {}, ["critic"])
    else:
        source.mkdir()
        (source / "config.json").write_text("{}")
    fetch(str(source), tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ({}, "no model"),
        ({"config.json": '{"auto_map": {"AutoModel": "evil.Evil"}}'}, "code of its own"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, "a pickle"),
    ],
)
def test_fetch_refuses_what_is_more_or_less_than_a_model(files, what, tmp_path):
    (tmp_path / "source").mkdir()
    for name, text in files.items():
        (tmp_path / "source" / name).write_text(text)
    command = [sys.executable, str(FIRM / "files" / "fetch.py"), str(tmp_path / "source"), str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and what in done.stderr, done.stderr
