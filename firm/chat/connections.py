"""The connections of a server: how many there may be, how long they may take, and how fast they may send."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, cast

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from firm.config.serve import ServerLimits

BYTES_PER_S = 50e6
MIN_WAIT_S = 0.01


class Connections:
    """All open connections. When there is one too many, the newest one of the address that has most is closed.

    Args:
        limits: How many there may be, in all and from one address.
    """

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._open: dict[_Connection, str] = {}  # addresses, in the order in which they came
        self._owed: dict[_Connection, Any] = {}
        self._busy_until: dict[str, float] = {}

    def protocol(self, **options: Any) -> asyncio.Protocol:
        """What uvicorn runs a new connection with."""
        return _Connection(self, **options)

    def enter(self, connection: _Connection) -> None:
        """Note a new connection."""
        self._open[connection] = connection.address
        [(address, count)] = Counter(self._open.values()).most_common(1)
        if count > self._limits.max_client_connections or len(self._open) > self._limits.max_connections:
            newest = next(c for c in reversed(self._open) if self._open[c] == address)
            self.leave(newest)
            newest.transport.abort()

    def leave(self, connection: _Connection) -> None:
        """Note the end of a connection."""
        self._open.pop(connection, None)

    def receive(self, address: str, size: int) -> float:
        """Note bytes from an address; returns the seconds for which it should send no more.

        What is sent is read at up to `BYTES_PER_S`, shared alike by those who send: reading takes time from all others.
        """
        now = time.monotonic()
        self._busy_until = {a: until for a, until in self._busy_until.items() if until > now or a == address}
        until = max(self._busy_until.get(address, 0.0), now) + size * len(self._busy_until | {address: 0}) / BYTES_PER_S
        self._busy_until[address] = until
        return until - now

    async def drop_stalled(self) -> None:
        """Close those that still owe what they owed the last time: a request, its rest, or reading the answer."""
        before, self._owed = self._owed, {}
        for connection in self._open:
            cycle = connection.cycle
            if cycle is None or cycle.more_body or cycle.response_complete or connection.flow.write_paused:
                self._owed[connection] = cycle and (cycle, cycle.more_body, cycle.response_complete)
                if connection in before and before[connection] == self._owed[connection]:
                    connection.transport.abort()


class _Connection(H11Protocol):
    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections

    @property
    def address(self) -> str:
        return self.client[0] if self.client else ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._connections.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._connections.leave(self)

    def data_received(self, data: bytes) -> None:
        wait_s = self._connections.receive(self.address, len(data))
        if wait_s > MIN_WAIT_S:
            cast(_Flow, self.flow).hold()
            self.loop.call_later(wait_s, cast(_Flow, self.flow).release)
        super().data_received(data)


class _Flow(FlowControl):
    """Reads only when both uvicorn and the sharing of what is sent allow it."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._held = False

    def pause_reading(self) -> None:
        self.read_paused = True
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self.read_paused = False
        if not self._held:
            self._transport.resume_reading()

    def hold(self) -> None:
        self._held = True
        self._transport.pause_reading()

    def release(self) -> None:
        self._held = False
        if not self.read_paused:
            self._transport.resume_reading()
