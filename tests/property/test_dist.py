"""Plans of batches and seeds of draws."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shared import CPU

from firm.dist import BatchPlan, Ranks, gather, generator, start
from firm.records import UserError
from firm.seeds import seed_for

WORDS = st.text("abcdefghij", min_size=1, max_size=5)
PURPOSES = st.lists(WORDS | st.integers(-5, 500), max_size=4).map(tuple)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 8))
def test_the_ranks_share_all_groups_exactly_once_and_evenly(share: int, size: int, group_size: int) -> None:
    plans = [BatchPlan.of(share * size, group_size, Ranks(rank, size, CPU)) for rank in range(size)]
    assert [g for plan in plans for g in plan.groups] == list(range(share * size))
    assert {len(plan.groups) for plan in plans} == {share} and {p.group_size for p in plans} == {group_size}


@given(st.integers(1, 50), st.integers(2, 12))
def test_an_uneven_split_is_refused(groups: int, size: int) -> None:
    if groups % size == 0:
        BatchPlan.of(groups, 2, Ranks(0, size, CPU))
        return
    with pytest.raises(UserError, match="evenly") as caught:
        BatchPlan.of(groups, 2, Ranks(0, size, CPU))
    assert caught.value.exit_code == 2 and "rl.prompts_per_epoch" in str(caught.value)


@given(st.integers(0, 50), st.integers(1, 12))
def test_shares_are_everything_once_in_order_and_even(number: int, size: int) -> None:
    shares = [Ranks(rank, size, CPU).share(number) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(number))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(PURPOSES, PURPOSES, st.integers(0, 9), st.integers(0, 9))
def test_seeds_differ_by_seed_and_purpose(a: tuple[str | int, ...], b: tuple[str | int, ...], x: int, y: int) -> None:
    assert 0 <= seed_for(x, *a) < 2**63
    same = (x, a) == (y, b)
    assert (seed_for(x, *a) == seed_for(y, *b)) is same


def test_seeds_do_not_change_between_processes_or_versions() -> None:
    assert seed_for(0, "noise", 3, 1) == 5686057590840057257
    code = "from firm.seeds import seed_for; print(seed_for(0, 'noise', 3, 1))"
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(again.stdout) == seed_for(0, "noise", 3, 1)


def test_generators_do_not_touch_global_randomness() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn = torch.rand(3, generator=generator(0, "x"))
    assert torch.equal(torch.rand(3), expected) and torch.equal(drawn, torch.rand(3, generator=generator(0, "x")))


def test_a_process_alone_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    ranks = start()
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    items = [1, 2]
    assert gather(items, ranks) == items and gather(items, ranks) is not items
