"""What ranks say of their memory, together."""

from __future__ import annotations

from tpimpi.engine.allotment import MemoryAllotment, agreed_page_units, room_lines


def rank(number: int, most: int | None, units: int | None = None) -> MemoryAllotment:
    return MemoryAllotment(number, f"host{number}", 10**9, *[0] * 6, 2, 0.0, 0, True, most, page_units=units)


def test_room_is_that_of_the_rank_that_has_least() -> None:
    said = "room: keys and values of {} positions, if pinned tiles give way"
    assert room_lines([rank(0, None), rank(1, None)]) == []
    assert room_lines([rank(0, 640)]) == [said.format(640)]
    assert room_lines([rank(0, 640), rank(1, None), rank(2, 640)]) == [said.format(640)]
    assert room_lines([rank(0, 640), rank(1, 128)]) == [f"{said.format(128)}, the least on r1 host1"]


def test_pages_are_as_many_as_every_rank_with_heads_has_room_for() -> None:
    assert agreed_page_units([rank(0, 640, 20), rank(1, None), rank(2, 128, 4)]) == 4
    assert agreed_page_units([rank(0, None)]) is None
