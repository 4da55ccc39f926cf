"""Memory for weights: aligned, zeroed, not touched before its time, and given back at once."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from tpimpi.system import buffers
from tpimpi.system.buffers import PAGE_BYTES, BufferPool, Bytes, Pages, aligned_buffer
from tpimpi.system.memory import resident_bytes

LARGE = 2 << 20
PAGEMAP = Path("/proc/self/pagemap")


def _present(array: Bytes) -> int:
    """How many of an array's pages, of 4096 bytes, are in memory."""
    # Documentation/admin-guide/mm/pagemap.rst: a uint64 for each page, bit 63: present, bit 62: swapped.
    first = array.ctypes.data // PAGE_BYTES
    last = -(-(array.ctypes.data + array.nbytes) // PAGE_BYTES)
    with PAGEMAP.open("rb", buffering=0) as file:
        file.seek(first * 8)
        entries = np.frombuffer(file.read((last - first) * 8), np.uint64)
    assert entries.size == last - first
    return int(np.count_nonzero(entries >> np.uint64(62)))


pages_can_be_told = pytest.mark.skipif(
    mmap.PAGESIZE != PAGE_BYTES or not PAGEMAP.exists(), reason="needs pages of 4096 bytes, and /proc/self/pagemap"
)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 4096, 4097, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 5000])
@pytest.mark.parametrize("large", [True, False])
def test_it_is_aligned_and_zero(nbytes: int, large: bool) -> None:
    array = Pages(nbytes, large=large).array
    assert (array.dtype, array.shape) == (np.uint8, (nbytes,))
    assert array.ctypes.data % PAGE_BYTES == 0
    assert not array.any()
    array[:] = 255
    assert array.all()
    assert aligned_buffer(nbytes).shape == (nbytes,) and aligned_buffer(nbytes).ctypes.data % PAGE_BYTES == 0


def test_two_never_overlap_and_one_outlives_its_pages() -> None:
    arrays = [aligned_buffer(100_000) for _ in range(20)]
    for number, array in enumerate(arrays):
        array[:] = number
    assert [set(array.tolist()) for array in arrays] == [{number} for number in range(20)]


@pages_can_be_told
@pytest.mark.parametrize("large", [True, False])
def test_released_memory_is_the_systems_at_once(large: bool) -> None:
    size = 64 << 20
    pages = Pages(size, large=large)
    for _ in range(3):
        pages.array[:] = 7
        with_it = resident_bytes()
        assert _present(pages.array) == size // PAGE_BYTES
        pages.release()
        assert _present(pages.array) == 0
        assert with_it - resident_bytes() > size // 2  # the kernel's own count is not exact
        assert not pages.array[:: PAGE_BYTES // 2].any()  # which reads zeros
    pages.array[5] = 1
    assert pages.array[:10].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


@pages_can_be_told
@pytest.mark.parametrize(
    "nbytes", [PAGE_BYTES, LARGE - PAGE_BYTES, LARGE, 3 * LARGE + PAGE_BYTES, 5 * LARGE - PAGE_BYTES]
)
@pytest.mark.parametrize("large", [True, False])
def test_no_more_is_taken_than_was_asked_for(nbytes: int, large: bool) -> None:
    pages = Pages(nbytes, large=large)
    whole = np.frombuffer(pages._memory, np.uint8)
    assert _present(whole) == 0, "nothing before it is used"
    pages.array[:] = 1
    assert _present(whole) == nbytes // PAGE_BYTES


@pages_can_be_told
def test_small_pages_are_taken_one_by_one() -> None:
    pages = Pages(8 * LARGE, large=False)
    pages.array[:: 2 * LARGE] = 1
    assert _present(pages.array) == 4


@pytest.mark.parametrize("nbytes", [1 << 62, 1 << 70])
def test_what_no_machine_has_is_a_memory_error(nbytes: int) -> None:
    with pytest.raises(MemoryError):
        Pages(nbytes)


@pages_can_be_told
def test_places_keep_to_themselves_and_take_a_large_page_more_at_most() -> None:
    rng = np.random.default_rng(3)
    sizes = [int(size) for size in rng.integers(1, 5 * LARGE, 60)]  # several chunks
    places = BufferPool(sizes)
    taken: dict[int, Bytes] = {}

    def check() -> None:
        for index, array in taken.items():
            assert array.size == sizes[index] and array.ctypes.data % PAGE_BYTES == 0
            assert array[0] == array[-1] == index and not np.any(array != index)
        in_use = sum(-(-sizes[index] // PAGE_BYTES) * PAGE_BYTES for index in taken)
        present = sum(_present(pages.array) for pages in places._pages.values()) * PAGE_BYTES
        assert in_use <= present <= in_use + LARGE

    for most in (60, 7, 41, 0, 60):  # like a stack
        for index in rng.permutation(most):  # in any order, up to there
            if int(index) not in taken:
                taken[int(index)] = places.take(int(index))
                taken[int(index)][:] = index
        for index in sorted(index for index in taken if index >= most):
            del taken[index]
            places.release(index)
        check()
    places.release_all()
    assert not any(array.any() for array in taken.values())
    places.release_all()
    assert not places.take(0).any()


def test_places_begin_where_the_system_has_larger_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a system with pages of 16 KiB (a Raspberry Pi 5), madvise refuses what does not begin at one of them."""
    monkeypatch.setattr(buffers, "RELEASE_BYTES", 16384)
    places = BufferPool([5000, 20_000, 1, 16_384])
    arrays = [places.take(index) for index in range(4)]
    first = arrays[0].ctypes.data
    assert [array.ctypes.data - first for array in arrays] == [0, 16_384, 49_152, 65_536]
