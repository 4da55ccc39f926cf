"""The speed of a disk: which number of reads at a time is measured, and chosen."""

from __future__ import annotations

import threading

import pytest

from tests.support.direct_io_cases import SIZE
from tpimpi.system.buffers import PAGE_BYTES, Bytes, aligned_buffer
from tpimpi.system.direct_io import (
    DEPTHS,
    READ_BYTES,
    TRIAL_BUFFER_BYTES,
    Descriptor,
    Extent,
    Trial,
    pieces,
)

pytestmark = pytest.mark.alone


class _Disk:
    """Stands for a Descriptor: notes what is read, and fails if told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.seen: list[Extent] = []
        self.error = error

    def read(self, piece: Extent, buffer: Bytes) -> None:
        if self.error is not None:
            raise self.error
        assert piece.stop <= len(buffer)
        self.seen.append(piece)


def test_a_speed_is_measured(file: Descriptor) -> None:
    trial, buffer = Trial(file, [Extent(0, 0, SIZE)]), aligned_buffer(TRIAL_BUFFER_BYTES)
    assert trial.depth(buffer) in DEPTHS
    for depth in (1, *DEPTHS):
        assert 0 < trial.rate(buffer, depth, 0.005) < 1e13


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({4: 100, 8: 100}, 4),
        ({4: 89, 8: 100}, 8),
        ({4: 90, 8: 100}, 4),
        ({4: 100, 8: 10}, 4),
    ],
)
def test_the_fewest_reads_that_are_nearly_the_best(monkeypatch, rates: dict[int, float], chosen: int) -> None:
    trial = Trial(_Disk(), [Extent(0, 0, SIZE)])  # type: ignore[arg-type]
    monkeypatch.setattr(trial, "rate", lambda buffer, depth, seconds: rates[depth])
    assert trial.depth(aligned_buffer(TRIAL_BUFFER_BYTES)) == chosen


@pytest.mark.parametrize(("slots", "reads"), [(0, 4), (3, 4), (4, 4), (7, 4), (8, 8), (9, 8)])
def test_no_more_reads_are_tried_than_the_buffer_has_room_for(monkeypatch, slots: int, reads: int) -> None:
    trial = Trial(_Disk(), [Extent(0, 0, SIZE)])  # type: ignore[arg-type]
    monkeypatch.setattr(trial, "rate", lambda buffer, depth, seconds: float(depth))
    assert trial.depth(aligned_buffer(slots * READ_BYTES + PAGE_BYTES)) == reads


@pytest.mark.parametrize(
    ("extents", "sizes"),
    [
        ([Extent(0, 0, PAGE_BYTES)], {PAGE_BYTES}),  # a tiny tile, again and again
        ([Extent(n * PAGE_BYTES, 0, 100 + n) for n in range(20)], set(range(100, 120))),
        (
            [Extent(0, 0, READ_BYTES), Extent(READ_BYTES, 0, 10)],
            {READ_BYTES},
        ),  # what is small beside the largest says nothing
        ([Extent(PAGE_BYTES, 0, 5 * READ_BYTES + 10)], {READ_BYTES}),
    ],
)
def test_what_is_tried_lies_where_there_is_something(extents: list[Extent], sizes: set[int]) -> None:
    disk = _Disk()
    trial = Trial(disk, extents)  # type: ignore[arg-type]
    for depth in DEPTHS:
        assert trial.rate(aligned_buffer(TRIAL_BUFFER_BYTES), depth, 0.002) > 0
    assert {piece.start for piece in disk.seen} == {slot * READ_BYTES for slot in range(max(DEPTHS))}
    assert {piece.stop - piece.start for piece in disk.seen} <= sizes
    places = {(piece.offset, piece.stop - piece.start) for piece in pieces(extents)}
    assert {(piece.offset, piece.stop - piece.start) for piece in disk.seen} <= places


def test_each_read_is_of_another_place() -> None:
    disk = _Disk()
    trial = Trial(disk, [Extent(0, 0, 10 * READ_BYTES)])  # type: ignore[arg-type]
    while len(disk.seen) < 20:
        trial.rate(aligned_buffer(READ_BYTES), 1, 0.0)
    turns = [piece.offset // READ_BYTES for piece in disk.seen[:20]]
    assert turns == [(turns[0] + number) % 10 for number in range(20)]


def test_nothing_to_measure() -> None:
    trial = Trial(_Disk(), [])  # type: ignore[arg-type]
    assert trial.rate(aligned_buffer(TRIAL_BUFFER_BYTES), 4, 60.0) == 0.0
    assert trial.depth(aligned_buffer(TRIAL_BUFFER_BYTES)) in (1, *DEPTHS)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), EOFError("it ends at byte 7")])
def test_what_a_trial_raises_is_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        Trial(_Disk(error), [Extent(0, 0, SIZE)]).depth(aligned_buffer(TRIAL_BUFFER_BYTES))  # type: ignore[arg-type]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tpimpi-disk")]
