"""The expert cache: the tiles asked for, in order; never more memory than it may hold; no read that is not needed."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.support.slices import checked_contents
from tests.support.tiny_models import write_tiny_hf
from tests.support.waiting import until
from tpimpi.engine.eviction import ExpertKey, LeastRecentlyUsed, Stalest
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.readers import Readers
from tpimpi.errors import DamagedMemoryError, SliceError
from tpimpi.system.buffers import Bytes
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.layout import Record, experts_dataset
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.tile import Tile
from tpimpi.weights.sources import open_source

LAYERS, EXPERTS = (0, 2), 8  # of the tiny model, whose layer 1 is dense


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("experts") / "model", "qwen3-moe")
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def slices(model: Path) -> Path:
    folder = model.parent / "slices"
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder)
    return folder


@pytest.fixture
def file(slices: Path) -> Iterator[SliceFile]:
    file = SliceFile(slices / slice_name(1, 2))
    yield file
    file.close()


def _cache(file: SliceFile, places: int | None, reads: int = 2) -> ExpertCache:
    records = {ExpertKey(record.block.layer, record.expert): record for record in file.records_of("experts")}
    assert sorted(records) == [(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]
    size = max(record.nbytes for record in records.values())
    return ExpertCache(file, records, nbytes=None if places is None else places * size, readers=Readers(reads))


def _bytes(tile: Tile) -> bytes:
    return b"".join(matrix.data.tobytes() for matrix in tile.matrices.values())


def _take(cache: ExpertCache, layer: int, experts: list[int]) -> list[tuple[int, bytes]]:
    cache.begin(layer, experts)
    return _taken(cache)


def _taken(cache: ExpertCache) -> list[tuple[int, bytes]]:
    return [(tile.record.expert, _bytes(tile)) for group in cache.tiles() for tile in group]


class _SlowDisk:
    """Reads wait for `go_on`; `order` is that of the experts asked for."""

    def __init__(self, file: SliceFile, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.order: list[int] = []
        read = file.read

        def slow(record: Record, buffer: Bytes) -> Tile:
            self.order.append(record.expert)
            self.begun.set()
            assert self.go_on.wait(20)
            return read(record, buffer)

        monkeypatch.setattr(file, "read", slow)


def test_slices_hold_the_columns_of_every_expert(model: Path, slices: Path) -> None:
    with open_source(model) as source:
        files = [SliceFile(slices / slice_name(rank, 2)) for rank in range(2)]
        for layer in LAYERS:
            name = f"layers.{layer}.mlp.experts.5"
            for part in ("gate", "up", "down"):
                found = []
                for file in files:
                    record = next(r for r in file.records_of("experts") if (r.block.layer, r.expert) == (layer, 5))
                    matrix = file.load(record).matrices[part]
                    panels = matrix.data.view(np.float32).reshape(-1, matrix.columns, 16)
                    found.append(panels.swapaxes(1, 2).reshape(-1, matrix.columns)[: matrix.rows])
                joined = np.concatenate(found, axis=1 if part == "down" else 0)
                np.testing.assert_array_equal(joined, source.read(f"{name}.{part}_proj.weight"))
        for file in files:
            assert all(len(file.pieces(record) or []) == 1 for record in file.records_of("experts")), "one read each"
            file.close()


def test_any_cache_gives_the_same_tiles_in_the_order_asked_for(file: SliceFile) -> None:
    """Also while a thread checks what is in memory, and finds nothing."""
    expected = {(r.block.layer, r.expert): _bytes(file.load(r)) for r in file.records_of("experts")}
    for places in (2, 3, 7, None):
        cache, dice = _cache(file, places), random.Random(places)
        ended = threading.Event()
        checking = threading.Thread(target=_check_until, args=(cache, ended))
        checking.start()
        for _ in range(60):
            layer = dice.choice(LAYERS)
            if dice.random() < 0.5:
                cache.prefetch(layer, dice.sample(range(EXPERTS), dice.randrange(1, EXPERTS)))
            wanted = dice.sample(range(EXPERTS), dice.randrange(1, EXPERTS + 1))
            cache.begin(layer, wanted)
            for _ in range(dice.randrange(3)):
                cache.prefetch(dice.choice(LAYERS), dice.sample(range(EXPERTS), dice.randrange(1, EXPERTS)))
            assert _taken(cache) == [(expert, expected[layer, expert]) for expert in wanted]
            # One that is checked keeps its memory until then.
            until(lambda cache=cache: cache.held_bytes <= cache.limit_bytes)
            if dice.random() < 0.2 and places:
                cache.limit(dice.randrange(0, 12) * cache.slot_bytes)
                assert cache.limit_bytes >= cache.min_bytes
        assert cache.figures.used >= cache.figures.hits
        ended.set()
        checking.join()
        cache.close()


def _check_until(cache: ExpertCache, ended: threading.Event) -> None:
    while not ended.is_set():
        cache.check_next()


def test_an_expert_that_changes_in_memory_is_noticed(file: SliceFile) -> None:
    cache = _cache(file, 4)
    assert cache.check_next() == 0, "none is there"
    cache.begin(2, [1, 5, 6])
    held = {tile.record.expert: tile for group in cache.tiles() for tile in group}
    checked = [cache.check_next() for _ in range(6)]
    assert checked == [tile.record.nbytes for tile in (held[1], held[5], held[6])] * 2
    cache.begin(2, [5])
    _taken(cache)
    held[5].matrices["up"].data.reshape(-1).view(np.uint8)[100] ^= 16
    for _ in range(3):
        cache.check_next()
    with pytest.raises(DamagedMemoryError, match=r"experts.* of slice file .*rank-1-of-2\.h5") as error:
        cache.begin(2, [1])
    assert error.value.exit_code == 1
    cache.close()


def test_what_is_in_memory_is_not_read_again(file: SliceFile) -> None:
    cache = _cache(file, 4)
    for _ in range(3):
        _take(cache, 0, [1, 2, 3])
    assert cache.figures.bytes_read == 3 * cache.slot_bytes and cache.figures.hits == 6
    for _ in range(2):
        _take(cache, 0, [2, 3])  # 1 is passed over
    _take(cache, 2, [5])
    _take(cache, 2, [6])  # for which that goes
    _take(cache, 0, [2, 3])
    assert cache.figures.bytes_read == 5 * cache.slot_bytes
    _take(cache, 0, [1])
    assert cache.figures.bytes_read == 6 * cache.slot_bytes
    cache.close()


def test_what_is_expected_is_there_when_it_is_wanted(file: SliceFile) -> None:
    cache = _cache(file, 6)
    cache.prefetch(2, [4, 7])
    until(lambda: cache.figures.bytes_read == 2 * cache.slot_bytes)
    before = cache.wait_seconds
    _take(cache, 2, [4])
    assert cache.wait_seconds == before
    did = cache.figures
    assert (did.expected, did.expected_used, did.hits, did.used) == (2, 1, 1, 1)
    assert did.expected_bytes == did.bytes_read == 2 * cache.slot_bytes
    cache.close()


def test_a_better_guess_takes_the_place_of_an_earlier_one(file: SliceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the disk is at what the block wants, the next one's experts are expected twice: 5 not any more, 7 still."""
    cache, disk = _cache(file, 8, reads=1), _SlowDisk(file, monkeypatch)
    cache.begin(0, [0])
    assert disk.begun.wait(20)
    cache.prefetch(2, [5, 7])
    cache.prefetch(2, [4, 7])
    disk.go_on.set()
    _taken(cache)
    until(lambda: cache.figures.bytes_read == 3 * cache.slot_bytes)
    assert disk.order == [0, 4, 7]
    _take(cache, 2, [7])
    did = cache.figures
    assert (did.expected, did.expected_used, did.hits) == (2, 1, 1)
    cache.close()


