"""One set of threads reads for the window and the expert cache: what is needed soonest, first."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_models import write_tiny_hf
from tests.support.waiting import until
from tpimpi.engine.cycle import records_of
from tpimpi.engine.eviction import ExpertKey
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.model import block_order
from tpimpi.engine.readers import Read, Readers, Urgency
from tpimpi.engine.ring import ring_bytes
from tpimpi.engine.trace import READ, Recorder, unpack
from tpimpi.engine.window import Window
from tpimpi.errors import StorageError
from tpimpi.models.blocks import Block
from tpimpi.system.buffers import Bytes
from tpimpi.system.direct_io import Extent
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.layout import Record
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.fixture(scope="module")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readers")
    model = write_tiny_hf(folder / "model", "qwen3-moe")  # layers 0 and 2 have experts
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder / "s")
    return folder / "s" / slice_name(1, 2)


class _Disk:
    """A file whose reads wait for `go_on`; `order` has the paths of their tiles, as reads began."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file, self.go_on = SliceFile(path), threading.Event()
        self.order: list[str] = []
        read = self.file.read_piece

        def slow(record: Record, piece: Extent, buffer: Bytes) -> None:
            self.order.append(record.path)
            assert self.go_on.wait(20)
            read(record, piece, buffer)

        monkeypatch.setattr(self.file, "read_piece", slow)

    def begun(self, count: int) -> None:
        """Wait until so many reads have begun."""
        until(lambda: len(self.order) >= count)


@pytest.fixture
def disk(slice_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Disk]:
    disk = _Disk(slice_path, monkeypatch)
    yield disk
    disk.go_on.set()
    disk.file.close()


def _experts(file: SliceFile, readers: Readers, recorder: Recorder | None = None, *, slots: int = 8) -> ExpertCache:
    records = {ExpertKey(record.block.layer, record.expert): record for record in file.records_of("experts")}
    nbytes = slots * max(record.nbytes for record in records.values())
    return ExpertCache(file, records, nbytes=nbytes, readers=readers, recorder=recorder)


def _names(cache: ExpertCache, layer: int, experts: list[int]) -> list[str]:
    return [cache._records[ExpertKey(layer, expert)].path for expert in experts]


def test_chosen_experts_come_before_tiles_of_later_blocks_and_guesses_come_last(disk: _Disk) -> None:
    file, readers = disk.file, Readers(1)
    order = block_order(file.header)
    tiles = [record.path for record in records_of(file, order)]
    window = Window(file, order, readers, pinned_bytes=0, ring=ring_bytes(records_of(file, order), 3))
    cache = _experts(file, readers)
    disk.begun(1)  # the first tile: all that is asked for while it is read waits
    cache.begin(0, [1, 6])
    cache.prefetch(2, [4])
    disk.go_on.set()
    until(lambda: cache.figures.expected == 1)
    chosen, guessed = _names(cache, 0, [1, 6]), _names(cache, 2, [4])
    ahead = len(disk.order) - len(chosen) - len(guessed)
    assert ahead >= 3, "the ring has room for three tiles at least"
    assert disk.order == [tiles[0], *chosen, *tiles[1:ahead], *guessed]
    window.close()
    cache.close()


def test_a_tile_that_the_compute_waits_for_comes_before_chosen_experts(disk: _Disk) -> None:
    """As the shared expert of a block does, which is computed before those that were chosen."""
    file, readers = disk.file, Readers(1)
    order = block_order(file.header)
    tiles = records_of(file, order)
    cache = _experts(file, readers)
    cache.begin(0, [0, 1])
    disk.begun(1)
    window = Window(file, order, readers, pinned_bytes=0, ring=ring_bytes(tiles, 3))
    awaited = next(block for block in order[1:] if window.count(block))
    got: list[str] = []
    compute = threading.Thread(target=lambda: got.append(next(window.tiles(awaited)).record.path))
    compute.start()
    until(lambda: window.waiting_since is not None)
    disk.go_on.set()
    compute.join(20)
    until(lambda: len(disk.order) > 2)
    first = next(record.path for record in tiles if record.block == awaited)
    assert got == [first]
    assert disk.order[:3] == [*_names(cache, 0, [0]), first, *_names(cache, 0, [1])]
    window.close()
    cache.close()


def test_what_nobody_asked_for_is_read_by_all_threads_but_one(disk: _Disk) -> None:
    """So that all experts are soon there, and one that a block chooses does not wait for others."""
    readers = Readers(3)
    cache = _experts(disk.file, readers, slots=len(disk.file.records_of("experts")))
    cache.begin(0, [])
    disk.begun(2)
    time.sleep(0.05)
    assert len(disk.order) == 2
    cache.begin(2, [7])
    disk.begun(3)
    assert disk.order[2:] == _names(cache, 2, [7])
    disk.go_on.set()
    cache.close()


