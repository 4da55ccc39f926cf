"""Reading: pieces that cover what is wanted, the right bytes on every file system, and a page cache that stays empty."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.direct_io_cases import CONTENT, ODD, SIZE
from tpimpi.system.buffers import PAGE_BYTES, Bytes, aligned_buffer
from tpimpi.system.direct_io import (
    READ_BYTES,
    Descriptor,
    Extent,
    open_direct,
    pieces,
)

pytestmark = pytest.mark.alone


# Pieces


@given(
    st.lists(
        st.tuples(st.integers(0, 1 << 40), st.integers(0, 20 * READ_BYTES), st.integers(1, 9 * READ_BYTES)), max_size=5
    )
)
def test_pieces_cover_extents_exactly(given_extents: list[tuple[int, int, int]]) -> None:
    extents = [Extent(offset, start, start + size) for offset, start, size in given_extents]
    cut = iter(pieces(extents))
    for extent in extents:
        position = extent.start
        while position < extent.stop:
            piece = next(cut)
            assert piece.start == position < piece.stop <= min(position + READ_BYTES, extent.stop)
            assert piece.offset - extent.offset == piece.start - extent.start
            position = piece.stop
    assert next(cut, None) is None


def test_a_piece_is_cut_only_where_it_must_be() -> None:
    extent = Extent(PAGE_BYTES, 2 * PAGE_BYTES, 2 * PAGE_BYTES + 2 * READ_BYTES + 5)
    assert list(pieces([extent])) == [
        Extent(PAGE_BYTES, 2 * PAGE_BYTES, 2 * PAGE_BYTES + READ_BYTES),
        Extent(PAGE_BYTES + READ_BYTES, 2 * PAGE_BYTES + READ_BYTES, 2 * PAGE_BYTES + 2 * READ_BYTES),
        Extent(PAGE_BYTES + 2 * READ_BYTES, 2 * PAGE_BYTES + 2 * READ_BYTES, 2 * PAGE_BYTES + 2 * READ_BYTES + 5),
    ]
    assert list(pieces([Extent(7, 9, 9)])) == []


# Reading


def _read(file: Descriptor, extents: list[Extent], nbytes: int) -> Bytes:
    buffer = aligned_buffer(nbytes)
    for piece in pieces(extents):
        file.read(piece, buffer)
    return buffer


def test_a_whole_file_whose_end_is_within_a_page(file: Descriptor) -> None:
    assert file.stat().st_size == SIZE
    for room in (SIZE, -(-SIZE // PAGE_BYTES) * PAGE_BYTES):
        assert np.array_equal(_read(file, [Extent(0, 0, SIZE)], room)[:SIZE], CONTENT)


@pytest.mark.parametrize(
    "extent",
    [
        Extent(SIZE - ODD, 0, ODD),  # the end of the file, from a page on
        Extent(SIZE - ODD - PAGE_BYTES, PAGE_BYTES, 2 * PAGE_BYTES + ODD),
        Extent(SIZE - 3, 0, 3),
        Extent(PAGE_BYTES, 0, 100),  # ends within a page
        Extent(PAGE_BYTES, PAGE_BYTES, PAGE_BYTES + READ_BYTES + 1),
        Extent(PAGE_BYTES + 512, 0, PAGE_BYTES),  # begins within a page of the file
        Extent(77, 0, READ_BYTES + 77),
        Extent(PAGE_BYTES, 100, PAGE_BYTES + 100),  # begins within a page of the buffer
        Extent(1, 1, 2),
    ],
)
def test_any_place_and_length(file: Descriptor, extent: Extent) -> None:
    room = -(-extent.stop // PAGE_BYTES) * PAGE_BYTES + 2 * PAGE_BYTES
    buffer = aligned_buffer(room)
    buffer[:] = 170
    for piece in pieces([extent]):
        file.read(piece, buffer)
    assert np.array_equal(buffer[extent.start : extent.stop], CONTENT[extent.offset :][: extent.stop - extent.start])
    assert (buffer[: extent.start] == 170).all(), "nothing before it is written over"
    assert (buffer[-(-extent.stop // PAGE_BYTES) * PAGE_BYTES :] == 170).all(), "nor after its last page"


def test_a_buffer_that_ends_within_a_page(file: Descriptor) -> None:
    for nbytes in (1, 511, 5000, READ_BYTES + 5000):
        assert np.array_equal(_read(file, [Extent(PAGE_BYTES, 0, nbytes)], nbytes), CONTENT[PAGE_BYTES:][:nbytes])


@given(
    st.integers(0, 5 * PAGE_BYTES),
    st.integers(0, 2 * PAGE_BYTES),
    st.one_of(st.integers(0, 3 * PAGE_BYTES), st.integers(SIZE - 6 * PAGE_BYTES, SIZE)),
)
def test_any_bytes_are_the_right_ones(on_disk: Path, offset: int, start: int, nbytes: int) -> None:
    nbytes = min(nbytes, SIZE - offset)
    file = Descriptor(on_disk)
    try:
        buffer = _read(file, [Extent(offset, start, start + nbytes)], start + nbytes)
    finally:
        file.close()
    assert np.array_equal(buffer[start:], CONTENT[offset : offset + nbytes])


@pytest.mark.parametrize(
    ("extent", "end"),
    [
        (Extent(SIZE - ODD, 0, ODD + 1), SIZE),
        (Extent(SIZE - ODD, 0, 2 * PAGE_BYTES), SIZE),
        (Extent(SIZE - 1, 0, 2), SIZE),
        (Extent(SIZE - ODD + PAGE_BYTES, 0, 1), SIZE - ODD + PAGE_BYTES),
        (Extent(1 << 40, 0, PAGE_BYTES), 1 << 40),
    ],
)
def test_a_file_that_ends_before_is_an_eof_error(file: Descriptor, extent: Extent, end: int) -> None:
    with pytest.raises(EOFError, match=f"it ends at byte {end}$"):
        _read(file, [extent], -(-extent.stop // PAGE_BYTES) * PAGE_BYTES)


def test_a_file_that_is_cut_off_while_it_is_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(CONTENT.tobytes())
    file = Descriptor(path)
    os.truncate(path, READ_BYTES + 10)
    try:
        with pytest.raises(EOFError, match=f"it ends at byte {READ_BYTES + 10}$"):
            _read(file, [Extent(0, 0, SIZE)], SIZE)
        os.truncate(path, 0)
        with pytest.raises(EOFError, match=r"it ends at byte 0$"):
            _read(file, [Extent(0, 0, PAGE_BYTES)], PAGE_BYTES)
    finally:
        file.close()


def test_it_goes_on_where_the_system_gave_less_than_was_asked(file: Descriptor, monkeypatch) -> None:
    whole = os.preadv

    def in_parts(descriptor: int, buffers: list[Bytes], offset: int) -> int:
        return whole(descriptor, [buffers[0][: 3 * PAGE_BYTES]], offset)

    monkeypatch.setattr(os, "preadv", in_parts)
    assert np.array_equal(_read(file, [Extent(0, 0, SIZE)], SIZE + PAGE_BYTES)[:SIZE], CONTENT)


def test_several_threads_at_once(file: Descriptor) -> None:
    buffer, cut = aligned_buffer(-(-SIZE // PAGE_BYTES) * PAGE_BYTES), list(pieces([Extent(0, 0, SIZE)]))
    for _ in range(5):
        buffer[:] = 0
        threads = [threading.Thread(target=file.read, args=(piece, buffer)) for piece in cut]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert np.array_equal(buffer[:SIZE], CONTENT)


def test_a_row_from_any_place(file: Descriptor) -> None:
    for offset, nbytes in ((0, 1), (5001, 3000), (SIZE - 7, 7)):
        row = np.empty(nbytes, np.uint8)
        file.read_plain(row, offset)
        assert np.array_equal(row, CONTENT[offset : offset + nbytes])
    with pytest.raises(EOFError):
        file.read_plain(np.empty(8, np.uint8), SIZE - 7)


def test_descriptors_are_closed(on_disk: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    Descriptor(on_disk).close()
    with pytest.raises(FileNotFoundError):
        Descriptor(on_disk.with_name("gone"))
    with pytest.raises(IsADirectoryError):
        _read(Descriptor(on_disk.parent), [Extent(0, 0, 1)], 1)
    descriptor, _ = open_direct(on_disk)
    os.close(descriptor)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2, "of the directory, until it is collected"


# The page cache

AHEAD = 32  # pages that the kernel reads ahead, by its usual setting (128 KB)


def _cached(path: Path) -> int:
    """Pages of a file that the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as memory:
        address = ctypes.addressof(hold := ctypes.c_char.from_buffer(memory))
        flags = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        failed = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), flags)
        del hold
    if failed:
        pytest.skip(f"mincore: {os.strerror(ctypes.get_errno())}")
    return sum(flag & 1 for flag in flags)


