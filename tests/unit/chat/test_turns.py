"""Turns: shared alike by what answers cost, and who gives way where there is no room."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firm.chat.protocol import Refused
from firm.chat.turns import Place, Turns

HUGE = 2**40


def plain(turns: Turns, name: str, size: int = 1) -> Place:
    return turns.enter(name, size, lambda _: None)


def run(work: Callable[[], Coroutine[None, None, object]]) -> None:
    asyncio.run(work())


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def served(turns: Turns, costs: dict[str, float], many: int, end: int) -> Counter[str]:
    """How many of the first ``end`` turns each client gets, each with ``many`` requests and answers of its own cost."""
    order: list[str] = []

    async def ask(name: str) -> None:
        place = plain(turns, name)
        await turns.wait(place)
        order.append(name)
        await asyncio.sleep(0)
        turns.end(place, costs[name])

    await asyncio.gather(*(ask(name) for name in costs for _ in range(many)))
    return Counter(order[:end])


def test_who_asks_more_gets_no_more() -> None:
    async def work() -> None:
        turns = Turns(8, 1000, HUGE)
        busy = asyncio.ensure_future(served(turns, {"busy": 1.0}, 300, 300))
        found = await served(turns, {"a": 1.0, "b": 1.0}, 20, 40)
        assert found == {"a": 20, "b": 20} and 18 <= turns._clients["busy"].spent <= 24
        await busy

    run(work)


def test_answers_that_cost_ten_times_as_much_are_one_in_a_hundred() -> None:
    async def work() -> None:
        found = await served(Turns(1, 1000, HUGE), {"cheap": 1.0, "dear": 10.0}, 300, 300)
        assert 2 <= found["dear"] <= 5

    run(work)


def test_one_bad_moment_does_not_count_for_long() -> None:
    async def work() -> None:
        turns = Turns(1, 1000, HUGE)
        await served(turns, {"unlucky": 1.0, "other": 1.0}, 20, 40)
        await served(turns, {"unlucky": 30.0}, 1, 1)
        found = await served(turns, {"unlucky": 1.0, "other": 1.0}, 300, 300)
        assert found["unlucky"] >= 50

    run(work)


def test_a_client_leaves_places_free_though_nobody_else_wants_them() -> None:
    async def work() -> None:
        turns = Turns(8, 100, HUGE)
        waiting = [asyncio.ensure_future(turns.wait(plain(turns, "greedy"))) for _ in range(9)]
        await settled()
        assert sum(task.done() for task in waiting) == 2
        await turns.wait(plain(turns, "modest"))  # at once
        for task in waiting:
            task.cancel()

    run(work)


def test_what_takes_long_makes_room_but_only_for_so_many_of_a_client() -> None:
    async def work() -> None:
        turns = Turns(4, 100, HUGE)
        places = [plain(turns, "long") for _ in range(20)]
        waiting = [asyncio.ensure_future(turns.wait(place)) for place in places]
        await settled()
        for number in range(8):
            assert [place.began for place in places].index(False) == number + 1
            turns.step_aside(places[number], 9.0)
            turns.step_aside(places[number], 9.0)  # no second room for it
            await settled()
        assert sum(place.began for place in places) == 8 and turns._free == 4
        turns.end(places[0], 99.0)
        await settled()
        assert sum(place.began for place in places) == 9 and turns._free == 3
        turns.step_aside(plain(turns, "waits"), 1.0)  # which has not begun
        assert turns._free == 3 and places[1].client.standing() > 99
        for task in waiting:
            task.cancel()

    run(work)


def test_a_newcomer_starts_with_the_others() -> None:
    async def work() -> None:
        turns = Turns(1, 1000, HUGE)
        await served(turns, {"old": 1.0}, 50, 50)
        found = await served(turns, {"old": 1.0, "new": 1.0}, 50, 50)
        assert 20 <= found["new"] <= 30

    run(work)


def test_where_there_is_no_room_the_newest_of_the_greediest_gives_way() -> None:
    async def work() -> None:
        turns, lost = Turns(0, 4, HUGE), list[int]()
        for number in range(4):
            turns.enter("greedy", 1, lambda reason, number=number: lost.append(number))  # type: ignore[misc]
        with pytest.raises(Refused, match="ask again in 1 s") as refused:
            plain(turns, "greedy")
        assert refused.value.status == 429 and refused.value.headers == {"Retry-After": "1"}
        modest = [plain(turns, "modest") for _ in range(2)]
        assert lost == [3, 2] and turns.waiting() == 4
        with pytest.raises(Refused):
            plain(turns, "modest")
        turns.leave(modest[0])
        plain(turns, "third")
        assert lost == [3, 2]

    run(work)


def test_bytes_are_shared_as_requests_are() -> None:
    async def work() -> None:
        turns, lost = Turns(0, 100, 10), list[str]()
        turns.enter("greedy", 9, lambda reason: lost.append("greedy"))
        plain(turns, "modest", 1)
        assert not lost
        plain(turns, "modest", 1)
        assert lost == ["greedy"]

    run(work)


def test_work_does_not_give_way_and_its_end_is_the_next_ones_turn() -> None:
    async def work() -> None:
        turns = Turns(1, 9, 10)
        first, second = plain(turns, "a", 9), plain(turns, "a", 1)
        await turns.wait(first)
        third = plain(turns, "b", 1)
        assert first.client.places == [first] and second.turn is None
        waiting = asyncio.ensure_future(turns.wait(third))
        await settled()
        assert not waiting.done() and turns.waiting() == 1
        turns.end(first, 1.0)
        await settled()
        assert waiting.done() and third.began

    run(work)


def test_a_turn_that_nobody_takes_is_given_to_the_next() -> None:
    async def work() -> None:
        turns = Turns(1, 9, HUGE)
        first, second, third = (plain(turns, name) for name in "abc")
        await turns.wait(first)
        tasks = [asyncio.ensure_future(turns.wait(place)) for place in (second, third)]
        await settled()
        turns.end(first, 1.0)  # the second's turn, but it leaves in the same moment
        tasks[0].cancel()
        await settled()
        assert tasks[0].cancelled() and tasks[1].done() and third.began

    run(work)


def test_floods_of_refusals_are_slowed_down_and_nobody_else_is() -> None:
    async def work() -> None:
        turns = Turns(1, 9, HUGE)
        loop = asyncio.get_running_loop()

        async def took(name: str, act: Callable[[str], Awaitable[None]]) -> float:
            start = loop.time()
            await act(name)
            return loop.time() - start

        assert await took("any", turns.keep_pace) < 0.04
        for _ in range(3):
            turns.delay("flood")
        assert await took("flood", turns.keep_pace) > 0.1 and await took("other", turns.keep_pace) < 0.04

    run(work)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abc"), st.integers(1, 4), st.sampled_from(["enter", "enter", "leave", "end", "aside"])
        )
    )
)
def test_there_is_never_more_than_there_may_be(events: list[tuple[str, int, str]]) -> None:
    async def work() -> None:
        turns, tasks, places = Turns(2, 5, 12), list[asyncio.Future[None]](), list[Place]()
        for name, size, event in events:
            if event == "enter":
                try:
                    places.append(turns.enter(name, size, lambda _: None))
                except Refused:
                    continue
                tasks.append(asyncio.ensure_future(turns.wait(places[-1])))
            for place in [p for p in places if p.client is turns._clients.get(name)][:1]:
                if event == "aside":
                    turns.step_aside(place, size)
                if event == "leave":
                    turns.leave(place)
                if event == "end" and place.began and place in place.client.places:
                    turns.end(place, size)
            await asyncio.sleep(0)
            held = turns._places()
            assert turns.waiting() <= 5 and sum(p.size for p in held) <= 12
            assert sum(p.began and not p.aside for p in held) + turns._free == 2
            assert turns._free == 0 or not any(c.next(1) for c in turns._clients.values())
        for task in tasks:
            task.cancel()

    run(work)


def test_clients_that_are_like_newcomers_are_forgotten() -> None:
    async def work() -> None:
        turns = Turns(1, 9, HUGE)
        for number in range(3000):
            turns.leave(plain(turns, f"client {number}"))
        assert len(turns._clients) <= 1001

    run(work)
