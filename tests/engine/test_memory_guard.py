"""The memory guard: gives back at once, takes again after a calm while, and says when the disk keeps a rank waiting."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.memory_guard_cases import BASE, CALM, Case
from tests.support.tiny_models import write_tiny_hf
from tpimpi.engine import memory_guard as keeping
from tpimpi.engine.budget import RESERVE_BYTES
from tpimpi.engine.cycle import records_of
from tpimpi.engine.memory_guard import STALL_REPORT_S, MemoryGuard, MemoryTimeline
from tpimpi.engine.model import block_order
from tpimpi.engine.readers import Readers
from tpimpi.engine.ring import ring_bytes
from tpimpi.engine.window import Window
from tpimpi.models.blocks import Block
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

pytestmark = pytest.mark.alone


# Beside other programs


def test_each_of_several_ranks_gives_its_part(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=None, watched_by=3)
    c.free = 0
    guard.look(0.0)
    assert c.pinned == [200]
    c.free = -100  # a third is 34 bytes
    guard.look(1.0)
    assert c.pinned == [160]
    c.free = 5
    for now in range(2, 10):
        guard.look(float(now))
    assert c.wanted == [160]


def test_no_rank_takes_all_the_room_of_a_host(case: Callable[..., Case]) -> None:
    c = case(100)
    guard = c.keep(promise=None, watched_by=2)
    c.free = -1600
    guard.look(0.0)
    assert c.wanted == [200]
    c.free = 2000  # room for all, but not if the other does the same
    guard.look(10.0)
    guard.look(10.0 + CALM)
    assert c.wanted == [700]


def test_both_bounds_hold(case: Callable[..., Case]) -> None:
    c = case(20)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 150, watched_by=1)
    c.free = 10**9
    guard.look(0.0)
    assert c.pinned == [150]
    c.free = -100
    guard.look(1.0)
    assert c.pinned == [50]


# Over a real window


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SliceFile]:
    model = write_tiny_hf(tmp_path / "model", "llama", num_hidden_layers=6)
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path)
    opened = SliceFile(tmp_path / slice_name(0, 1))
    yield opened
    opened.close()


def _token(window: Window, order: list[Block]) -> None:
    for block in order:
        for tile in window.tiles(block):
            assert tile.record.block == block


def test_a_real_window_gives_back_and_takes_again(file: SliceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    order = block_order(file.header)
    window = Window(file, order, Readers(), ring=ring_bytes(records_of(file, order), 2))
    total, others = window.total_bytes, 0
    monkeypatch.setattr(keeping, "CHECK_INTERVAL_S", threading.TIMEOUT_MAX)
    monkeypatch.setattr(keeping, "resident_bytes", lambda: BASE + others + window.pinned_bytes + window.buffer_bytes)
    guard = MemoryGuard([window], promise=RESERVE_BYTES + BASE + total)
    try:
        _token(window, order)
        guard.look(0.0)
        assert window.pinned_bytes == total
        others = total // 2
        guard.look(1.0)
        assert window.pinned_bytes <= total - others
        _token(window, order)
        guard.look(2.0)
        assert window.pinned_bytes + window.buffer_bytes + others <= total, "the ring counts too"
        others = 10 * total
        guard.look(3.0)
        assert window.pinned_bytes == 0
        for now in range(4, 4 + 3 * int(CALM)):
            _token(window, order)
            guard.look(float(now))
        assert window.pinned_bytes == 0
        others = 0
        for now in range(20, 40):
            guard.look(float(now))
            _token(window, order)
            assert window.pinned_bytes + window.buffer_bytes <= total
        assert window.wanted_bytes > total // 2
        read = window.bytes_read
        _token(window, order)
        assert window.bytes_read < read + total, "some is pinned again"
    finally:
        guard.close()
        window.close()


# The timeline


@pytest.mark.parametrize("count", [1, 400, 401, 402, 1000, 50_000])
def test_a_timeline_is_thinned_evenly(count: int) -> None:
    timeline = MemoryTimeline()
    step = 0.1001
    for number in range(count):
        timeline.add(100 + number * step, number, 2 * number, 3)
    points = timeline.points
    times = [point[0] for point in points]
    assert points[0] == [100.0, 0, 0, 3], "the first is kept"
    assert len(points) <= 401
    assert times == sorted(set(times))
    assert all(point == [point[0], point[1], 2 * point[1], 3] for point in points)
    if count > 1000:
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert len(points) > 190 and max(gaps) < 2.1 * min(gaps)
        assert times[-1] > 100 + (count - 1) * step - 2 * max(gaps), "up to the end"


def test_points_that_are_too_near_are_left_out() -> None:
    timeline = MemoryTimeline()
    for now in (1.0, 1.01, 1.09, 1.11, 1.2, 1.22):
        timeline.add(now, 1, 2, 3)
    assert [point[0] for point in timeline.points] == [1.0, 1.11, 1.22]


def test_a_look_is_noted(case: Callable[..., Case]) -> None:
    c = case(20, 10)
    guard = c.keep(promise=RESERVE_BYTES + BASE + 300)
    guard.look(7.0)
    c.others = 100
    guard.look(8.0)
    assert guard.timeline.points == [[7.0, BASE + 300, 300, 10], [8.0, BASE + 400, 190, 10]]


# Stalls


def _lines(c: Case, now: float) -> list[str]:
    """What the look at that time says."""
    c.lines.clear()
    c.guard.look(now)
    return list(c.lines)


def test_a_stall_is_said_at_5_10_and_20_seconds_once_each(case: Callable[..., Case]) -> None:
    c = case(1)
    c.keep(promise=None)
    assert STALL_REPORT_S == 5.0
    c.windows[0].waiting_since, c.windows[0].waiting_for = 100.0, "layers/0003/mlp/tile-001"
    said = {}
    for tick in range(1, 45 * 20):  # a look every 0.05 s
        if lines := _lines(c, 100 + tick * 0.05):
            said[round(tick * 0.05)] = lines
    name = "layers/0003/mlp/tile-001: slow, not gone"
    assert said == {seconds: [f"waiting for the disk for {seconds} s, for {name}"] for seconds in (5, 10, 20, 40)}
    c.windows[0].waiting_since = None
    assert _lines(c, 150.0) == ["the disk goes on"]
    assert _lines(c, 151.0) == [] and _lines(c, 300.0) == []


def test_short_waits_are_not_said(case: Callable[..., Case]) -> None:
    c = case(1)
    c.keep(promise=None)
    for begin in range(0, 100, 5):
        c.windows[0].waiting_since = begin + 0.01
        assert _lines(c, begin + 4.9) == []
        c.windows[0].waiting_since = None
        assert _lines(c, begin + 4.95) == []


def test_the_next_stall_is_said_anew(case: Callable[..., Case]) -> None:
    c = case(1)
    c.keep(promise=None)
    c.windows[0].waiting_since, c.windows[0].waiting_for = 0.0 + 1e-9, "a"
    assert len(_lines(c, 12.0)) == 1
    c.windows[0].waiting_since, c.windows[0].waiting_for = 13.0, "b"  # it got that one, and waits for another
    assert _lines(c, 13.5) == ["the disk goes on"]
    assert _lines(c, 17.9) == []
    assert _lines(c, 18.1) == ["waiting for the disk for 5 s, for b: slow, not gone"]


def test_the_longest_wait_counts_and_rows_too(case: Callable[..., Case]) -> None:
    c = case(1, 1)
    c.keep(promise=None)
    c.windows[0].waiting_since, c.windows[0].waiting_for = 108.0, "a"
    c.windows[1].waiting_since, c.windows[1].waiting_for = 102.0, "b"
    c.row = (100.0, "a row of the embedding")
    assert _lines(c, 106.0) == ["waiting for the disk for 6 s, for a row of the embedding: slow, not gone"]
    c.row = None
    assert _lines(c, 115.0) == ["waiting for the disk for 13 s, for b: slow, not gone"]


# The thread


def test_it_looks_by_itself_until_it_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()
    monkeypatch.setattr(MemoryGuard, "look", lambda self, now: looked.set())
    guard = MemoryGuard([], promise=None)
    assert looked.wait(60)
    guard.close()
    guard.close()
    looked.clear()
    assert not [thread for thread in threading.enumerate() if thread.name == "tpimpi-memory-guard"]
