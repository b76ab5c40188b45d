"""Admission policies of chart firm as text; tests/cluster/test_admission.py asks a cluster what they let through."""

import pytest

JOBS, STEPS = (f"ValidatingAdmissionPolicy/firm-{what}-team-a" for what in ("jobs", "steps"))
RESTRICTED = """
hostNetwork hostPID hostIPC sysctls hostProcess hostPort livenessProbe readinessProbe startupProbe postStart preStop
privileged allowPrivilegeEscalation procMount drop add runAsUser runAsNonRoot seccompProfile appArmorProfile
seLinuxOptions
"""


def texts(render, policy, **values):
    """Expressions of a policy, by their messages' beginning."""
    result = render("firm", values=values)
    assert not result.error, result.error
    spec = result.get(policy)["spec"]
    return spec, " ".join(one["expression"] for one in [*spec["variables"], *spec["validations"]])


@pytest.mark.parametrize(
    ("policy", "values", "words"),
    [
        (JOBS, {}, ["['firm-training']", "['firm/runtime']", "['object-store', 'firm-endpoints']", "claimName in []"]),
        (JOBS, {"imageRegistry": "localhost:5001"}, ["['localhost:5001/firm/runtime']"]),
        (JOBS, {"admissionPolicy": {"images": ["r.io/own"]}}, ["['firm/runtime', 'r.io/own']"]),
        (JOBS, {"admissionPolicy": {"serviceAccounts": ["gpu"]}}, ["['firm-training', 'gpu']"]),
        (JOBS, {"admissionPolicy": {"claims": ["x"]}, "modelCache": {"enabled": True}}, ["['firm-model-cache', 'x']"]),
        (JOBS, {"objectStore": {"existingSecret": "keys"}}, ["['keys', 'firm-endpoints']"]),
        (STEPS, {}, ["['pipeline-runner']", "['object-store', 'firm-endpoints', 'object-store-kfp']"]),
        (STEPS, {"objectStore": {"existingSecret": "keys"}}, ["['keys', 'firm-endpoints', 'object-store-kfp']"]),
        (STEPS, {"runner": {"name": "default-editor"}}, ["['default-editor']"]),
        (STEPS, {"admissionPolicy": {"secrets": ["more"]}}, ["'more'"]),
    ],
)  # fmt: skip
def test_names_are_those_of_the_values(render, policy, values, words):
    _, text = texts(render, policy, **values)
    for word in words:
        assert word in text


@pytest.mark.parametrize("policy", [JOBS, STEPS])
def test_it_holds_for_this_namespace_alone_and_fails_closed(render, policy):
    spec, _ = texts(render, policy)
    binding = render("firm").get(policy.replace("Policy/", "PolicyBinding/"))["spec"]
    here = {"matchLabels": {"kubernetes.io/metadata.name": "team-a"}}
    assert spec["matchConstraints"]["namespaceSelector"] == binding["matchResources"]["namespaceSelector"] == here
    assert (spec["failurePolicy"], binding["validationActions"]) == ("Fail", ["Deny"])
    assert binding["policyName"] == policy.partition("/")[2]


@pytest.mark.parametrize("policy", [JOBS, STEPS])
def test_every_setting_that_pod_security_restricts_is_looked_at(render, policy):
    _, text = texts(render, policy)
    assert [setting for setting in RESTRICTED.split() if f".?{setting}" not in text] == []


@pytest.mark.parametrize(("version", "number"), [("1.28", 0), ("1.29", 0), ("1.30", 2), ("1.34", 2)])
def test_it_is_left_out_where_kubernetes_knows_none(render, version, number):
    assert len(render("firm", kubernetes=version).of_kind("ValidatingAdmissionPolicy")) == number
