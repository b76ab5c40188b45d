"""Rendered charts: ``chart`` is each folder of charts/, ``scenario`` each chart alone and with each of its ci files."""

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lookups
import pytest
import yaml

CHARTS = Path(__file__).parents[2] / "charts"
NAMESPACE = "team-a"
NEW_CLUSTER = [
    {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in ("kube-system", NAMESPACE)
]
Object = dict[str, Any]
Values = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template, and where it stands."""

    owner: str
    spec: Object

    @property
    def containers(self) -> list[Object]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True)
class Rendered:
    """What helm makes of a chart and its values; ``error`` where it refuses."""

    objects: list[Object] = field(default_factory=list)
    error: str = ""

    @property
    def names(self) -> set[str]:
        return {f"{thing['kind']}/{thing['metadata']['name']}" for thing in self.objects}

    def get(self, name: str) -> Object:
        kind, _, name = name.partition("/")
        (found,) = (thing for thing in self.objects if (thing["kind"], thing["metadata"]["name"]) == (kind, name))
        return found

    def of_kind(self, kind: str) -> list[Object]:
        return [thing for thing in self.objects if thing["kind"] == kind]

    @property
    def pods(self) -> Iterator[Pod]:
        for thing in self.objects:
            spec = thing.get("spec", {})
            spec = spec.get("jobTemplate", {}).get("spec", spec)
            if thing["kind"] == "Pod" or "template" in spec:
                yield Pod(f"{thing['kind']}/{thing['metadata']['name']}", spec.get("template", thing)["spec"])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    charts = sorted(path.parent for path in CHARTS.glob("*/Chart.yaml"))
    if "chart" in metafunc.fixturenames:
        metafunc.parametrize("chart", charts, ids=lambda chart: chart.name)
    if "scenario" in metafunc.fixturenames:
        scenarios = [(chart, file) for chart in charts for file in (None, *sorted(chart.glob("ci/*-values.yaml")))]
        ids = [f"{chart.name}-{file.stem.removesuffix('-values') if file else 'default'}" for chart, file in scenarios]
        metafunc.parametrize("scenario", scenarios, ids=ids)


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """helm(*arguments, values=None, kubeconfig=None): the program, with no cluster where no kubeconfig is given."""
    if not shutil.which("helm"):
        pytest.skip("helm is not on PATH")

    def run(
        *arguments: str, values: Values | None = None, kubeconfig: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        more = ("-f", "-") if values else ()
        text = yaml.safe_dump(values) if values else None
        env = {**os.environ, "KUBECONFIG": str(kubeconfig or os.devnull)}
        return subprocess.run(
            ["helm", *arguments, *more], input=text, capture_output=True, text=True, check=False, env=env
        )

    return run


@pytest.fixture(scope="session")
def template(helm) -> Callable[..., Rendered]:
    """template(chart, *arguments, values=None, kubeconfig=None): as `helm template` prints it, cluster or not."""

    def made(chart: str, *arguments: str, values: Values | None = None, kubeconfig: Path | None = None) -> Rendered:
        server = ("--dry-run=server", "--disable-openapi-validation") if kubeconfig else ()
        folder = str(CHARTS / chart)
        done = helm(
            "template", "release", folder, "-n", NAMESPACE, *server, *arguments, values=values, kubeconfig=kubeconfig
        )
        if done.returncode:
            return Rendered(error=done.stderr)
        return Rendered([thing for thing in yaml.load_all(done.stdout, yaml.CSafeLoader) if thing])

    return made


@pytest.fixture(scope="session")
def new_cluster(tmp_path_factory) -> Iterator[Callable[[str], Path]]:
    """new_cluster(version): kubeconfig of a cluster where nothing is installed."""
    with ExitStack() as stack:

        @functools.cache
        def cluster(version: str) -> Path:
            return stack.enter_context(lookups.serve(NEW_CLUSTER, tmp_path_factory.mktemp("cluster"), version))

        yield cluster


@pytest.fixture(scope="session")
def render(template, new_cluster) -> Callable[..., Rendered]:
    """render(chart, file=None, values=None, kubernetes="1.34"): what a first installation makes on that version.

    ``chart`` is a folder or a name. Do not change what it returns.
    """

    @functools.cache
    def cached(chart: str, file: Path | None, values: str, kubernetes: str) -> Rendered:
        files = ("-f", str(file)) if file else ()
        return template(chart, *files, values=yaml.safe_load(values), kubeconfig=new_cluster(kubernetes))

    return lambda chart, file=None, values=None, kubernetes="1.34": cached(
        Path(chart).name, file, yaml.safe_dump(values), kubernetes
    )


@pytest.fixture
def rendered(scenario, render) -> Rendered:
    result = render(*scenario)
    assert not result.error, result.error
    return result


@pytest.fixture
def pods(rendered) -> list[Pod]:
    found = list(rendered.pods)
    assert found, "no pod template was found: the tests of this scenario would check nothing"
    return found