def test_a_slow_disk_makes_one_spare_read_at_a_time() -> None:
    """One that is asked for would share the disk with all that have begun."""
    lock, begun, counts = threading.Lock(), 0, list[int]()

    def read(lane: int) -> None:
        nonlocal begun
        with lock:
            begun += 1
            counts.append(begun)
        time.sleep(0.05 * begun)
        with lock:
            begun -= 1

    class Spare:
        def next_read(self, urgency: Urgency) -> Read | None:
            return read if urgency is Urgency.SPARE and len(counts) < 40 else None

        def fail(self, error: BaseException) -> None: ...

    readers, source = Readers(4), Spare()
    readers.add(source)
    until(lambda: len(counts) >= 12)
    readers.remove(source)
    assert max(counts[6:]) == 1


def test_no_thread_is_seen_to_read_two_things_at_once(slice_path: Path) -> None:
    file, readers, recorder = SliceFile(slice_path), Readers(3), Recorder(5000)
    order = block_order(file.header)
    ring = ring_bytes(records_of(file, order), 3)
    window = Window(file, order, readers, pinned_bytes=0, ring=ring, recorder=recorder)
    cache = _experts(file, readers, recorder, slots=2)
    for _ in range(20):
        for block in order:
            if block in (Block("mlp", 0), Block("mlp", 2)):
                cache.begin(block.layer, list(range(8)))
                assert sum(len(group) for group in cache.tiles()) == 8
            assert len(list(window.tiles(block))) == window.count(block)
    window.close()
    cache.close()
    file.close()
    spans = unpack(recorder.pack())
    for lane in range(3):
        mine = sorted((s["began"], s["ended"]) for s in spans[(spans["kind"] == READ) & (spans["lane"] == lane)])
        assert mine and all(one[1] <= other[0] for one, other in itertools.pairwise(mine))
    assert set(spans["lane"][spans["kind"] == READ].tolist()) == {0, 1, 2}


class _Looks:
    """A source that wants nothing, and counts how often readers looked for work: they ask it about every urgency."""

    def __init__(self) -> None:
        self.count = 0

    def next_read(self, urgency: Urgency) -> Read | None:
        self.count += urgency is Urgency.AWAITED
        return None

    def fail(self, error: BaseException) -> None:
        raise AssertionError from error


def _settled(looks: _Looks) -> int:
    """How often readers looked, once they do no more."""
    count = -1
    while count != looks.count:
        count = looks.count
        time.sleep(0.2)
    return count


def test_readers_are_left_asleep_where_all_is_in_memory(slice_path: Path) -> None:
    """A reader that looks for work takes the interpreter's lock from the compute: for each block that was a quarter of the
    time of a small model."""
    file, readers, looks = SliceFile(slice_path), Readers(2), _Looks()
    readers.add(looks)
    order = block_order(file.header)
    window, cache = Window(file, order, readers), _experts(file, readers)

    def use() -> None:
        for block in order:
            time.sleep(0.0005)  # what computes lets go of the interpreter's lock
            if block in (Block("mlp", 0), Block("mlp", 2)):
                cache.begin(block.layer, [0, 1, 2])
                assert sum(len(group) for group in cache.tiles()) == 3
                cache.prefetch(2, [0, 1, 2])
            assert len(window.pinned_tiles(block) or list(window.tiles(block))) == window.count(block)

    use()
    use()
    before = _settled(looks)
    for _ in range(10):
        use()
    assert _settled(looks) == before
    window.close()
    cache.close()
    readers.remove(looks)
    file.close()


def test_an_error_is_that_of_who_wanted_the_read_and_threads_end_with_the_last_source(
    slice_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, readers = SliceFile(slice_path), Readers(2)
    order = block_order(file.header)
    read = file.read_piece

    def failing(record: Record, piece: Extent, buffer: Bytes) -> None:
        if record.expert == 5:
            raise StorageError("the disk is gone")
        read(record, piece, buffer)

    monkeypatch.setattr(file, "read_piece", failing)
    threads = set(threading.enumerate())
    cache = _experts(file, readers)
    window = Window(file, order, readers, pinned_bytes=0)
    assert len(set(threading.enumerate()) - threads) == 2
    cache.begin(0, [2, 5])
    with pytest.raises(StorageError, match="the disk is gone"):
        list(cache.tiles())
    for block in order * 2:
        assert len(list(window.tiles(block))) == window.count(block)
    cache.close()
    for block in order:
        assert len(list(window.tiles(block))) == window.count(block)
    window.close()
    assert set(threading.enumerate()) <= threads
    file.close()
