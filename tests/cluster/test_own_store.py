"""A second installation: its store is elsewhere, behind TLS of a private authority; its Secrets have other names."""

from collections.abc import Iterator
from typing import Any

import pytest
from authority import Authority, moto
from cluster import second

pytestmark = pytest.mark.cluster
BUCKET = "lab"
SECRETS = {"objectStore.existingSecret": "team-s3", "caBundle.existingSecret": "company-ca"}


@pytest.fixture(scope="module")
def own(kind: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The installation, reached from this machine."""
    folder = tmp_path_factory.mktemp("own")
    authority = Authority(folder)
    with moto(authority, BUCKET, second.gateway(kind)) as address, second.namespace(kind, "own-store") as own:
        literals = ("--from-literal=accesskey=own", "--from-literal=secretkey=own-secret")
        own.kubectl("create", "secret", "generic", "team-s3", *literals)
        own.kubectl("create", "secret", "generic", "company-ca", f"--from-file=ca.crt={authority.file}")
        store = {"endpoint": address, "secure": "true", "bucket": BUCKET}
        both = {**{f"objectStore.{key}": value for key, value in store.items()}, **SECRETS}
        scenarios = {"platform": ["jobs", "gitops"], "firm": []}
        with second.installed(
            kind, own, folder, scenarios, {"platform": {**both, "minio.enabled": "false"}, "firm": both}
        ):
            own.kubectl("wait", "--for=condition=Available", "deployment", "--all", "--timeout=300s")
            yield second.reaching(own, address, authority)


def test_doctor_and_helm_test_are_green(own: Any) -> None:
    second.all_is_well(own, BUCKET)


def test_a_job_reads_what_it_is_asked_for_from_there(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    second.a_job_reads_its_request(own, BUCKET, monkeypatch)