def test_where_all_fit_the_rest_is_read_too(file: SliceFile) -> None:
    cache = _cache(file, None)
    time.sleep(0.05)
    assert cache.figures.bytes_read == 0, "nothing computes yet, and the dense tiles come first"
    _take(cache, 2, [3])
    until(lambda: cache.held_bytes == cache.total_bytes)
    until(lambda: cache.figures.bytes_read == cache.total_bytes)
    assert cache.figures.bytes_read == cache.total_bytes
    assert all(_take(cache, layer, list(range(EXPERTS))) for layer in LAYERS)
    assert (cache.figures.used, cache.figures.hits) == (1 + 2 * EXPERTS, 2 * EXPERTS)
    cache.close()


def test_what_was_expected_wrongly_gives_way_to_what_is_wanted(
    file: SliceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the disk is at the first that was expected, the block wants another: the rest is not read any more."""
    cache, disk = _cache(file, 8, reads=1), _SlowDisk(file, monkeypatch)
    cache.prefetch(0, [0, 1, 2, 3])
    assert disk.begun.wait(20)
    threading.Timer(0.05, disk.go_on.set).start()
    assert [expert for expert, _ in _take(cache, 0, [6, 7])] == [6, 7]
    assert disk.order == [0, 6, 7]
    cache.close()


def test_memory_is_given_back_at_once(file: SliceFile) -> None:
    cache = _cache(file, EXPERTS)
    _take(cache, 0, list(range(EXPERTS)))
    assert cache.held_bytes == EXPERTS * cache.slot_bytes
    cache.limit(3 * cache.slot_bytes)
    assert cache.held_bytes == cache.limit_bytes == 3 * cache.slot_bytes
    cache.limit(0)
    assert cache.held_bytes == cache.min_bytes == 2 * cache.slot_bytes, "without which nothing could be computed"
    assert [expert for expert, _ in _take(cache, 0, list(range(EXPERTS)))] == list(range(EXPERTS))
    cache.close()


def test_the_least_recently_used_goes_first() -> None:
    order, keys = LeastRecentlyUsed(), [ExpertKey(0, number) for number in range(4)]
    for key in keys:
        order.add(key)
    order.use(keys[0])
    assert order.victim(lambda key: True) == keys[1]
    assert order.victim(lambda key: key != keys[1]) == keys[2]
    order.demote(keys[3])
    assert order.victim(lambda key: True) == keys[3]
    order.remove(keys[3])
    order.remove(keys[1])
    assert order.victim(lambda key: True) == keys[2] and order.victim(lambda key: False) is None


def test_the_one_that_its_layer_passed_over_most_often_goes_first() -> None:
    order = Stalest(3)
    first, second, third = ExpertKey(0, 1), ExpertKey(1, 1), ExpertKey(2, 1)
    for key in (first, second, third):
        order.begin(key.layer)
        order.add(key)
    assert order.victim(lambda key: True) == third, "all are as stale; that of layer 2 comes last"
    order.begin(0)
    order.use(first)
    order.begin(1)  # without `second`
    assert order.victim(lambda key: True) == second
    assert order.victim(lambda key: key != second) == first, "layer 2 may choose `third` next"
    order.demote(third)
    assert order.victim(lambda key: True) == third
    order.remove(third)
    assert order.victim(lambda key: False) is None


def test_an_expert_that_is_damaged_is_named_where_it_is_used(slices: Path, tmp_path: Path) -> None:
    path = tmp_path / slice_name(1, 2)
    path.write_bytes((slices / slice_name(1, 2)).read_bytes())
    with h5py.File(path, "r+") as made:
        made[experts_dataset(2)][3, 100] ^= 1
    file = SliceFile(path)
    cache = _cache(file, None)
    _take(cache, 2, [2])
    with pytest.raises(SliceError, match="layers/0002/experts/0003 does not match its checksum"):
        _take(cache, 2, [3])
    cache.close()
    file.close()


def test_experts_that_another_tool_has_compressed_are_read(slices: Path, tmp_path: Path) -> None:
    original, path = slices / slice_name(1, 2), tmp_path / slice_name(1, 2)
    path.write_bytes(original.read_bytes())
    with h5py.File(path, "r+") as made:
        name, values = experts_dataset(0), made[experts_dataset(0)][...]
        del made[name]
        made.create_dataset(name, data=values, compression="gzip")
    assert checked_contents(path) == checked_contents(original)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.pop(experts_dataset(0)), "experts"),
        (lambda file: (file.pop(experts_dataset(0)), file.create_dataset(experts_dataset(0), data=b"")), "must be"),
    ],
)
def test_a_file_without_its_experts_is_refused(slices: Path, tmp_path: Path, change, said: str) -> None:
    path = tmp_path / slice_name(1, 2)
    path.write_bytes((slices / slice_name(1, 2)).read_bytes())
    with h5py.File(path, "r+") as made:
        change(made)
    with pytest.raises(SliceError, match=said):
        SliceFile(path)
