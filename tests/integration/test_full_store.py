"""An S3 server whose disks are full in the middle of a job: one message, no traceback, wherever the space ends."""

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from integration.conftest import S3Server
from shared import HTTPRequest, python_path, relay, serving

from firm.config.launch import LocalLaunch
from firm.launch.job import TrainingJob
from firm.launch.launcher import launch
from firm.records import UserError
from firm.storage.artifacts import Output

WORKER = """
from firm.launch.job import worker_main

def train(request, inputs, out):
    for step in range(3):
        for name in ("part", "metrics"):
            path = f"{name}-{step}"
            (out.folder / path).write_text("x")
            out.publish(path)

worker_main(train)
"""
FULL = b"<Error><Code>XMinioStorageFull</Code><Message>Storage backend has reached its minimum free drive threshold.</Message></Error>"  # noqa: E501


class Filling:
    """A way to an S3 server that takes nothing more once a key that ends with ``last`` was to be written."""

    def __init__(self, server: str, last: str) -> None:
        self.server = server
        self.last = last
        self.full = False

    def __call__(self, request: HTTPRequest) -> None:
        self.full |= request.command in ("PUT", "POST") and urlsplit(request.path).path.endswith(self.last)
        if self.full and request.command in ("PUT", "POST"):
            request.reply(507, FULL, Content_Type="application/xml")
            return
        relay(request, self.server)


@pytest.mark.parametrize("last", ["job.json", "part-0", "metrics-2", "entries.json"])
def test_a_full_store_is_one_message(
    s3_server: S3Server, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, last: str
) -> None:
    (tmp_path / "fullworker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", python_path(tmp_path))
    monkeypatch.delenv("FIRM_LIFELINE_PID", raising=False)
    with serving(Filling(s3_server.env["FIRM_S3_ENDPOINT"], last)) as url:
        monkeypatch.setenv("FIRM_S3_ENDPOINT", url)
        with pytest.raises(UserError) as caught:
            job = TrainingJob("run", "sft", "fullworker", {}, {})
            launch(job, Output.open(f"{s3_uri}/sft-0", small_only=True), LocalLaunch())
    said = capfd.readouterr()
    assert "full" in caught.value.what and "free some space" in caught.value.fix, str(caught.value)
    assert "Traceback" not in said.out + said.err, said.err
    if last != "job.json":
        assert "error: the disks of the S3 server are full: XMinioStorageFull" in said.err
