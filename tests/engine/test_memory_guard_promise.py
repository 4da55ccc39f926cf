"""The memory guard within a promised size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.memory_guard_cases import BASE, CALM, Case
from tpimpi.engine.budget import RESERVE_BYTES

pytestmark = pytest.mark.alone


def test_what_is_over_the_promise_is_given_back_at_once(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 200)
    guard.look(0.0)
    assert c.pinned == [200], "just within it"
    c.others = 1
    guard.look(0.05)
    assert c.pinned == [190], "a tile, as no less can be given back"
    c.others = 75
    guard.look(0.1)
    assert c.pinned == [120]
    c.others = 10_000
    guard.look(0.15)
    assert c.pinned == c.wanted == [0]
    guard.look(0.2)
    assert c.pinned == [0], "no more than all"


def test_it_is_taken_again_only_when_there_has_been_room_for_a_while(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 200)
    c.others = 100
    guard.look(0.0)
    assert c.wanted == [100]
    c.others = 0
    for now in (10.0, 10.5, 10.0 + CALM - 0.01):
        guard.look(now)
        assert c.wanted == [100], now
    guard.look(10.0 + CALM)
    assert c.wanted == [200] and c.pinned == [100], "which the readers will read"


def test_a_squeeze_in_between_begins_the_wait_anew(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 200)
    c.others = 100
    guard.look(0.0)
    c.others = 0
    guard.look(10.0)
    c.others = 150  # more than there is
    guard.look(11.0)
    assert c.wanted == [50]
    c.others = 0
    for now in (12.0, 12.0 + CALM - 0.01):
        guard.look(now)
        assert c.wanted == [50]
    guard.look(12.0 + CALM)
    assert c.wanted == [200]


def test_what_is_on_its_way_is_counted(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 200)
    c.others = 200
    guard.look(0.0)
    assert c.wanted == [0]
    c.others = 120
    guard.look(10.0)
    guard.look(10.0 + CALM)
    assert c.wanted == [80], "all the room that there is"
    for now in range(20, 30):  # nothing has been read yet, so the room is still there, but it is promised already
        guard.look(float(now))
        assert c.wanted == [80]
    c.read()
    c.others = 0
    guard.look(40.0)
    guard.look(40.0 + CALM)
    assert c.wanted == [200]


def test_small_amounts_of_room_are_not_worth_the_reading(case: Callable[..., Case]) -> None:
    c = case(100)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 1000)
    c.others = 500
    guard.look(0.0)
    c.others = 450  # a tenth of what is missing
    for now in range(1, 20):
        guard.look(float(now))
    assert c.wanted == [500]


def test_never_more_than_is_planned(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + 10**6)
    guard.limit_pinned(135)
    assert c.pinned == c.wanted == [130], "at once"
    for now in range(20):
        guard.look(float(now))
        c.read()
    assert c.wanted == [130]
    guard.limit_pinned(200)
    assert c.wanted == [130], "more is taken only when there has been room"
    guard.look(30.0)
    guard.look(30.0 + CALM)
    assert c.wanted == [200]
    guard.limit_pinned(0)
    assert c.pinned == [0]


def test_windows_share_by_their_size(case: Callable[..., Case]) -> None:
    c = case(30, 10)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 400)
    c.others = 200
    guard.look(0.0)
    assert c.pinned == [150, 50]
    guard.limit_pinned(40)
    assert c.pinned == [30, 10]


def test_without_a_promise_nothing_is_given_back(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=None)
    c.others, c.free = 10**12, -(10**12)
    for now in range(10):
        guard.look(float(now))
    assert c.pinned == [200]


@examples(100)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=2),
    st.lists(st.tuples(st.integers(0, 700), st.booleans(), st.one_of(st.none(), st.integers(0, 700))), max_size=60),
)
def test_whatever_happens_it_stays_within_promise_and_plan(tiles: list[int], steps) -> None:
    with pytest.MonkeyPatch.context() as patch:
        c = Case(patch, *tiles)
        guard = c.keep(promise=RESERVE_BYTES + BASE + 500)
        try:
            plan = sum(c.wanted)
            for number, (others, read, most) in enumerate(steps):
                c.others = others
                if most is not None:
                    plan = most
                    guard.limit_pinned(most)
                if read:
                    c.read()
                guard.look(number * 0.7)
                assert c.resident <= BASE + 500 or c.pinned == [0] * len(tiles)
                assert sum(c.wanted) <= plan
        finally:
            guard.close()
