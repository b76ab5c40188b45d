"""Ways into the cluster by HTTP: off by default, and never without a log-in that nobody has decided to do without."""

import pytest

PEER = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}}
OPEN = {"networkPolicy": {"clients": [PEER]}}
LOGIN = {"nginx.ingress.kubernetes.io/auth-url": "https://auth.example.com/oauth2/auth"}
KFP = {"enabled": True, "host": "kfp.example.com", "authentication": LOGIN}


def kfp(**settings):
    return {"kfp": {"ingress": {**KFP, **settings}}, **OPEN}


def critic(engine="firm", policies=OPEN, **settings):
    ingress = {"enabled": True, "host": "critic.example.com", **settings}
    return {"critic": {"enabled": True, "model": "m", "engine": engine, "ingress": ingress}, **policies}


@pytest.fixture
def made(render):
    def rendered(chart, values):
        result = render(chart, values=values)
        assert not result.error, result.error
        return result

    return rendered


def test_none_by_default(render, chart):
    assert not render(chart).of_kind("Ingress")


@pytest.mark.parametrize(
    ("chart_name", "values", "service", "port"),
    [
        ("platform", kfp(), "ml-pipeline-ui", 80),
        ("platform", {**kfp(), "kfp": {"ui": {"enabled": False}, **kfp()["kfp"]}}, "ml-pipeline", 8888),
        ("firm", critic(), "critic", 8000),
    ],
)
def test_it_leads_to_a_service_that_exists(made, chart_name, values, service, port):
    result = made(chart_name, values)
    (ingress,) = result.of_kind("Ingress")
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert path["backend"]["service"] == {"name": service, "port": {"number": port}}
    assert port in [entry["port"] for entry in result.get(f"Service/{service}")["spec"]["ports"]]
    assert rule["host"].endswith(".example.com") and "tls" not in ingress["spec"]


@pytest.mark.parametrize(("chart_name", "values"), [("platform", kfp), ("firm", critic)])
def test_class_certificate_and_annotations(made, chart_name, values):
    more = {"className": "nginx", "tlsSecret": "certificate", "annotations": {"a": "b"}}
    (ingress,) = made(chart_name, values(**more)).of_kind("Ingress")
    spec = ingress["spec"]
    assert spec["ingressClassName"] == "nginx"
    assert spec["tls"] == [{"hosts": [spec["rules"][0]["host"]], "secretName": "certificate"}]
    assert ingress["metadata"]["annotations"] == {"a": "b", **(LOGIN if chart_name == "platform" else {})}


@pytest.mark.parametrize(
    ("chart_name", "values", "message"),
    [
        ("platform", kfp(authentication={}), "has no log-in"),
        ("platform", kfp(authentication={}, annotations={"cert-manager.io/cluster-issuer": "x"}), "has no log-in"),
        ("platform", kfp(host=""), "kfp.ingress.host"),
        ("platform", {"kfp": {"ingress": KFP}}, "networkPolicy.clients"),
        ("firm", critic(host=""), "critic.ingress.host"),
        ("firm", critic(policies={}), "networkPolicy.clients"),
    ],
)
def test_what_would_be_open_or_shut_by_mistake_is_refused(render, chart_name, values, message):
    assert message in render(chart_name, values=values).error


@pytest.mark.parametrize(
    ("chart_name", "values"),
    [
        ("platform", kfp(authentication={}, withoutLogin=True)),
        ("platform", {**kfp(), "networkPolicy": {"enabled": False}}),
        ("firm", critic(policies={"networkPolicy": {"enabled": False}})),
    ],
)
def test_what_somebody_has_decided_is_let_be(made, chart_name, values):
    assert made(chart_name, values).of_kind("Ingress")


@pytest.mark.parametrize("engine", ["firm", "vllm"])
def test_a_critic_with_an_ingress_always_asks_for_a_key(made, engine):
    inside, outside = (
        made("firm", critic(engine, enabled=enabled)).get("Deployment/critic")["spec"]["template"]["spec"]["containers"]
        for enabled in (False, True)
    )
    assert "--no-key" not in outside[0]["args"] and ("--no-key" in inside[0]["args"]) == (engine == "firm")
    for (container,), optional in ((inside, True), (outside, False)):
        (key,) = (e["valueFrom"]["secretKeyRef"] for e in container["env"] if e["name"].endswith("API_KEY"))
        assert key == {"name": "firm-endpoints", "key": "api-key", "optional": optional}
