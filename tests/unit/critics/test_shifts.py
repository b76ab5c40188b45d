"""Shifts: one thread at a time, short work first, and a part of the time for long work."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from firm.critics.shifts import MIN_LONG_S, SHARE, Shifts


def test_one_works_at_a_time() -> None:
    shifts, at_work, most = Shifts(), [0], [0]

    def work(number: int) -> None:
        for _ in range(20):
            with shifts.behind() if number % 2 else shifts.front():
                at_work[0] += 1
                most[0] = max(most[0], at_work[0])
                time.sleep(0.0005)
                at_work[0] -= 1

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(work, range(6)))
    assert most == [1]


def test_work_behind_gets_its_part_of_the_time_and_all_of_it_when_alone() -> None:
    shifts, over, spent = Shifts(), threading.Event(), {"front": 0.0, "behind": 0.0}

    def some(place: str) -> None:
        start = time.monotonic()
        time.sleep(0.002)
        spent[place] += time.monotonic() - start

    def behind() -> None:
        with shifts.behind() as give_way:
            while not over.is_set():
                some("behind")
                give_way()

    def front() -> None:
        while not over.is_set():
            with shifts.front():
                some("front")

    with ThreadPoolExecutor(3) as executor:
        executor.submit(behind)
        time.sleep(0.3)
        alone = spent["behind"]
        for _ in range(2):  # there is always one in front
            executor.submit(front)
        time.sleep(2)
        over.set()
    part = (spent["behind"] - alone) / (spent["front"] + spent["behind"] - alone)
    assert alone > 0.1 and SHARE / 2 < part < SHARE * 1.5


def test_a_batch_is_too_long_after_some_times_the_usual() -> None:
    shifts = Shifts()
    with shifts.batch() as too_long:
        assert not too_long()
        time.sleep(MIN_LONG_S)
        assert too_long()
    for _ in range(9):
        with shifts.batch():
            time.sleep(MIN_LONG_S / 2)
    with shifts.batch() as too_long:
        time.sleep(MIN_LONG_S * 3)  # before the first token
        assert not too_long()
        time.sleep(MIN_LONG_S * 1.1)
        assert not too_long()
        time.sleep(MIN_LONG_S * 1.5)
        assert too_long()


def test_work_that_fails_ends_its_shift() -> None:
    shifts = Shifts()
    for shift in (shifts.front, shifts.batch, shifts.behind):
        with pytest.raises(ValueError, match="so"), shift():
            raise ValueError("so")
    with shifts.front():
        pass