@pytest.fixture
def cold(on_disk: Path) -> Path:
    """The file on disk with none of it in the page cache; skips where that cannot be had or told."""
    with on_disk.open("rb") as file:
        file.read()
        if _cached(on_disk) < SIZE // mmap.PAGESIZE:
            pytest.skip("this file system does not tell what the page cache holds")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if _cached(on_disk):
        pytest.skip("this file system does not let go of the page cache")
    return on_disk


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("extents", "left"),
    [
        ([Extent(0, 0, SIZE)], 0),
        ([Extent(5 * PAGE_BYTES, 0, READ_BYTES)], 0),
        ([Extent(SIZE - ODD, 0, ODD)], 0),
        ([Extent(offset, 0, 3000) for offset in range(10_000, SIZE - 3000, 400_000)], 0),
        # Not on a page, so not past the page cache; and of two reads in a row, after which the kernel reads ahead.
        ([Extent(READ_BYTES + 77, 0, READ_BYTES + 77)], AHEAD),
    ],
)
def test_reading_leaves_the_page_cache_empty(cold: Path, monkeypatch, direct: bool, extents, left: int) -> None:
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    file = Descriptor(cold)
    try:
        for extent in extents:
            nbytes = extent.stop - extent.start
            assert np.array_equal(_read(file, [extent], nbytes)[:nbytes], CONTENT[extent.offset :][:nbytes])
    finally:
        file.close()
    assert _cached(cold) <= left


def test_a_read_past_the_page_cache_fills_none_of_it_meanwhile(cold: Path, monkeypatch) -> None:
    file = Descriptor(cold)
    monkeypatch.setattr(file, "forget", lambda *place: None)
    try:
        if not file.direct:
            pytest.skip("the file system of the temporary folder has no O_DIRECT")
        _read(file, [Extent(0, 0, SIZE)], SIZE + PAGE_BYTES)
    finally:
        file.close()
    assert _cached(cold) == 0


def test_rows_that_are_forgotten_leave_the_page_cache(cold: Path) -> None:
    file = Descriptor(cold)
    row = np.empty(2176, np.uint8)
    for offset in range(3 * PAGE_BYTES + 100, SIZE - 4096, 300_000):
        file.read_plain(row, offset)
        file.forget(offset, row.nbytes)
    file.close()
    assert _cached(cold) == 0
