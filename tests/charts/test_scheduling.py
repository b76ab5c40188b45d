"""Where pods run, what they are called, how they are watched and drained: for all of a chart, and by component."""

import json
from pathlib import Path

import pytest

CHARTS = Path(__file__).parents[2] / "charts"
EVERYWHERE = {
    "nodeSelector": {"pool": "cpu"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "priorityClassName": "high",
}
CRITIC = {"critic": {"enabled": True, "model": "m"}}
NAMES = {"podLabels": {"team": "vision"}, "podAnnotations": {"sidecar": "none"}}


def templates(result):
    """Pod templates by the name of what makes them."""
    found = {}
    for thing in result.objects:
        spec = thing.get("spec", {})
        spec = spec.get("jobTemplate", {}).get("spec", spec)
        if thing["kind"] in ("Deployment", "CronJob", "Job"):
            found[thing["metadata"]["name"]] = spec["template"]
        elif thing["kind"] == "Pod":  # of `helm test`
            found[thing["metadata"]["name"]] = thing
    return found


@pytest.fixture
def pods(render):
    """pods(chart, values): templates of a chart with everything in it."""

    def made(chart, values):
        result = render(chart, values=values | (CRITIC if chart == "firm" else {}))
        assert not result.error, result.error
        return templates(result)

    return made


def test_all_pods(pods, chart):
    found = pods(chart.name, EVERYWHERE | NAMES)
    assert len(found) >= 5
    for name, template in found.items():
        assert EVERYWHERE.items() <= template["spec"].items(), name
        assert template["metadata"]["labels"]["team"] == "vision", name
        assert template["metadata"]["annotations"]["sidecar"] == "none", name


COMPONENTS = [  # chart, component, the name of its pods' owner, another one
    ("platform", "minio", "minio", "mysql"), ("firm", "critic", "critic", "firm-reaper"),
    ("firm", "reaper", "firm-reaper", "critic"), ("firm", "store-users", "firm-store-users-1", "critic"),
    ("firm", "test", "firm-test-doctor", "critic"), ("firm", "test", "firm-test-pipeline", "critic"),
]  # fmt: skip


@pytest.mark.parametrize(("chart_name", "component", "owner", "other"), COMPONENTS)
def test_a_component_of_its_own(pods, chart_name, component, owner, other):
    mine = {
        "nodeSelector": {"disk": "nvme"},
        "affinity": {"podAffinity": {}},
        "topologySpreadConstraints": [{"maxSkew": 2, "topologyKey": "host", "whenUnsatisfiable": "DoNotSchedule"}],
        "priorityClassName": "low",
    }
    own = {**mine, "labels": {"backup": "yes"}, "annotations": {"a": "b"}}
    found = pods(chart_name, EVERYWHERE | NAMES | {"components": {component: own}})
    one, another = found[owner], found[other]
    assert mine.items() <= one["spec"].items() and EVERYWHERE.items() <= another["spec"].items()
    assert one["spec"]["tolerations"] == EVERYWHERE["tolerations"]
    assert (one["metadata"]["labels"]["backup"], one["metadata"]["labels"]["team"]) == ("yes", "vision")
    assert {"a": "b", "sidecar": "none"}.items() <= one["metadata"]["annotations"].items()
    assert "backup" not in another["metadata"]["labels"] and "a" not in another["metadata"]["annotations"]


def test_both_charts_spell_alike():
    """What is common to both charts has the same keys, types and descriptions of its schema."""
    schemas = [
        json.loads((CHARTS / chart / "values.schema.json").read_text())["properties"] for chart in ("platform", "firm")
    ]
    common = [
        *EVERYWHERE,
        *NAMES,
        "imageRegistry",
        "imagePullSecrets",
        "components",
        "monitoring",
        "caBundle",
        "objectStore",
    ]
    for key in common:
        platform, firm = ({k: v for k, v in walk(schema[key])} for schema in schemas)
        assert platform == firm, key
    policies = [schema["networkPolicy"]["properties"].keys() for schema in schemas]
    assert {"enabled", "clients", "monitoring"} <= policies[0] & policies[1]
    ingress = [schemas[0]["kfp"], schemas[1]["critic"]]
    keys = [schema["properties"]["ingress"]["properties"].keys() for schema in ingress]
    assert keys[0] - keys[1] == {"authentication", "withoutLogin"} and not keys[1] - keys[0]


def walk(schema, path=""):
    """Places of a schema and their types."""
    yield path, schema.get("type")
    for key, inner in schema.get("properties", {}).items():
        yield from walk(inner, f"{path}.{key}")


def test_a_changed_configuration_still_restarts_what_reads_it(render):
    def checksum(**values):
        annotations = templates(render("platform", values=values or None))["workflow-controller"]["metadata"][
            "annotations"
        ]
        return annotations["checksum/config"]

    assert checksum() == checksum(podAnnotations={"a": "b"}) != checksum(argo={"parallelism": 3})


@pytest.mark.parametrize(
    ("chart_name", "components", "message"),
    [
        (
            "platform",
            {"miniio": {"labels": {"a": "b"}}},
            "components.miniio: there is no such Deployment here; there are ",
        ),
        ("platform", {"minio": {"nodeSelectors": {}}}, "nodeSelectors"),
        ("platform", {"minio": {"tolerations": {}}}, "tolerations"),
        ("platform", {"workflow-controller": {"replicas": 0}}, "replicas"),
        ("firm", {"critics": {}}, "components.critics: there is no such component; there are critic, reaper, "),
        ("firm", {"critic": {"replica": 2}}, "replica"),
        ("firm", {"reaper": {"replicas": 2}}, "components.reaper: it runs once"),
        ("firm", {"test": {"disruptionBudget": {"maxUnavailable": 1}}}, "components.test: it runs once"),
    ],
)
def test_misspelt_components_are_refused(render, chart_name, components, message):
    assert message in render(chart_name, values={"components": components}).error


SEVERAL = {"workflow-controller", "training-operator", "ml-pipeline-ui", "metadata-envoy-service"}


def test_more_than_one_pod_only_where_upstream_can(render):
    for name, thing in ((thing["metadata"]["name"], thing) for thing in render("platform").of_kind("Deployment")):
        result = render("platform", values={"components": {name: {"replicas": 3}}})
        if name in SEVERAL:
            assert thing["spec"]["replicas"] == 1 and result.get(f"Deployment/{name}")["spec"]["replicas"] == 3
            (budget,) = result.of_kind("PodDisruptionBudget")
            assert (budget["metadata"]["name"], budget["spec"]["maxUnavailable"]) == (name, 1)
        else:
            assert f"components.{name}.replicas: it runs once" in result.error


def roles(result, account):
    return [rule for rule in result.get(f"Role/{account}")["rules"] if "leases" in rule["resources"]]


@pytest.mark.parametrize(
    ("name", "account", "elects"),
    [
        ("workflow-controller", "argo", lambda c: {"name": "LEADER_ELECTION_DISABLE", "value": "false"} in c["env"]),
        ("training-operator", "training-operator", lambda c: "--leader-elect=true" in c["args"]),
    ],
)
def test_one_of_several_controllers_leads(render, name, account, elects):
    alone, several = (render("platform", values={"components": {name: {"replicas": n}}}) for n in (1, 2))
    for result, number in ((alone, 1), (several, 2)):
        spec = result.get(f"Deployment/{name}")["spec"]
        (container,) = spec["template"]["spec"]["containers"]
        assert elects(container) == (number > 1)
        # another waits for its turn before this one ends; alone, it must not wait for the lease of the one before
        assert spec["strategy"] == {"type": "Recreate"}  # a change of strategy would fail an upgrade
    assert not roles(alone, account)
    make, hold = roles(several, account)
    assert make["verbs"] == ["create"] and hold["verbs"] == ["get", "update"] and hold["resourceNames"] == [name]


def test_every_deployment_is_a_component(render):
    deployments = {thing["metadata"]["name"] for thing in render("platform").of_kind("Deployment")}
    error = render("platform", values={"components": {"none": {}}}).error
    assert set(error.partition("there are ")[2].splitlines()[0].split(", ")) == deployments


def test_disruption_budgets(render):
    assert not render("platform").of_kind("PodDisruptionBudget")
    (budget,) = render(
        "platform", values={"components": {"mysql": {"disruptionBudget": {"maxUnavailable": 0}}}}
    ).of_kind("PodDisruptionBudget")
    pod = templates(render("platform"))["mysql"]["metadata"]["labels"]
    assert budget["spec"]["maxUnavailable"] == 0 and budget["spec"]["selector"]["matchLabels"].items() <= pod.items()


SCALED = {"autoscaling": {"enabled": True}}


@pytest.mark.parametrize(
    ("critic", "own", "budget"),
    [
        ({}, {}, None),
        ({}, {"replicas": 2}, {"maxUnavailable": 1}),
        (SCALED, {}, {"maxUnavailable": 1}),
        (SCALED, {"disruptionBudget": {"minAvailable": "50%"}}, {"minAvailable": "50%"}),
        (SCALED, {"disruptionBudget": {}}, None),
    ],
)
def test_the_critic_is_drained_one_by_one(render, critic, own, budget):
    values = {"critic": {**CRITIC["critic"], **critic}, "components": {"critic": own}}
    result = render("firm", values=values)
    found = result.of_kind("PodDisruptionBudget")
    assert [{k: v for k, v in one["spec"].items() if k != "selector"} for one in found] == ([budget] if budget else [])
    replicas = result.get("Deployment/critic")["spec"].get("replicas")
    assert replicas == (None if critic else own.get("replicas", 1))


MONITORED = [("platform", {"ml-pipeline", "workflow-controller", "training-operator", "minio"}), ("firm", {"critic"})]


@pytest.mark.parametrize(("chart_name", "watched"), MONITORED)
def test_metrics_are_scraped_where_they_are(render, chart_name, watched):
    values = {"monitoring": {"enabled": True, "labels": {"release": "p"}}} | (CRITIC if chart_name == "firm" else {})
    result = render(chart_name, values=values)
    monitors = {monitor["metadata"]["name"]: monitor for monitor in result.of_kind("PodMonitor")}
    assert watched <= set(monitors)
    pods = templates(result)
    for name, monitor in monitors.items():
        assert monitor["metadata"]["labels"]["release"] == "p"
        assert monitor["spec"]["selector"]["matchLabels"].items() <= pods[name]["metadata"]["labels"].items()
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        ports = [port["name"] for container in pods[name]["spec"]["containers"] for port in container["ports"]]
        assert endpoint["port"] in ports, name
    assert not render(chart_name).of_kind("PodMonitor")


def test_minio_shows_its_metrics_to_the_monitor(render):
    minio = templates(render("platform", values={"monitoring": {"enabled": True}}))["minio"]
    assert {"name": "MINIO_PROMETHEUS_AUTH_TYPE", "value": "public"} in minio["spec"]["containers"][0]["env"]


def test_registry_and_pull_secrets_are_spelt_alike(render):
    values = {"imageRegistry": "mirror.example.com", "imagePullSecrets": [{"name": "mirror"}]}
    for chart in ("platform", "firm"):
        result = render(chart, values=values | (CRITIC if chart == "firm" else {}))
        assert not result.error, result.error
        for name, template in templates(result).items():
            for container in template["spec"]["containers"]:
                assert container["image"].startswith("mirror.example.com/"), name
            account = template["spec"].get("serviceAccountName")
            carried = account and result.get(f"ServiceAccount/{account}").get("imagePullSecrets")
            assert template["spec"].get("imagePullSecrets", carried) == [{"name": "mirror"}], name
