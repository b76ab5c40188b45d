"""Who reaches whom: the network policies of both charts, evaluated as Kubernetes does."""

import itertools

import pytest

HERE, ELSEWHERE = "team-a", "other"
STEP = {"workflows.argoproj.io/workflow": "run"}
JOB = {"training.kubeflow.org/job-name": "job", "app.kubernetes.io/part-of": "firm"}
STRANGER = {"app": "stranger"}
CRITIC = {"critic": {"enabled": True, "model": "s3://firm/runs/first/critic"}}
PORTS = {  # component -> ports on which anything listens
    "ml-pipeline": [8888, 8887], "ml-pipeline-ui": [3000], "metadata-envoy-service": [9090, 9901],
    "metadata-grpc-service": [8080], "mysql": [3306], "minio": [9000], "workflow-controller": [9090, 6060],
    "training-operator": [8080, 8081, 9443], "ml-pipeline-scheduledworkflow": [9090], "firm-critic": [8000],
    "step": [8080], "job": [23456, 40000], "stranger": [80],
}  # fmt: skip
# (from, to, port): connections that are needed inside the cluster
ALLOWED = {
    *itertools.product(["ml-pipeline-ui", "ml-pipeline-persistenceagent", "ml-pipeline-scheduledworkflow", "step"],
                       ["ml-pipeline"], [8888, 8887]),
    *itertools.product(["ml-pipeline", "metadata-envoy-service", "step"], ["metadata-grpc-service"], [8080]),
    ("ml-pipeline-ui", "metadata-envoy-service", 9090),
    ("ml-pipeline", "mysql", 3306), ("metadata-grpc-service", "mysql", 3306),
    *itertools.product(["ml-pipeline", "ml-pipeline-ui", "step", "job", "firm-critic", "firm-test", "firm-store-users"],
                       ["minio"], [9000]),
    *itertools.product(["step", "job", "firm-test"], ["firm-critic"], [8000]),
    ("firm-test", "ml-pipeline", 8888),
    ("job", "job", 23456), ("job", "job", 40000),
}  # fmt: skip


def selects(selector, labels):
    """Whether a label selector fits."""
    exact = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    tests = {"Exists": lambda rule: rule["key"] in labels, "In": lambda rule: labels.get(rule["key"]) in rule["values"]}
    return exact and all(tests[rule["operator"]](rule) for rule in selector.get("matchExpressions", []))


def is_peer(peer, pod, namespace):
    """Whether a peer of a rule is this pod; addresses outside the cluster are nobody here."""
    if "ipBlock" in peer:
        return False
    names = {"kubernetes.io/metadata.name": namespace}
    inside = selects(peer["namespaceSelector"], names) if "namespaceSelector" in peer else namespace == HERE
    return inside and selects(peer.get("podSelector", {}), pod)


def allows(policies, direction, side, pod, other, port):
    """Whether policies let ``pod`` have a connection; ``other`` is labels and namespace of the other end."""
    mine = [
        p["spec"] for p in policies if selects(p["spec"]["podSelector"], pod) and direction in p["spec"]["policyTypes"]
    ]
    rules = [rule for spec in mine for rule in spec.get(direction.lower(), [])]
    return not mine or any(
        any(p["port"] <= port <= p.get("endPort", p["port"]) for p in rule.get("ports", [{"port": port}]))
        and (side not in rule or any(is_peer(peer, *other) for peer in rule[side]))
        for rule in rules
    )


@pytest.fixture
def cluster(render):
    """cluster(values): policies of both charts, and labels of every kind of pod by component."""

    def made(platform=None, firm=None):
        results = [render("platform", values=platform), render("firm", values={**CRITIC, **(firm or {})})]
        pods = {"step": STEP, "job": JOB, "stranger": STRANGER}
        for thing in (thing for result in results for thing in result.objects):
            spec = thing.get("spec", {})
            template = (
                spec.get("jobTemplate", {}).get("spec", spec).get("template", thing if thing["kind"] == "Pod" else None)
            )
            if template:
                labels = template["metadata"]["labels"]
                pods[labels["app.kubernetes.io/name"]] = labels
        policies = [policy for result in results for policy in result.of_kind("NetworkPolicy")]

        def connects(source, target, port, namespace=HERE):
            """Whether both ends' policies let it; other namespaces have none."""
            into = allows(policies, "Ingress", "from", pods[target], (pods.get(source, STRANGER), namespace), port)
            if namespace != HERE:
                return into
            return into and allows(policies, "Egress", "to", pods[source], (pods[target], HERE), port)

        return connects, pods

    return made


