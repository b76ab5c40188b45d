"""A server that answers nobody: for how long it has, and whether that is too long."""

from __future__ import annotations

import math
import threading
import time

from firm.records import UserError


class Silence:
    """For how long a server has answered nobody who asked.

    Args:
        patience_s: After so many seconds it is given up; None: never.
        url: Its address.
    """

    def __init__(self, patience_s: float | None, url: str) -> None:
        self._patience_s = patience_s
        self._url = url
        self._lock = threading.Lock()
        self._answered = -math.inf
        self._since: float | None = None

    def end(self) -> None:
        """Note an answer."""
        with self._lock:
            self._answered, self._since = time.monotonic(), None

    def lasts(self, began: float, detail: str) -> bool:
        """Note a request that began then and has no answer; returns whether nobody has had one since.

        Raises:
            UserError: Nobody has had one for too long.
        """
        with self._lock:
            if self._patience_s is None or self._answered > began:
                return False
            self._since = began if self._since is None else self._since
            silent_s = time.monotonic() - self._since
        if silent_s > self._patience_s:
            what = f"the endpoint has answered nobody for {silent_s:.0f} s: {detail}"
            fix = "start the server again, then run the same command again to resume"
            raise UserError(what, self._url, fix)
        return True
