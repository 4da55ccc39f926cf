"""The order of work while sums are under way: a long chunk goes through the layers in two halves, one computing while the
sum of the other travels.

The way of a half-chunk through the layers is a generator (`Model._through_layers`). It stops where it needs something,
a tile, a sum or its other half, and says which; `go_through_blocks` decides which half goes on. Only the order is decided
here: every half meets the same tiles and sums in the same order in any case, so its numbers are the same to the bit.

Experts compute both halves at once, since one half would read experts that the other wants too. So of a mixture the sums of
attention are under way while the other half's attention computes, and its router; of the experts' sums the second one is,
while the first half goes on with the next block.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from enum import Enum

from tpimpi.engine.window import Window
from tpimpi.models.blocks import Block
from tpimpi.models.config import ModelConfig
from tpimpi.weights.slices.tile import Tile

# Positions of a prompt that are computed at once.
DENSE_CHUNK = 128
MIXTURE_CHUNK = 512  # a chunk reads nearly all experts, however few positions it has
MAX_CHUNK = 4096
OVERLAP_MIN_POSITIONS = 32  # a chunk of so many positions or more is halved


class Awaits(Enum):
    """What a half-chunk needs to go on."""

    TILE = "the next tile of its block, or None after the last"
    EXPERTS = "that the other half gets as far: experts compute for both at once"
    SUM = "nothing: its sum is under way, and it would wait for it"


HalfChunkWork = Generator[Awaits, Tile | None, None]


def half_chunks(positions: int, ranks: int) -> list[slice]:
    """The runs of positions in which a chunk goes through the layers: all at once, or two halves where it is long.

    It depends on nothing else, so that the same chunks give the same numbers to the bit.
    """
    if ranks == 1 or positions < OVERLAP_MIN_POSITIONS:
        return [slice(0, positions)]
    half = -(-positions // 2)
    return [slice(0, half), slice(half, positions)]


def default_chunk(config: ModelConfig) -> int:
    """Positions of a prompt that are computed at once where nobody says how many: of a mixture at least (see chunk.py)."""
    return MIXTURE_CHUNK if config.experts else DENSE_CHUNK


def largest_sum(hidden: int, ranks: int) -> int:
    """Numbers of the largest sum over so many ranks in a usual step of a dense model."""
    return hidden * max(run.stop - run.start for run in half_chunks(DENSE_CHUNK, ranks))


class HalfChunk:
    """Some positions on their way through the layers, by turns with the other half of the chunk (if it has one)."""

    def __init__(self, work: HalfChunkWork) -> None:
        self._work = work
        self._awaits: Awaits | None = next(work)

    def compute(self, tile: Tile) -> None:
        """Compute with the next tile of the block; before the first the sum of the block before is waited for."""
        if self._awaits is Awaits.SUM:
            self.take_sum()
        self._awaits = self._work.send(tile)

    def end_tiles(self) -> None:
        """The block has no further tiles: start the sum of its partials over all ranks, if no experts are to come."""
        if self._awaits is Awaits.SUM:  # the block had none at all
            self.take_sum()
        self._awaits = self._work.send(None)

    def use_experts(self) -> None:
        """Both halves have got as far as their experts: have them compute, if the block has any, and start the sum."""
        if self._awaits is Awaits.EXPERTS:
            self._awaits = next(self._work)

    def take_sum(self) -> None:
        """Wait for the sum that is under way, if one is, and add it."""
        if self._awaits is Awaits.SUM:
            self._awaits = next(self._work, None)


def go_through_blocks(blocks: Iterable[Block], window: Window, halves: Sequence[HalfChunk]) -> None:
    """Take the two halves of a chunk, or the one that is a whole chunk, through all blocks, and wait for the last sums."""
    for block in blocks:
        if window.would_wait(block):
            _take_sums(halves)  # the hub owes them to the others, however long its disk takes
        count = window.count(block)
        held = window.pinned_tiles(block) if len(halves) > 1 and count else None
        if held is not None:
            _half_by_half(halves, held)
        elif count:
            _tile_by_tile(halves, window.tiles(block), count)
        else:  # this rank has no part in the block, but in its sums
            _half_by_half(halves, [])
        for half in halves:
            half.use_experts()
        halves[0].take_sum()  # that of the second half: while the next block begins
    _take_sums(halves)


def _half_by_half(halves: Sequence[HalfChunk], tiles: Sequence[Tile]) -> None:
    """All tiles are in memory: each half goes through them on its own, while the sum of the other is under way."""
    for half in halves:
        for tile in tiles:
            half.compute(tile)
        half.end_tiles()


def _tile_by_tile(halves: Sequence[HalfChunk], tiles: Iterable[Tile], count: int) -> None:
    """Tiles come and go: both halves use each of them while it is in memory."""
    for number, tile in enumerate(tiles, start=1):
        for half in halves:
            half.compute(tile)
            if number == count:
                half.end_tiles()


def _take_sums(halves: Sequence[HalfChunk]) -> None:
    for half in halves:
        half.take_sum()
