"""Whose turn it is: requests of many clients wait for a few places at work.

The next place goes to the client whose answers have cost least, so who asks much, or for what takes long, waits for
itself. What one costs is multiplied by what the client's answers cost on average: of equal shares of the time, a few
long answers among many short ones would make those who wait for a short one mostly wait for a long one. A newcomer
starts where the client stands that was served last.

When there is no room for another request, the newest of the client that holds most gives way.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from firm.chat.protocol import Refused

DELAY_S = 0.05
"""By how much each answer that was no work delays the next request of its client: 20 a second are sustained."""
MAX_DELAY_S = 2.0
MAX_ASIDE = 8
"""Requests of a client that go on for long beside the work of others; until one ends, the client has no more turns."""
MAX_RETRY_S = 30
MAX_KNOWN = 1000
"""Clients to remember before those that are like newcomers are forgotten."""
PART = 4
"""A client has at most one of so many places at work, even where nobody waits for them."""


@dataclass(eq=False)
class Place:
    """A request on its way to an answer.

    Attributes:
        client: Who asks.
        size: Bytes that it holds.
        lose: Called when it has to give way, with the reason.
        since: When it came.
        turn: Done when its work may begin; None until it waits for that.
        began: Whether its work has.
        aside: Its work is not in the way of others.
    """

    client: Client
    size: int
    lose: Callable[[Refused], None]
    since: float = field(default_factory=time.monotonic)
    turn: asyncio.Future[None] | None = None
    began: bool = False
    aside: bool = False

    @property
    def waits(self) -> bool:
        """Whether nothing is missing but its turn."""
        return self.turn is not None and not self.turn.done()


@dataclass(eq=False)
class Client:
    """What is known of a client.

    Attributes:
        spent: What its answers have cost so far, in square seconds.
        expected_s: What one costs, about; 0 for a newcomer.
        places: Its requests that have no answer yet, oldest first.
        free_at: When its next request is looked at.
    """

    spent: float
    expected_s: float = 0.0
    places: list[Place] = field(default_factory=list)
    free_at: float = 0.0

    def next(self, most: float) -> Place | None:
        """The one that may have a turn; None also where as many as may be are at work or aside."""
        at_work = sum(place.began and not place.aside for place in self.places)
        if at_work >= most or sum(place.aside for place in self.places) >= MAX_ASIDE:
            return None
        return next((place for place in self.places if place.waits), None)

    def standing(self) -> float:
        """What it has spent, with what is expected of those that have begun."""
        return self.spent + sum(place.began for place in self.places) * self.expected_s**2


class Turns:
    """Gives turns; for one event loop.

    Args:
        at_once: Requests at work at the same time.
        max_waiting: Further requests.
        max_bytes: Sum of the sizes of all.
    """

    def __init__(self, at_once: int, max_waiting: int, max_bytes: int) -> None:
        self._most = max(1, at_once // PART)
        self._free = at_once
        self._max_waiting = max_waiting
        self._max_bytes = max_bytes
        self._clients: dict[str, Client] = {}
        self._reached = 0.0  # what the client that got the last turn had spent
        self._waited_s = 0.0

    def waiting(self) -> int:
        """How many requests have not begun, or do not hinder others to."""
        return sum(not place.began or place.aside for place in self._places())

    async def keep_pace(self, name: str) -> None:
        """Wait until the client may be looked at; see `delay`."""
        client = self._clients.get(name)
        if client and (left := client.free_at - time.monotonic()) > 0:
            await asyncio.sleep(left)

    def delay(self, name: str) -> None:
        """Note an answer that was no work, such as a refusal: a flood of these takes the time of all others."""
        client, now = self._client(name), time.monotonic()
        client.free_at = min(max(client.free_at, now) + DELAY_S, now + MAX_DELAY_S)

    def enter(self, name: str, size: int, lose: Callable[[Refused], None]) -> Place:
        """A place for a request of the client.

        Raises:
            Refused: There is no room, and no other client holds more (429, with Retry-After).
        """
        client = self._client(name)
        place = Place(client, size, lose)
        client.places.append(place)
        while self.waiting() > self._max_waiting or self._held() > self._max_bytes:
            heaviest = max(self._clients.values(), key=lambda c: (self._share(c), c is client))
            loser = next((p for p in reversed(heaviest.places) if not p.began), place)
            self.leave(loser)
            full = self._full()
            if loser is place:
                raise full
            loser.lose(full)
        return place

    async def wait(self, place: Place) -> None:
        """Return when it is the place's turn."""
        place.turn = asyncio.get_running_loop().create_future()
        self._give()
        try:
            await place.turn
        except asyncio.CancelledError:
            if place.began:
                self.end(place, place.client.expected_s)
            raise

    def leave(self, place: Place) -> None:
        """Free a place whose work has not begun; nothing happens to another."""
        if place in place.client.places and not place.began:
            place.client.places.remove(place)

    def end(self, place: Place, cost_s: float) -> None:
        """Free the place of ended work, which has cost so much."""
        client = place.client
        client.places.remove(place)
        client.expected_s += 0.1 * (cost_s - client.expected_s) if client.expected_s else cost_s
        client.spent += cost_s * client.expected_s
        self._free += not place.aside
        self._give()

    def step_aside(self, place: Place, cost_s: float) -> None:
        """Others may work as well while this one, which has cost so much already, goes on."""
        if place in place.client.places and place.began and not place.aside:
            place.aside = True
            place.client.expected_s = max(place.client.expected_s, cost_s)
            self._free += 1
            self._give()

    def _full(self) -> Refused:
        seconds = str(min(max(math.ceil(self._waited_s), 1), MAX_RETRY_S))
        return Refused(429, f"the server is full; ask again in {seconds} s", {"Retry-After": seconds})

    def _give(self) -> None:
        """Give the free places at work."""
        while self._free and (ready := [p for c in self._clients.values() if (p := c.next(self._most))]):
            place = min(ready, key=lambda p: p.client.standing())
            client = place.client
            assert place.turn
            place.turn.set_result(None)
            place.began = True
            self._free -= 1
            self._waited_s = time.monotonic() - place.since
            self._reached = max(self._reached, client.spent)

    def _client(self, name: str) -> Client:
        if len(self._clients) > MAX_KNOWN:
            self._forget()
        client = self._clients.setdefault(name, Client(self._reached))
        if not client.places:
            client.spent = max(client.spent, self._reached)
        return client

    def _forget(self) -> None:
        now = time.monotonic()
        for name, client in list(self._clients.items()):
            if not client.places and client.spent <= self._reached and client.free_at <= now:
                del self._clients[name]

    def _places(self) -> list[Place]:
        return [place for client in self._clients.values() for place in client.places]

    def _held(self) -> int:
        return sum(place.size for place in self._places())

    def _share(self, client: Client) -> float:
        """The part of what there is that a client holds: of the requests or of the bytes, whichever is more."""
        count = sum(not place.began or place.aside for place in client.places)
        return max(count / self._max_waiting, sum(place.size for place in client.places) / self._max_bytes)
