"""The ring: memory that streamed tiles pass through, used again and again."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from tpimpi.system.buffers import Bytes, Pages
from tpimpi.weights.slices.layout import Record

FEWEST_TILES = 2  # in the ring, of the largest size: one computes while the next is read
USUAL_TILES = 5  # beyond these a larger ring was not seen to help


def ring_bytes(records: Sequence[Record], tiles: int) -> int:
    """Memory for a ring of so many tiles; not more than all of them take."""
    sizes = [record.nbytes for record in records]
    return min(sum(sizes), tiles * max(sizes, default=0))


class Ring:
    """Places in one piece of memory, given out in order and freed in the same order; each is contiguous."""

    def __init__(self, nbytes: int) -> None:
        self._pages = Pages(nbytes)
        self.memory = self._pages.array
        self.touched = 0  # bytes of it that were ever used
        self._nbytes = nbytes
        self._live: deque[tuple[int, int]] = deque()

    def _find(self, nbytes: int) -> int | None:
        """Offset of `nbytes` free bytes, or None while there are none."""
        start, stop = 0, self._nbytes
        if self._live:
            oldest, (newest, last) = self._live[0][0], self._live[-1]
            if newest < oldest:  # the live places wrap: free is what lies between
                start, stop = last, oldest
            elif last + nbytes <= self._nbytes:
                start = last
            else:
                stop = oldest
        return start if start + nbytes <= stop else None

    def has_room(self, nbytes: int) -> bool:
        """Whether `take` would give so many bytes."""
        return self._find(nbytes) is not None

    def allocate(self, nbytes: int) -> int | None:
        """Take `nbytes` free bytes: their offset, or None while there are none."""
        start = self._find(nbytes)
        if start is not None:
            self._live.append((start, start + nbytes))
            self.touched = max(self.touched, start + nbytes)
        return start

    def take(self, nbytes: int) -> Bytes | None:
        """`nbytes` free bytes, uint8 [nbytes], or None while there are none."""
        start = self.allocate(nbytes)
        return None if start is None else self.memory[start : start + nbytes]

    def free_oldest(self) -> None:
        """Give back the place that was taken first."""
        self._live.popleft()

    def release(self) -> None:
        """Give the memory back while nothing is in it."""
        self._pages.release()
        self.touched = 0
