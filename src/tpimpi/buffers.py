"""Memory for weights: page-aligned, in large pages where the system has them, and given back at once when asked to."""

from __future__ import annotations

import contextlib
import mmap

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

PAGE = 4096  # what O_DIRECT needs of a buffer's address and length, on any disk of today
_LARGE_PAGE = 2 << 20


class Pages:
    """Zeroed memory of its own, not touched until used: `array`, uint8 [nbytes], whose address is a multiple of 4096.

    Only whole large pages are asked for as such, so that what is touched is never more than `nbytes`, and `release` gives
    all of it back: a large page of which a part is released stays with the process. Raises MemoryError.
    """

    def __init__(self, nbytes: int, *, large: bool = True) -> None:
        """Unless `large`, it is in pages of 4096, so that memory which is used here and there is taken where it is used."""
        # Large pages begin at multiples of their size, so there is room to begin at one; room that is not touched costs
        # nothing.
        slack = _LARGE_PAGE if large and nbytes >= _LARGE_PAGE else 0
        try:
            self._memory = mmap.mmap(-1, max(nbytes + slack, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(f"no memory for {nbytes} bytes") from error
        whole = np.frombuffer(self._memory, dtype=np.uint8)
        start = -whole.ctypes.data % _LARGE_PAGE if slack else 0
        self.array: Bytes = whole[start : start + nbytes]
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                self._memory.madvise(mmap.MADV_NOHUGEPAGE)
                if slack:
                    self._memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes // _LARGE_PAGE * _LARGE_PAGE)

    def release(self) -> None:
        """Give the memory back to the system now; `array` is zeros afterwards, and takes memory again when it is written."""
        self._memory.madvise(mmap.MADV_DONTNEED)


def aligned_buffer(nbytes: int) -> Bytes:
    """The array of new Pages, which live as long as it does. uint8 [nbytes]"""
    return Pages(nbytes).array