def test_every_connection_is_needed_by_somebody(cluster):
    connects, pods = cluster()
    assert len(pods) >= 15
    found = {
        (source, target, port)
        for source in pods
        for target, ports in PORTS.items()
        for port in ports
        if connects(source, target, port)
    }
    anybody = {("training-operator", 9443)}  # the Kubernetes API calls it, from an address that nobody knows
    extra = {(s, t, p) for s, t, p in found - ALLOWED if (t, p) not in anybody}
    # the API and the store are open to all pods of both charts, which no user's code runs in
    assert {(t, p) for _, t, p in extra} <= {("ml-pipeline", 8888), ("ml-pipeline", 8887), ("minio", 9000)}
    assert not {s for s, _, _ in extra} & {
        "step",
        "job",
        "stranger",
        "mysql",
        "minio",
        "metadata-envoy-service",
        "firm-critic",
    }
    assert found >= ALLOWED


@pytest.mark.parametrize("namespace", [HERE, ELSEWHERE])
def test_a_stranger_reaches_nothing(cluster, namespace):
    connects, _ = cluster()
    reached = {(t, p) for t, ports in PORTS.items() for p in ports if connects("stranger", t, p, namespace)}
    assert reached == {("training-operator", 9443)}


def test_clients_and_monitoring_are_let_in_where_said(cluster):
    def peer(name):
        return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}

    values = {"networkPolicy": {"clients": [peer("proxy")], "monitoring": [peer("prometheus")]}}
    connects, _ = cluster(values, values)

    def reached(namespace):
        return {(t, p) for t, ports in PORTS.items() for p in ports if connects("stranger", t, p, namespace)}

    webhook = ("training-operator", 9443)
    assert reached("proxy") == {
        ("ml-pipeline", 8888), ("ml-pipeline", 8887), ("ml-pipeline-ui", 3000), ("firm-critic", 8000), webhook,
    }  # fmt: skip
    assert reached("prometheus") == {
        ("ml-pipeline", 8888), ("ml-pipeline-scheduledworkflow", 9090), ("workflow-controller", 9090),
        ("training-operator", 8080), ("minio", 9000), ("firm-critic", 8000), webhook,
    }  # fmt: skip
    assert reached(ELSEWHERE) == {webhook}


def test_pods_of_others_can_be_left_open(cluster):
    connects, _ = cluster({"networkPolicy": {"defaultDeny": False}})
    assert connects("step", "stranger", 80) and connects("stranger", "stranger", 80)
    assert not connects("stranger", "mysql", 3306)


@pytest.mark.parametrize("ports", [[8000], [8000, 30000], []])
def test_steps_and_jobs_reach_judges_in_the_namespace_on_the_ports_that_are_said(cluster, ports):
    connects, pods = cluster(firm={"networkPolicy": {"judgePorts": ports}})
    pods["judge"] = {"app": "vllm", "firm/judge": "teacher"}
    reached = {(s, p) for s in pods for p in (80, 8000, 30000) if connects(s, "judge", p)}
    assert reached == set(itertools.product(["step", "job"], ports))
    assert not any(connects("job", "stranger", port) for port in ports)
    assert not any(connects("step", "judge", port, ELSEWHERE) for port in ports)


@pytest.mark.parametrize("component", ["mysql", "minio"])
def test_stores_call_nobody(render, component):
    spec = render("platform").get(f"NetworkPolicy/{component}")["spec"]
    assert "Egress" in spec["policyTypes"] and "egress" not in spec


def test_steps_reach_the_kubernetes_api(render):
    peers = [{"ipBlock": {"cidr": "10.0.0.1/32"}}]
    values = {"networkPolicy": {"apiServerPorts": [16443], "apiServers": peers, "internet": False}}
    rules = render("firm", values=values).get("NetworkPolicy/firm-steps")["spec"]["egress"]
    assert {"ports": [{"protocol": "TCP", "port": 16443}], "to": peers} in rules
    assert not [rule for rule in rules if {"protocol": "TCP", "port": 443} in rule.get("ports", [])]
