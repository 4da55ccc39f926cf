"""The window: right tiles in the right order, never more memory than it may hold, and no read that is not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny_models import write_tiny_hf
from tpimpi.errors import InputError, SliceError
from tpimpi.model import block_order
from tpimpi.plan import HEAD, make_plan
from tpimpi.slicefile import SliceFile, Tile, slice_name
from tpimpi.slicing import choose_formats, slice_model
from tpimpi.sources import open_source
from tpimpi.window import Window, _Ring


@pytest.fixture(scope="module")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("window")
    model = write_tiny_hf(folder / "model", "llama", num_hidden_layers=6)
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_plan(source.config, [1, 1]), choose_formats(source, "f32"), folder)
    return folder / slice_name(0, 2)


@pytest.fixture
def file(slice_path: Path):
    file = SliceFile(slice_path)
    yield file
    file.close()


def _bytes(tile: Tile) -> bytes:
    return b"".join(array.tobytes() for array in [*tile.parts.values(), *(m.data for m in tile.matrices.values())])


def _token(window: Window, order, *, skip_head: bool = False) -> dict[str, bytes]:
    seen = {}
    for block in order:
        if block == HEAD and skip_head:
            continue
        for tile in window.tiles(block):
            seen[tile.record.path] = _bytes(tile)
    return seen


@pytest.mark.parametrize("blocks", [2, 3, 4, 12, 13, 100, None])
def test_every_window_gives_the_same_tiles(file: SliceFile, blocks: int | None) -> None:
    order = block_order(file.header)
    expected = {record.path: _bytes(file.load(record)) for record in file.records if record.block in order}
    window = Window(file, order, blocks)
    # The head is passed over while a long prompt is read; the cycle must go on.
    for skip_head in (False, True, True, False, True, False):
        seen = _token(window, order, skip_head=skip_head)
        wanted = {path: data for path, data in expected.items() if not (skip_head and path.startswith("head"))}
        assert seen == wanted
        assert list(seen) == list(wanted)
    if window.keeps_all:
        assert window.bytes_read == sum(r.nbytes for r in file.records if r.block in order)
    window.close()


@pytest.mark.parametrize("blocks", [2, 3, 5])
def test_it_never_reads_further_ahead_than_its_blocks(file: SliceFile, blocks: int, monkeypatch) -> None:
    order = block_order(file.header)
    window = Window.__new__(Window)
    furthest: list[int] = []
    turns = {record.path: order.index(record.block) for record in file.records if record.block in order}
    reads = dict.fromkeys(turns, 0)
    original = file.read

    def watched(record, buffer):
        turn = reads[record.path] * len(order) + turns[record.path]
        reads[record.path] += 1
        furthest.append(turn - window._turn)
        return original(record, buffer)

    monkeypatch.setattr(file, "read", watched)
    window.__init__(file, order, blocks)  # type: ignore[misc]
    for _ in range(3):
        _token(window, order)
    window.close()
    assert max(furthest) == blocks - 1, "the block in use counts as one"
    assert window._ring.memory.nbytes == window.window_bytes() < sum(r.nbytes for r in file.records)


@pytest.mark.parametrize("blocks", [1, 0, -3])
def test_less_than_two_blocks_are_refused(file: SliceFile, blocks: int) -> None:
    with pytest.raises(InputError, match=f"window is {blocks}, must be at least 2"):
        Window(file, block_order(file.header), blocks)


@pytest.mark.parametrize("blocks", [2, None])
def test_what_reading_raises_is_raised_where_the_tile_is_used(slice_path: Path, tmp_path: Path, blocks) -> None:
    whole = SliceFile(slice_path)
    record = next(r for r in whole.records if r.path == "layers/0003/mlp/tile-000")
    offset = whole._places[record.path].offsets[1] + 5
    whole.close()
    data = bytearray(slice_path.read_bytes())
    data[offset] ^= 0x10
    broken = tmp_path / slice_path.name
    broken.write_bytes(data)
    file = SliceFile(broken)
    window = Window(file, block_order(file.header), blocks)
    seen = []
    with pytest.raises(SliceError, match="layers/0003/mlp/tile-000 does not match its checksum"):
        for block in block_order(file.header):
            for tile in window.tiles(block):
                seen.append(tile.record.path)
    assert seen[-1] == "layers/0003/attn/tile-000"
    window.close()
    file.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_places_in_the_ring_never_overlap(sizes: list[int], choices) -> None:
    ring, live = _Ring(100), []
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
