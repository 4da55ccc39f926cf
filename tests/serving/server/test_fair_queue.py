"""What waits: each owner gets a share, however much another asks."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tpimpi.serving.server.fair_queue import FairQueue


def test_who_has_fewest_under_way_comes_next() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(10):
        queue.add("many", f"m{number}")
    assert [queue.take(), queue.take()] == ["m0", "m1"]
    queue.add("few", "f0")
    queue.add("few", "f1")
    queue.add("few", "f2")
    assert [queue.take(), queue.take()] == ["f0", "f1"], "has none under way"
    assert queue.take() == "m2", "both have two, and its turn is longer ago"
    queue.remove("many", "m5")
    queue.remove("many", "m0")
    assert queue.take() == "f2", "both have two again"
    assert [queue.take() for _ in range(len(queue))] == ["m3", "m4", "m6", "m7", "m8", "m9"]


@given(asked=st.lists(st.tuples(st.sampled_from("abc"), st.booleans())))
def test_nothing_is_lost_and_nothing_is_left(asked: list[tuple[str, bool]]) -> None:
    queue: FairQueue[int] = FairQueue()
    owners = {number: owner for number, (owner, _) in enumerate(asked)}
    for number, owner in owners.items():
        queue.add(owner, number)
    gone = {number for number, (_, leaves) in enumerate(asked) if leaves}
    for number in gone:
        queue.remove(owners[number], number)
    taken = [queue.take() for _ in range(len(queue))]
    assert Counter(taken) == Counter(owners.keys() - gone)
    for owner in "abc":  # each owner's own in their order
        own = [number for number in taken if owners[number] == owner]
        assert own == sorted(own)
    for number in taken:
        queue.remove(owners[number], number)
    assert vars(queue) == {**vars(FairQueue()), "_turn": len(taken)}
