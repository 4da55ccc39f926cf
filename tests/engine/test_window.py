"""The window: right tiles in the right order, never more memory than it may hold, and no read that is not needed."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.tiny_models import write_tiny_hf
from tpimpi.engine.cycle import records_of
from tpimpi.engine.model import block_order
from tpimpi.engine.pinned_set import pin_order
from tpimpi.engine.readers import DEFAULT_READS, Readers
from tpimpi.engine.ring import Ring, ring_bytes
from tpimpi.engine.window import Window
from tpimpi.errors import InputError, SliceError
from tpimpi.models.blocks import HEAD, Block
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.tile import Tile
from tpimpi.weights.sources import open_source


@pytest.fixture(scope="module")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    model = write_tiny_hf(folder / "model", "llama", num_hidden_layers=6)
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder)
    return folder / slice_name(0, 2)


@pytest.fixture
def file(slice_path: Path) -> Iterator[SliceFile]:
    file = SliceFile(slice_path)
    yield file
    file.close()


def _bytes(tile: Tile) -> bytes:
    return b"".join(array.tobytes() for array in [*tile.parts.values(), *(m.data for m in tile.matrices.values())])


def _expected(file: SliceFile, order: list[Block]) -> dict[str, bytes]:
    return {record.path: _bytes(file.load(record)) for record in records_of(file, order)}


def _token(window: Window, order: list[Block], *, skip_head: bool = False, hold: bool = False) -> dict[str, bytes]:
    seen = {}
    for block in order:
        if block == HEAD and skip_head:
            continue
        held = window.pinned_tiles(block) if hold else None
        if held is not None:
            time.sleep(0.0002)
        for tile in window.tiles(block) if held is None else held:
            seen[tile.record.path] = _bytes(tile)
    return seen


def _sizes(file: SliceFile) -> tuple[int, int]:
    """Bytes of all tiles of the cycle, and of the largest."""
    sizes = [record.nbytes for record in records_of(file, block_order(file.header))]
    return sum(sizes), max(sizes)


BLOCKS = [{"blocks": blocks} for blocks in (2, 3, 4, 12, 13, 100)]
BUDGETS = [
    {"pinned_bytes": pinned, "ring_tiles": tiles, "reads": reads}
    for pinned, tiles, reads in [(0, 1, 1), (0, 2, 2), (0, 5, 4), (0.3, 1, 4), (0.3, 2, 2), (0.9, 2, 1), (1.0, 1, 2)]
]


@pytest.mark.parametrize("memory", [*BLOCKS, *BUDGETS, {}], ids=str)
def test_every_window_gives_the_same_tiles(file: SliceFile, memory: dict[str, float]) -> None:
    order = block_order(file.header)
    expected = _expected(file, order)
    total, _ = _sizes(file)
    options = dict(memory)
    if "pinned_bytes" in options:
        options["pinned_bytes"] = int(options["pinned_bytes"] * total)
        options["ring"] = ring_bytes(records_of(file, order), int(options.pop("ring_tiles")))
    window = Window(file, order, Readers(int(options.pop("reads", DEFAULT_READS))), **options)  # type: ignore[arg-type]
    # The head is passed over while a long prompt is read; the cycle must go on.
    for skip_head in (False, True, True, False, True, False):
        seen = _token(window, order, skip_head=skip_head)
        wanted = {path: data for path, data in expected.items() if not (skip_head and path.startswith("head"))}
        assert seen == wanted
        assert list(seen) == list(wanted)
    window.close()


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_it_never_reads_further_ahead_than_its_blocks(file: SliceFile, blocks: int, monkeypatch) -> None:
    order = block_order(file.header)
    made: list[Window] = []
    furthest: list[int] = []
    turns = {record.path: order.index(record.block) for record in records_of(file, order)}
    begun = dict.fromkeys(turns, 0)
    original = file.read_piece

    def watched(record, piece, buffer):
        turn = begun[record.path] * len(order) + turns[record.path]
        begun[record.path] += 1  # every tile here is one piece
        while not made:
            time.sleep(0.001)
        queue, cycle = made[0]._queue, made[0]._cycle
        turns_of_cycles, index = divmod(queue.turn, cycle.count)
        furthest.append(turn - (turns_of_cycles * len(order) + cycle.block_of[index]))
        return original(record, piece, buffer)

    monkeypatch.setattr(file, "read_piece", watched)
    window = Window(file, order, Readers(1), blocks=blocks)
    made.append(window)
    patience = time.monotonic() + 20
    for _ in range(3):
        for block in order:
            for _ in window.tiles(block):  # as slow as it takes for the reader to get as far as it may
                while max(furthest) < blocks - 1 and time.monotonic() < patience:
                    time.sleep(0.001)
    window.close()
    assert max(furthest) == blocks - 1, "the block in use counts as one"
    assert window.peak_bytes <= window.ring_bytes < _sizes(file)[0]


@pytest.mark.parametrize("blocks", [1, 0, -3])
def test_less_than_two_blocks_are_refused(file: SliceFile, blocks: int) -> None:
    with pytest.raises(InputError, match=f"window is {blocks}, must be at least 2"):
        Window(file, block_order(file.header), Readers(), blocks=blocks)


@pytest.mark.parametrize("memory", [{"blocks": 2}, {"pinned_bytes": 0}, {}], ids=str)
def test_what_reading_raises_is_raised_where_the_tile_is_used(slice_path: Path, tmp_path: Path, memory) -> None:
    whole = SliceFile(slice_path)
    record = next(r for r in whole.records if r.path == "layers/0003/mlp/tile-000")
    offset = whole._offsets[record.path][1] + 5
    whole.close()
    data = bytearray(slice_path.read_bytes())
    data[offset] ^= 0x10
    broken = tmp_path / slice_path.name
    broken.write_bytes(data)
    file = SliceFile(broken)
    window = Window(file, block_order(file.header), Readers(1), **memory)
    seen = []
    with pytest.raises(SliceError, match="layers/0003/mlp/tile-000 does not match its checksum"):
        for block in block_order(file.header):
            for tile in window.tiles(block):
                seen.append(tile.record.path)
    assert seen[-1] == "layers/0003/attn/tile-000"
    window.close()
    file.close()


def test_a_tile_that_goes_bad_later_is_noticed_too(slice_path: Path, tmp_path: Path) -> None:
    path = tmp_path / slice_path.name
    path.write_bytes(slice_path.read_bytes())
    file = SliceFile(path)
    order = block_order(file.header)
    window = Window(file, order, Readers(), pinned_bytes=0, ring=ring_bytes(records_of(file, order), 1))
    _token(window, order)
    record = next(r for r in file.records if r.path == "layers/0004/attn/tile-000")
    with path.open("r+b") as stream:
        stream.seek(file._offsets[record.path][0])
        stream.write(b"other bytes")
    with pytest.raises(SliceError, match="was changed while this run was using it: layers/0004/attn/tile-000"):
        _token(window, order)
    window.close()
    file.close()


@pytest.mark.parametrize("memory", [{"blocks": 2}, {"pinned_bytes": 100_000, "reads": 3}, {}], ids=str)
def test_a_file_that_another_tool_has_compressed_in_part(slice_path: Path, tmp_path: Path, memory) -> None:
    packed = tmp_path / slice_path.name
    with h5py.File(slice_path) as old, h5py.File(packed, "w", libver="latest") as new:

        def copy(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                compress = "mlp" in name and item.size
                new.create_dataset(name, data=item[...], compression="gzip" if compress else None)

        old.visititems(copy)
    whole, file = SliceFile(slice_path), SliceFile(packed)
    order = block_order(file.header)
    memory = dict(memory)
    window = Window(file, order, Readers(int(memory.pop("reads", DEFAULT_READS))), **memory)
    for _ in range(3):
        assert _token(window, order) == _expected(whole, order)
    window.close()
    for opened in (whole, file):
        opened.close()


# Pinning


def test_what_is_pinned_is_read_once(file: SliceFile) -> None:
    order = block_order(file.header)
    total, largest = _sizes(file)
    for part in (0.0, 0.25, 0.5, 0.9, 1.0):
        window = Window(file, order, Readers(), pinned_bytes=int(part * total), ring=largest)
        pinned = window.wanted_bytes
        assert part * total - largest < pinned <= part * total
        assert window.streamed_bytes == total - pinned
        for token in range(4):
            _token(window, order)
            # What was read, less what has been read ahead for the next token.
            least = pinned + (token + 1) * (total - pinned)
            assert least <= window.bytes_read <= least + largest
        assert window.pinned_bytes == pinned
        window.close()
    assert window.bytes_read == total, "all pinned: nothing is read twice"


def test_no_more_memory_is_taken_than_was_given(file: SliceFile) -> None:
    order = block_order(file.header)
    total, largest = _sizes(file)
    window = Window(file, order, Readers(4), pinned_bytes=total // 2, ring=2 * largest)
    for _ in range(3):
        _token(window, order)
    assert window.pinned_bytes <= total // 2
    assert window.buffer_bytes <= window.ring_bytes == 2 * largest
    assert window.peak_bytes <= total // 2 + 2 * largest
    window.close()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 100, 1000])
def test_every_beginning_of_the_pin_order_is_spread_evenly(count: int) -> None:
    order = pin_order(count)
    assert sorted(order) == list(range(count))
    for taken in {1, 2, 3, 5, count // 3, count // 2, count} - {0}:
        pins = sorted(order[:taken])
        gaps = [b - a for a, b in itertools.pairwise([*pins, pins[0] + count])]
        # Van der Corput: the gaps of any beginning differ by a factor of two; here of up to four, as the cycle is cut off.
        assert max(gaps) <= 4 * -(-count // len(pins))


def test_tiles_are_given_back_and_taken_again(file: SliceFile) -> None:
    order = block_order(file.header)
    expected = _expected(file, order)
    total, largest = _sizes(file)
    window = Window(file, order, Readers(), ring=2 * largest)
    assert _token(window, order) == expected
    assert window.pinned_bytes == total
    assert window.pin_at_most(total // 2) <= total // 2
    assert window.pinned_bytes <= total // 2, "at once, before it returns"
    read = window.bytes_read
    assert _token(window, order) == expected
    assert window.bytes_read > read
    window.pin_at_most(0)
    assert _token(window, order) == expected
    assert window.pinned_bytes == 0
    window.pin_at_most(None)
    assert _token(window, order) == expected
    assert _token(window, order) == expected
    assert window.pinned_bytes == total
    read = window.bytes_read
    for _ in range(3):
        assert _token(window, order) == expected
    assert window.bytes_read == read
    assert window.buffer_bytes == 0, "the ring's memory is given back too"
    window.close()


def test_the_tiles_of_a_block_are_held_together_where_they_are_pinned(tmp_path: Path) -> None:
    model = write_tiny_hf(tmp_path / "model", "llama", vocab_size=90_000)  # so that the head has several tiles
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), tmp_path)
    file = SliceFile(tmp_path / slice_name(0, 2))
    assert len(records_of(file, [HEAD])) > 2
    order = block_order(file.header)
    expected = _expected(file, order)
    window = Window(file, order, Readers())
    assert _token(window, order) == expected
    for block in (order[1], HEAD):
        records = records_of(file, [block])
        tiles = window.pinned_tiles(block)
        assert tiles is not None and [tile.record for tile in tiles] == records
        window.pin_at_most(0)
        assert [_bytes(tile) for tile in tiles] == [expected[record.path] for record in records], "given back in use"
        window.pin_at_most(None)
        assert _token(window, order) == expected
        assert _token(window, order) == expected
        assert window.pinned_bytes == window.total_bytes
    assert _token(window, order, hold=True) == expected
    window.close()
    window = Window(file, order, Readers(), pinned_bytes=0)
    assert _token(window, order) == expected
    assert window.pinned_tiles(order[1]) is None
    window.close()
    file.close()


@pytest.mark.parametrize("seed", range(6))
def test_pins_may_change_at_any_moment(file: SliceFile, seed: int) -> None:
    order = block_order(file.header)
    expected = _expected(file, order)
    total, largest = _sizes(file)
    window = Window(file, order, Readers(1 + seed % 4), ring=(1 + seed % 3) * largest)
    choices, done = random.Random(seed), threading.Event()

    def disturb() -> None:
        while not done.wait(choices.random() * 0.002):
            window.pin_at_most(choices.choice([0, None, int(choices.random() * total)]))

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for token in range(150):
            skip_head = token % 5 == 1
            if skip_head and token % 2:
                window.skip(HEAD)
            seen = _token(window, order, skip_head=skip_head, hold=token % 3 > 0)
            assert all(expected[path] == data for path, data in seen.items()), "a tile in use was given back"
            assert len(seen) == len(expected) - (skip_head * sum(path.startswith("head") for path in expected))
    finally:
        done.set()
        thread.join()
        window.close()


def test_a_head_that_is_skipped_is_not_read(file: SliceFile) -> None:
    order = block_order(file.header)
    total, largest = _sizes(file)
    head = sum(record.nbytes for record in records_of(file, [HEAD]))
    window = Window(file, order, Readers(1), pinned_bytes=0, ring=largest)
    for _ in range(5):
        window.skip(HEAD)
        _token(window, order, skip_head=True)
    assert _token(window, order) == _expected(file, order)
    assert 6 * total - 5 * head <= window.bytes_read <= 6 * total - 5 * head + largest
    window.close()


def test_a_rank_without_tiles(file: SliceFile) -> None:
    window = Window(file, [], Readers(), pinned_bytes=0)
    assert window.total_bytes == window.streamed_bytes == 0
    window.close()


# The ring


@examples(200)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_places_in_the_ring_never_overlap(sizes: list[int], choices) -> None:
    ring, live = Ring(100), []
    memory = np.zeros(100, np.int64)
    for number, size in enumerate(sizes, start=1):
        while (place := ring.allocate(size)) is None:
            assert live, "an empty ring has room for everything up to its size"
            start, stop, owner = live.pop(0)
            assert (memory[start:stop] == owner).all(), "a live place was given out again"
            memory[start:stop] = 0
            ring.free_oldest()
        assert place + size <= 100
        assert not memory[place : place + size].any()
        memory[place : place + size] = number
        live.append((place, place + size, number))
        if choices.random() < 0.3:
            start, stop, _ = live.pop(0)
            memory[start:stop] = 0
            ring.free_oldest()


def test_a_place_is_given_out_again_where_it_fits_exactly() -> None:
    ring = Ring(100)
    assert [ring.allocate(50), ring.allocate(50), ring.allocate(1)] == [0, 50, None]
    for place in (0, 50, 0):
        ring.free_oldest()
        assert ring.allocate(50) == place, "two tiles of one size: one is used while the next is read"
        assert ring.allocate(1) is None
