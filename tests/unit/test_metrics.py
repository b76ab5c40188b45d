"""What a person watches while a job works is beside the artifact, published as it grows, and says how fast it is."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from firm import metrics
from firm.chat.messages import RequestFailed
from firm.chat.traffic import TRAFFIC, counted
from firm.images import encode_image
from firm.metrics import SHOWN, SIDE, Board
from firm.pace import Pace
from firm.storage.artifacts import BOARD, WORK, Output


class Watched(Output):
    """An output that notes what is published."""

    def publish(self, *names: str) -> None:
        super().publish(*names)
        self.__dict__.setdefault("asked", []).extend(names)


def read(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / BOARD))
    found.Reload()
    return found


def test_a_board_grows_beside_the_artifact_and_stays(tmp_path: Path) -> None:
    out = Output.open(str(tmp_path / "rl-0123"))
    (out.folder / "metrics.jsonl").write_text("")
    (out.folder / WORK).mkdir()
    board = Board(out, 0)
    board.write(1, {"reward": 0.5, "loss": None})
    board.show(1, "audit", [encode_image(Image.new("RGB", (300, 300), "red"))] * (SHOWN + 3))
    board.show(1, "audit", [])
    board.close()
    assert out.files() == ["metrics.jsonl"]
    out.commit("rl", "key", {}, {}, out.files())
    out.discard(WORK)
    found = read(out.folder)
    assert found.Scalars("reward")[0].value == 0.5 and "loss" not in found.Tags()["scalars"]
    [grid] = found.Images("audit")
    assert grid.width * grid.height == SHOWN * SIDE**2


def test_it_is_published_while_it_grows_but_not_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Watched.open(str(tmp_path / "out"))
    board = Board(out, 0)
    board.write(1, {"x": 1})
    assert not vars(out).get("asked")
    monkeypatch.setattr(metrics, "PUBLISH_EVERY_S", 0)
    board.write(2, {"x": 2})
    assert vars(out)["asked"] == [BOARD] and len(read(out.folder).Scalars("x")) == 2
    monkeypatch.undo()
    board.write(3, {"x": 3})
    board.close()
    assert vars(out)["asked"] == [BOARD] * 2


def test_a_job_that_takes_over_on_another_machine_goes_on_with_the_board_but_who_reads_gets_none(
    tmp_path: Path,
) -> None:
    out = Output.open(str(tmp_path / "out"))
    for keep, steps in ((0, (1, 2, 3)), (3, (3, 4))):
        board = Board(out, keep)
        for step in steps:
            board.write(step, {"x": keep + step})
        board.close()
        time.sleep(1)  # their files have the second in their names
    assert [(event.step, event.value) for event in read(out.folder).Scalars("x")] == [(1, 1), (2, 2), (3, 6), (4, 7)]


def test_pace_has_the_seconds_of_each_part_and_begins_again() -> None:
    pace = Pace()
    for _ in range(2):
        with pace.part("sampling"):
            time.sleep(0.02)
    with pytest.raises(KeyError), pace.part("judging"):
        raise KeyError
    held = np.ones(10**7)
    found = pace.take(images=8)
    assert 0.04 <= found["seconds/sampling"] < 1 and found["seconds/judging"] < 0.1
    assert found["images_a_second"] == pytest.approx(8 / (found["seconds/sampling"] + found["seconds/judging"]))
    assert found["memory/process_gb"] > held.nbytes / 1e9
    assert not [name for name in pace.take() if name.startswith("seconds")]


class Client:
    name = "critic"

    @counted
    def complete(self, seconds: float) -> str:
        if seconds < 0:
            raise RequestFailed("no")
        time.sleep(seconds)
        return "yes"


def test_requests_are_counted_with_their_seconds_and_failures() -> None:
    TRAFFIC.take()
    client: Any = Client()
    for seconds in (0.0, 0.01, 0.05):
        assert client.complete(seconds) == "yes"
    with pytest.raises(RequestFailed):
        client.complete(-1)
    found = TRAFFIC.take()
    assert (found["requests/critic"], found["requests/critic/failed"]) == (4, 1)
    assert found["requests/critic/seconds_median"] < 0.05 <= found["requests/critic/seconds_longest"]
    assert TRAFFIC.take() == {}
