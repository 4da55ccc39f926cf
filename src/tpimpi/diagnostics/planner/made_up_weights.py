"""Weights that stand for a model's, to measure with: nothing is read for them, and their numbers mean nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle

import numpy as np

from tpimpi.compute.arrays import Array
from tpimpi.compute.formats.bf16 import to_bf16
from tpimpi.compute.formats.packed import Matrix
from tpimpi.models.blocks import Block
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import layer_norms
from tpimpi.system.buffers import Pages
from tpimpi.weights.slices.layout import Record, aligned
from tpimpi.weights.slices.tile import Tile

_MAX_COPIES = 256  # of a layer, at most
_WEIGHT_BYTE = 0x2C  # of which all weights are made: small normal numbers in every format
TRACE_POSITIONS = 1024  # of the made-up choices, after which they begin again


def made_up_resident(config: ModelConfig, router: str) -> dict[str, Array]:
    """The small arrays of a model's layers: norms that change nothing, a router in this format, and choices of experts, all
    equally likely, for TRACE_POSITIONS; the same on every rank.

    By its router alone, positions would choose the same few experts: attention with made-up weights gives all of them
    nearly the same vector.
    """
    ones = {name: np.ones((config.layers, *shape), np.float32) for name, shape in layer_norms(config).items()}
    found: dict[str, Array] = {**ones, "norm": np.ones(config.hidden, np.float32)}
    if config.experts:
        shape, random = (config.layers, config.experts, config.hidden), np.random.default_rng(0)
        numbers = random.standard_normal(shape, np.float32) / np.float32(config.hidden**0.5)
        orders = random.random((TRACE_POSITIONS, config.layers, config.experts)).argsort(axis=2)
        found["trace"] = orders[..., : config.experts_per_token].astype("<u2")
        found["router"] = to_bf16(numbers) if router == "bf16" else numbers
        found["router_bias"] = np.zeros((config.layers, config.experts), np.float32)
    if config.attention_sinks:
        found["sinks"] = np.zeros((config.layers, config.heads), np.float32)
    return found


def made_up_tile(record: Record, pages: Pages) -> Tile:
    """A tile in `pages`, which are filled."""
    pages.array[:] = _WEIGHT_BYTE
    parts: dict[str, Array] = {}
    matrices: dict[str, Matrix] = {}
    place = 0
    for part in record.parts:
        data = pages.array[place : place + part.nbytes]
        place += aligned(part.nbytes)
        if part.is_matrix:
            matrices[part.name] = part.matrix(data)
        else:
            parts[part.name] = data.view(part.dtype).reshape(part.shape)
    return Tile(record, parts, matrices)


class WeightRing:
    """Stands in for a Window: the tiles of a layer, at another place in memory each time, and those of the head.

    Each tile has memory of its own, as pinned tiles have: how much of it is in large pages decides how fast it is read.
    """

    wait_seconds = 0.0

    def __init__(self, records: Sequence[Record], room: int, head_room: int) -> None:
        """Takes `room` bytes for the layer and `head_room` for the head, or what one takes, if that is more. Raises
        MemoryError."""
        self._counts = Counter(record.block for record in records)
        self._pages: list[Pages] = []
        self._turns: dict[Block, Iterator[list[Tile]]] = {}
        layer = [record for record in records if record.block.kind != "head"]
        self.layer_bytes = sum(record.nbytes for record in layer)
        head = [record for record in records if record.block.kind == "head"]
        for group, most in ((layer, room), (head, head_room)):
            times = max(1, min(_MAX_COPIES, most // max(1, sum(record.nbytes for record in group))))
            turns: dict[Block, list[list[Tile]]] = {record.block: [[] for _ in range(times)] for record in group}
            for turn in range(times):
                for record in group:
                    turns[record.block][turn].append(self._tile(record))
            self._turns |= {block: cycle(tiles) for block, tiles in turns.items()}

    def raise_damage(self) -> None:
        """Nothing of it is checked in idle time."""

    def _tile(self, record: Record) -> Tile:
        self._pages.append(Pages(record.nbytes))
        return made_up_tile(record, self._pages[-1])

    def release(self) -> None:
        for pages in self._pages:
            pages.release()

    def tiles(self, block: Block) -> Iterator[Tile]:
        return iter(next(self._turns[block])) if block in self._turns else iter(())

    def pinned_tiles(self, block: Block) -> list[Tile]:
        return next(self._turns[block])

    def count(self, block: Block) -> int:
        return self._counts[block]

    def would_wait(self, block: Block) -> bool:
        return False

    def skip(self, block: Block) -> None:
        pass


class ExpertRing:
    """Stands in for an ExpertCache of a layer in which not all experts fit: each that is asked for lies at another place in
    memory than the last one."""

    wait_seconds = 0.0
    is_whole = False

    def __init__(self, experts: Sequence[Record], room: int) -> None:
        """Takes `room` bytes, or what one expert takes. Raises MemoryError."""
        self._records = experts
        self._wanted: Sequence[int] = ()  # by the block
        self.last_bytes = 0  # of the experts of the last block
        self._pages: list[Pages] = []
        places = []
        for _ in range(max(1, room // experts[0].nbytes) if experts else 0):
            self._pages.append(Pages(experts[0].nbytes))
            places.append(made_up_tile(experts[0], self._pages[-1]))
        self._places = cycle(places)

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        self._wanted = experts

    def tiles(self) -> Iterator[list[Tile]]:
        """All of them at once, as where all are in memory."""
        if self._records:
            self.last_bytes = len(self._wanted) * self._records[0].nbytes
            yield [replace(next(self._places), record=self._records[expert]) for expert in self._wanted]

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        pass

    def release(self) -> None:
        for pages in self._pages:
            pages.release()
