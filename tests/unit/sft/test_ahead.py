"""What is prepared ahead of time: the same, in the same order, with its errors, and nothing once it has ended."""

import threading
from collections.abc import Iterator

import pytest

from firm.records import UserError
from firm.sft.ahead import Ahead, one_thread


class Source:
    """Numbers from 0; tells when each is made."""

    def __init__(self, number: int, error: Exception | None = None) -> None:
        self.made = [threading.Event() for _ in range(number)]
        self.threads: list[str] = []
        self.error = error

    def __iter__(self) -> Iterator[int]:
        for i, made in enumerate(self.made):
            self.threads.append(threading.current_thread().name)
            made.set()
            yield i
        if self.error:
            raise self.error


def test_it_is_ahead_by_so_many_and_in_order() -> None:
    source = Source(9)
    with one_thread() as thread:
        ahead = Ahead(iter(source), 2, thread)
        for number in range(7):
            assert next(ahead) == number
            assert source.made[number + 2].wait(30), "prepared before it is asked for"
            assert not source.made[min(number + 3, 8)].is_set() or number == 6, "no more than that"
        assert list(ahead) == [7, 8] and list(ahead) == []
    assert source.threads == [threading.current_thread().name, *["ahead_0"] * 8], "the first by who asks"


def test_an_error_comes_in_its_place() -> None:
    error = UserError("a damaged shard", "here", "restore it", usage=True)
    with one_thread() as thread:
        ahead = Ahead(iter(Source(3, error)), 9, thread)
        assert [next(ahead) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError) as caught:
            next(ahead)
    assert caught.value is error
