"""The pinned tiles of a window: read once, and kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tpimpi.engine.load import TileLoad
from tpimpi.system.buffers import BufferPool, Bytes
from tpimpi.weights.slices.tile import Tile


def pin_order(count: int) -> list[int]:
    """The indices of `count` tiles in the order in which they are pinned: every beginning of it is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    backwards = (int(format(number, f"0{bits}b")[::-1], 2) for number in range(1 << bits))
    return [index for index in backwards if index < count]


class PinnedSet:
    """Which tiles of a cycle are to stay in memory, and those that are there.

    Its user's lock is held wherever it changes; `tiles`, `retired` and `all_wanted` may be read without (see Window._tile).
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """`sizes` are the bytes of each tile of the cycle. No tile is wanted at first."""
        self._sizes = sizes
        self._order = pin_order(len(sizes))
        self._place = {index: place for place, index in enumerate(self._order)}
        self._places = BufferPool([sizes[index] for index in self._order])
        self.tiles: list[Tile | None] = [None] * len(sizes)  # by index: those that can be used
        self.loads: dict[int, TileLoad] = {}  # by index: pinned tiles, and those on their way
        self.retired: list[TileLoad] = []  # given up, to be released once they are not in use
        self._wanted: set[int] = set()
        self.wanted_bytes = 0  # memory that pinned tiles are to take
        self.nbytes = 0  # memory of pinned tiles, those on their way included

    @property
    def all_wanted(self) -> bool:
        """Whether every tile of the cycle is to stay."""
        return len(self._wanted) == len(self._sizes)

    @property
    def all_loaded(self) -> bool:
        """Whether every tile of the cycle is pinned, or on its way to be."""
        return len(self.loads) == len(self._sizes)

    def want(self, nbytes: int | None) -> set[int]:
        """Want as many tiles as `nbytes` hold, None for all. Returns the indices of those that are given up."""
        wanted: set[int] = set()
        taken = 0
        for index in self._order:
            if nbytes is not None and taken + self._sizes[index] > nbytes:
                break
            taken += self._sizes[index]
            wanted.add(index)
        self._wanted, self.wanted_bytes = wanted, taken
        missing = [load for index, load in self.loads.items() if index not in wanted]
        for load in missing:
            del self.loads[load.index]
            self.nbytes -= self._sizes[load.index]
            self.tiles[load.index] = None
            load.give_up()
            self.retired.append(load)
        return {load.index for load in missing}

    def wants(self, index: int) -> bool:
        """Whether a tile is to be pinned now. One that was, and is in use yet, has its memory until it is not."""
        return index in self._wanted and all(load.index != index for load in self.retired)

    def take_memory(self, index: int) -> Bytes:
        """Memory for a wanted tile: uint8 [its size]."""
        return self._places.take(self._place[index])

    def add(self, load: TileLoad) -> None:
        """A tile is on its way, into memory from `take_memory`."""
        self.loads[load.index] = load
        self.nbytes += self._sizes[load.index]

    def release_retired(self, in_use: Callable[[int], bool]) -> None:
        """Release the tiles that were given up; not those in use, nor those still being read."""
        waiting = [load for load in self.retired if load.pending or in_use(load.index)]
        for load in self.retired:
            if load not in waiting:
                self._places.release(self._place[load.index])
        self.retired = waiting

    def release_all(self) -> None:
        """Give all memory back."""
        self._places.release_all()
