"""The order in which tiles are used: a cycle that every token goes through once."""

from __future__ import annotations

from collections.abc import Sequence

from tpimpi.models.blocks import Block
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.layout import Record


def records_of(file: SliceFile, order: Sequence[Block]) -> list[Record]:
    """The tiles that a cycle of blocks goes through, in the order of use."""
    by_block: dict[Block, list[Record]] = {block: [] for block in order}
    for record in file.records:
        if record.block in by_block:
            by_block[record.block].append(record)
    return [record for block in order for record in by_block[block]]


class Cycle:
    """The tiles of a cycle of blocks, each with its index in the order of use.

    A turn is one use of a tile, counted over all cycles: turn t uses the tile with index t % count.
    """

    def __init__(self, file: SliceFile, order: Sequence[Block]) -> None:
        self.order = list(order)
        self.records = records_of(file, order)
        self.count = len(self.records)
        self.sizes = [record.nbytes for record in self.records]
        self.spans: dict[Block, tuple[int, int]] = {}  # of a block: its first tile, and the first after it
        self.block_of: list[int] = []  # of a tile: its block's place in the order
        counts = dict.fromkeys(self.order, 0)
        for record in self.records:
            counts[record.block] += 1
        for place, block in enumerate(self.order):
            first = len(self.block_of)
            self.block_of += [place] * counts[block]
            self.spans[block] = (first, len(self.block_of))

    def next_turn(self, index: int, turn: int) -> int:
        """The first turn of a tile (or of the end of the cycle) that is not before turn `turn`."""
        return turn + (index - turn) % self.count

    def location(self, index: int) -> tuple[int, int]:
        """Of a tile: its block's place in the order, and its own in the block."""
        place = self.block_of[index]
        return place, index - self.spans[self.order[place]][0]

    def turn_after_blocks(self, turn: int, blocks: int) -> int:
        """The first turn after so many consecutive blocks, beginning with the one that turn `turn` is in."""
        cycle, index = divmod(turn, self.count)
        cycles, place = divmod(self.block_of[index] + blocks, len(self.order))
        return (cycle + cycles) * self.count + self.spans[self.order[place]][0]

    def blocks_bytes(self, blocks: int) -> int:
        """Size of the largest run of so many consecutive blocks, plus one tile for the ring's turn."""
        sizes = [sum(self.sizes[slice(*self.spans[block])]) for block in self.order]
        runs = (sum((sizes * 2)[start : start + blocks]) for start in range(len(sizes)))
        return max(runs) + max(self.sizes, default=0)
