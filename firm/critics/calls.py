"""Calls that wait for somebody else, made by threads while the caller goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Calls(Generic[T]):
    """Calls in the order in which they were added: ``with Calls(8) as calls``.

    Leaving the block calls off what has not begun. By an error or a signal it does not wait for what has: to close what
    is called ends that.

    Args:
        at_once: Calls in flight.
    """

    def __init__(self, at_once: int) -> None:
        self._threads = ThreadPoolExecutor(at_once, thread_name_prefix="judge")
        self._made: list[Future[T]] = []

    def add(self, calls: Iterable[Callable[[], T]]) -> None:
        """Have calls made as soon as there are threads for them; raises what an earlier one has raised."""
        self._raise()
        self._made += [self._threads.submit(call) for call in calls]

    def results(self) -> list[T]:
        """Wait for all; raises what one raises as soon as it does, whatever the others do."""
        wait(self._made, return_when=FIRST_EXCEPTION)
        self._raise()
        return [future.result() for future in self._made]

    def _raise(self) -> None:
        for future in self._made:
            if future.done() and (error := future.exception()):
                raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=error is None, cancel_futures=True)
