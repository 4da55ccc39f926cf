"""The experts of a chunk that goes through the layers in halves: as of the whole chunk, and each is read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.tiny_models import write_tiny_hf
from tests.support.waiting import until
from tpimpi.compute.backends.reference import NumpyBackend
from tpimpi.engine.eviction import ExpertKey
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.experts import ChunkExperts, Experts, Routed
from tpimpi.engine.model import Model, block_order
from tpimpi.engine.readers import Readers
from tpimpi.engine.window import Window
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

HALVES = [slice(0, 20), slice(20, 40)]
LAYER = 2


@pytest.fixture(scope="module")
def slice_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halves")
    model = write_tiny_hf(folder / "model", "qwen3-moe")  # 3 of 8 experts in layers 0 and 2; layer 1 is dense
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder / "s")
    return folder / "s" / slice_name(1, 2)


@pytest.fixture
def file(slice_path: Path) -> Iterator[SliceFile]:
    file = SliceFile(slice_path)
    yield file
    file.close()


def _experts(file: SliceFile, slots: int, kind: type[Experts] = Experts) -> Experts:
    records = {ExpertKey(record.block.layer, record.expert): record for record in file.records_of("experts")}
    nbytes = slots * max(record.nbytes for record in records.values())
    cache = ExpertCache(file, records, nbytes=nbytes, readers=Readers(2))
    resident = file.load(file.records_of("resident")[0]).parts
    return kind(file.header.config, resident, cache, NumpyBackend(1))


def _vectors(file: SliceFile, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((40, file.header.config.hidden), dtype=np.float32)


def test_experts_of_two_halves_are_read_once_and_add_what_those_of_the_whole_do(file: SliceFile) -> None:
    h, position = _vectors(file), np.arange(40, dtype=np.int32)
    experts = _experts(file, slots=2)
    whole = experts.route(h, LAYER, position)
    expected = np.zeros_like(h)
    experts.begin(whole)
    experts.add_partial(expected, h, whole)
    union = len(np.unique(whole.experts))
    assert union > 3, "one position chooses as many"
    read = experts.cache.figures.bytes_read
    # What is in memory goes first, so that no expert is there by chance.
    experts.cache.begin(0, [0, 1])
    assert sum(map(len, experts.cache.tiles())) == 2
    before = experts.cache.figures

    chunk = ChunkExperts(experts, HALVES)
    partials = []
    for half in HALVES:
        assert not chunk.due
        _, partial = chunk.route(h[half], np.zeros_like(h[half]), LAYER, position[half])
        partials.append(partial)
    assert chunk.due
    chunk.add_partial()
    assert not chunk.due
    np.testing.assert_array_equal(np.concatenate(partials), expected)
    did = experts.cache.figures
    assert did.used - before.used == union
    assert did.bytes_read - before.bytes_read == read == union * experts.cache.slot_bytes
    experts.cache.close()


def test_what_one_half_expects_is_not_given_up_for_the_other(file: SliceFile) -> None:
    x, position = _vectors(file), np.arange(40, dtype=np.int32)
    experts = _experts(file, slots=8)
    first, second = (set(experts.likely(x[run], LAYER, position[run], 1)) for run in (slice(0, 1), slice(1, 2)))
    assert first.isdisjoint(second), "another seed, or the test shows nothing"
    chunk = ChunkExperts(experts, [slice(0, 1), slice(1, 2)])
    for row in range(2):
        chunk.prefetch(x[row : row + 1], LAYER, position[row : row + 1], 1)
    until(lambda: experts.cache.figures.bytes_read >= 2 * experts.cache.slot_bytes)
    experts.cache.begin(LAYER, sorted(first | second))
    assert experts.cache.figures.expected_used == 2
    experts.cache.close()


class _LoggedExperts(Experts):
    log: list[tuple[str, int]]

    def route(self, h: Any, layer: int, position: Any) -> Routed:
        self.log.append(("route", len(h)))
        return super().route(h, layer, position)

    def add_partial(self, partial: Any, h: Any, routed: Routed) -> None:
        self.log.append(("experts", len(h)))
        super().add_partial(partial, h, routed)


class _LoggedStar:
    """The star of two ranks, of which there is one."""

    rank, seconds = SimpleNamespace(size=2), 0.0

    def __init__(self, log: list[tuple[str, int]]) -> None:
        self.log = log

    def start(self, partial: np.ndarray, *, background: bool, **_: object) -> SimpleNamespace:
        assert background
        self.log.append(("sum", len(partial)))
        return SimpleNamespace(wait=lambda: self.log.append(("have sum", len(partial))))


def test_sums_of_a_mixture_are_under_way_while_the_other_half_goes_on(file: SliceFile) -> None:
    order = [block for block in block_order(file.header) if block.layer == 0]
    experts = _experts(file, 4, _LoggedExperts)
    assert isinstance(experts, _LoggedExperts)
    experts.log = log = []
    window = Window(file, order, Readers())
    star: Any = _LoggedStar(log)
    model = Model(file.header, experts.resident, window, star, experts.backend, experts=experts, predict=3)
    model.blocks = order
    model.begin(64)
    model.forward(_vectors(file), 0)
    assert log == [
        *[("sum", 20), ("sum", 20)],  # of attention: the first while the second half computes,
        *[
            ("have sum", 20),
            ("route", 20),
            ("have sum", 20),
            ("route", 20),
        ],  # and the second while the first half chooses
        *[("experts", 40), ("sum", 20), ("sum", 20)],
        *[("have sum", 20), ("have sum", 20)],
    ]
    window.close()
    experts.cache.close()
