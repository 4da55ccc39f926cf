"""Memory for weights: page-aligned, in large pages where the system has them, and given back at once when asked to."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE_BYTES = 4096  # what O_DIRECT needs of a buffer's address and length, on any disk of today
_LARGE_PAGE_BYTES = 2 << 20
RELEASE_BYTES = max(
    PAGE_BYTES, mmap.PAGESIZE
)  # what can be given back alone: 16 KiB on some Arm systems, a Raspberry Pi 5's for one
_CHUNK_BYTES = 64 << 20  # bytes of memory that neighbours have in common, at least


class Pages:
    """Zeroed memory of its own, not touched until used: `array`, uint8 [nbytes], whose address is a multiple of 4096.

    Only whole large pages are asked for as such, so that what is touched is never more than `nbytes`, and `release` gives
    all of it back: a large page of which a part is released stays with the process. Raises MemoryError.
    """

    def __init__(self, nbytes: int, *, large: bool = True) -> None:
        """Unless `large`, it is in pages of 4096, so that memory which is used here and there is taken where it is used."""
        # Large pages begin at multiples of their size, so there is room to begin at one; room that is not touched costs
        # nothing.
        slack = _LARGE_PAGE_BYTES if large and nbytes >= _LARGE_PAGE_BYTES else 0
        try:
            self._memory = mmap.mmap(-1, max(nbytes + slack, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"no memory for {nbytes} bytes") from error
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        self._start = start = -whole.ctypes.data % _LARGE_PAGE_BYTES if slack else 0
        self.array: Bytes = whole[start : start + nbytes]
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
                if slack:
                    self._memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _LARGE_PAGE_BYTES * _LARGE_PAGE_BYTES)

    def release(self, first: int = 0, last: int | None = None) -> None:
        """Give the memory back to the system now, of all bytes or of those from `first`, where a page begins, to `last`;
        they are zeros afterwards, and take memory again when they are written."""
        last = self.array.size if last is None else last
        if last > first:
            self._memory.madvise(mmap.MADV_DONTNEED, self._start + first, last - first)


class BufferPool:
    """Memory for arrays of these sizes, taken and given back one by one; each begins at a multiple of 4096.

    Neighbours share large pages, so that hardly any of the memory is in small ones, in which a processor reads weights
    15 % slower. If they are taken and given back like a stack, what is taken is at most a large page more than is in use.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._at: list[tuple[int, int]] = []  # of a place: its chunk, and where it begins there
        self._chunks: list[int] = []  # bytes
        for size in sizes:
            if not self._chunks or self._chunks[-1] >= _CHUNK_BYTES:
                self._chunks.append(0)
            self._at.append((len(self._chunks) - 1, self._chunks[-1]))
            self._chunks[-1] += -(-size // RELEASE_BYTES) * RELEASE_BYTES
        self._pages: dict[int, Pages] = {}  # of a chunk
        self._taken: set[int] = set()

    def take(self, index: int) -> Bytes:
        """The memory of that place, which is not taken yet: uint8 [sizes[index]]."""
        assert index not in self._taken
        chunk, first = self._at[index]
        if chunk not in self._pages:
            self._pages[chunk] = Pages(self._chunks[chunk])
        self._taken.add(index)
        return self._pages[chunk].array[first : first + self._sizes[index]]

    def release(self, index: int) -> None:
        """Give that place back; who has its array sees zeros."""
        chunk, first = self._at[index]
        self._taken.remove(index)
        self._pages[chunk].release(first, first + self._sizes[index])

    def release_all(self) -> None:
        """Give back whatever is taken."""
        for pages in self._pages.values():
            pages.release()
        self._taken.clear()


def aligned_buffer(nbytes: int) -> Bytes:
    """The array of new Pages, which live as long as it does. uint8 [nbytes]"""
    return Pages(nbytes).array
