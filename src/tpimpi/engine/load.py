"""A tile on its way from the slice file into memory."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tpimpi.system.buffers import Bytes
from tpimpi.system.direct_io import Extent
from tpimpi.weights.slices.tile import Tile


@dataclass(eq=False)
class TileLoad:
    """A tile that is being read for one turn, or to be pinned, and afterwards the tile itself."""

    index: int  # of the tile in the cycle
    turn: int  # of its use, counted over all cycles
    pinned: bool
    buffer: Bytes
    pieces: deque[Extent | None]  # to be read yet; None is a chunked tile as a whole
    pending: int = 0  # pieces that are being read
    retired: bool = False  # used, or given up: its memory goes once nothing is read into it any more
    tile: Tile | None = None

    def give_up(self) -> None:
        """What was not read yet will not be."""
        self.retired = True
        self.pieces.clear()
