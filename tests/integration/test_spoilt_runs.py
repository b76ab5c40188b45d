"""Any file of a run, cut or flipped while the run was interrupted: it ends as if nothing had happened.

Or it says in one message which artifact is spoilt and what to do, and ends so after that was done.
"""

import contextlib
import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared import gate, rendered, small_run

from firm.chat import journal
from firm.chat.client import PythonClient
from firm.config.loading import load_config
from firm.records import Manifest
from firm.stage import execute
from firm.storage.artifacts import Output
from firm.storage.inputs import write_ref
from firm.storage.open import open_store

pytestmark = pytest.mark.slow
JUDGE = '{kind: endpoint, base_url: "http://127.0.0.1:1", model: pixel-teacher, concurrency: 1, logprobs: false}'
RUBRICS = '{"instruction_following": "instruction_following", "quality": "quality"}'
SMALL = small_run(rendered(16), shard_size=4, batch_size=4, test_share=0.25)
SMALL += f"""
critic: {{kind: endpoint, endpoint: {JUDGE}, answer_style: reason_first, num_samples: 2, rubrics: {RUBRICS}}}
auditor: {{judge: {JUDGE}, rubrics: {RUBRICS}}}
bench:
  num_bootstrap: 20
  sources: [{{kind: policy, num_images: 8, num_inference_steps: 1}}]
  gate: {gate({"metric": "coverage", "at_least": 0})}
"""
KILLED_AT = {"in curation": 30, "in bench": 100, "not": 10_000}
"""Number of the question to any judge at which a run is killed."""


class Killed(BaseException):
    """Stands for a kill -9."""


class Teacher(PythonClient):
    """All judges; the run is killed when no questions are left."""

    left = 0

    def __init__(self, _config: object) -> None:
        super().__init__("firm.shapes.teacher:PixelTeacher")

    def complete(self, *messages: Any, **options: Any) -> Any:
        Teacher.left -= 1
        if Teacher.left < 0:
            raise Killed
        return super().complete(*messages, **options)


class Run(NamedTuple):
    """A run of two stages: where its artifacts are, and the folder with its configuration and critic."""

    uri: str
    folder: Path

    def go(self, questions: int = KILLED_AT["not"]) -> str:
        """Run; returns what it says where it fails."""
        Teacher.left = questions
        plain = load_config(str(self.folder / "small.yaml"), [f"store={self.uri}"]).model_dump(mode="json")
        data = str(self.folder / f"data-{time.monotonic_ns()}")
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                execute("curation", plain, {}, data)
                execute("bench", plain, {"data": data, "critic": str(self.folder / "critic")}, f"{data}-bench")
            except SystemExit as end:
                assert end.code in (1, 2)
                assert said.getvalue().count("error: ") == 1 and "Traceback" not in said.getvalue()
                return said.getvalue()
        return ""

    def files(self) -> dict[str, bytes]:
        store = open_store(self.uri)
        return {key: store.get(key) for key, _ in store.list()}

    def manifests(self) -> dict[str, bytes]:
        found = [data for key, data in self.files().items() if key.endswith("/manifest.json")]
        return {Manifest.model_validate_json(data).stage: data for data in found}

    def delete(self, artifact: str) -> None:
        store = open_store(f"{self.uri}/small/{artifact}")
        for key, _ in store.list():
            store.delete(key)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Configuration and critic of all runs here."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(SMALL)
    critic = Output.open(str(folder / "made"))
    (critic.folder / "critic").mkdir()
    (critic.folder / "critic" / "here").write_text("the critic")
    write_ref(critic.commit("critic", "critic", {}, {}, critic.files()), folder / "critic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "open_chat", Teacher)
        yield folder


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """Manifests of a run that nothing disturbed."""
    run = Run(str(folder / "whole"), folder)
    assert run.go() == ""
    return run.manifests()


@pytest.fixture(params=["folder", "moto"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder or a prefix in S3."""
    return str(tmp_path / "store") if request.param == "folder" else str(request.getfixturevalue("s3_uri"))


@pytest.fixture(params=KILLED_AT)
def left(request: pytest.FixtureRequest, place: str, folder: Path) -> dict[str, bytes]:
    """The files of an interrupted run."""
    run = Run(f"{place}/killed", folder)
    with contextlib.suppress(Killed):
        assert run.go(KILLED_AT[request.param]) == ""
    files = run.files()
    assert any("work" in key.split("/") for key in files) == (request.param != "not"), "killed at another moment"
    return files


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_spoilt_file_is_mended_or_named(
    place: str, folder: Path, left: dict[str, bytes], whole: dict[str, bytes], data: st.DataObject
) -> None:
    run = Run(f"{place}/{time.monotonic_ns()}", folder)
    key = data.draw(st.sampled_from(sorted(key for key in left if left[key])), "file")
    content = bytearray(left[key])
    where = data.draw(st.integers(0, len(content) - 1), "where")
    if data.draw(st.booleans(), "cut"):
        del content[where:]
    else:
        content[where] ^= data.draw(st.integers(1, 255), "mask")
    store = open_store(run.uri)
    for name, sound in {**left, key: bytes(content)}.items():
        store.put(name, sound)
    if said := run.go():
        [artifact] = re.findall(r"small/\.?(\w+-\w+)", key)
        assert artifact in said, f"{key} is not named"
        assert re.search("delete (the artifact|s3://.*) and run", said), "no advice"
        run.delete(artifact)
        assert run.go() == ""
    assert run.manifests() == whole
