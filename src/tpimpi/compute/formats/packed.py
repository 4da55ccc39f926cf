"""Weight matrices in packed form and rows in row form, whatever their format (see `base` for the two forms)."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.base import LINE_BYTES, PANEL_ROWS, SLAB_BYTES, Quantizer
from tpimpi.compute.formats.quantize import quantize


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] in packed form."""

    format: str  # one of WEIGHT_FORMATS
    rows: int
    columns: int
    data: Bytes  # [packed_bytes(format, rows, columns, first)], contiguous; 64-byte aligned from `pack` or a tile
    first: int = 0  # where in a block of 256 the first column stands (see `base`)


def weight_bytes(fmt: str) -> float:
    """Size of one weight in bytes: 4 (f32), 2 (bf16), 1.0625 (q8_0), 0.5625 (q4_0), …"""
    return FORMATS[fmt].weight_bytes


def row_bytes(fmt: str, columns: int, first: int = 0) -> int:
    """Bytes of a row in row form."""
    return FORMATS[fmt].row_bytes(columns, first)


def panel_bytes(fmt: str, columns: int, first: int = 0) -> int:
    """Bytes of a panel of 16 rows in packed form, a multiple of 64."""
    return FORMATS[fmt].panel_bytes(columns, first)


@functools.lru_cache(maxsize=1024)  # a mixture's slices have thousands of tiles of a few sizes
def packed_bytes(fmt: str, rows: int, columns: int, first: int = 0) -> int:
    """Bytes of a matrix in packed form."""
    return _panels(rows) * panel_bytes(fmt, columns, first)


def _panels(rows: int) -> int:
    return -(-rows // PANEL_ROWS)


def runs_of_rows(matrix: Matrix, numbers: int) -> Iterator[tuple[int, Matrix]]:
    """The matrix in runs of whole panels, of about so many numbers each: (first row, a view of the run)."""
    step = max(1, numbers // max(1, PANEL_ROWS * matrix.columns))
    width = panel_bytes(matrix.format, matrix.columns, matrix.first)
    for first in range(0, _panels(matrix.rows), step):
        rows = min(step * PANEL_ROWS, matrix.rows - first * PANEL_ROWS)
        data = matrix.data[first * width : (first + _panels(rows)) * width]
        yield first * PANEL_ROWS, Matrix(matrix.format, rows, matrix.columns, data, matrix.first)


# Row form <-> packed form


def pack(stored: Bytes, fmt: str, columns: int, first: int = 0) -> Matrix:
    """Row form, uint8 [rows, row_bytes], to packed form; exact. Peak memory: the result and a few MB.

    By the kernels where they are installed, else by `pack_with_numpy`, to the same bytes.
    """
    native = _native_pack()
    if native is None or stored.strides[1] != 1 or stored.strides[0] < 0:
        return pack_with_numpy(stored, fmt, columns, first)
    rows = len(stored)
    data = _aligned(np.empty, packed_bytes(fmt, rows, columns, first))
    native(FORMATS[fmt].kernel_code, stored, columns, first, data)
    return Matrix(fmt, rows, columns, data, first)


@functools.cache
def _native_pack() -> Callable[[int, Bytes, int, int, Bytes], None] | None:
    if importlib.util.find_spec("tpimpi._native") is None:
        return None
    from tpimpi._native import pack

    return pack


def pack_with_numpy(stored: Bytes, fmt: str, columns: int, first: int = 0) -> Matrix:
    """What `pack` does, with NumPy: the kernels' twin."""
    rows, width = stored.shape
    assert stored.dtype == np.uint8 and width == row_bytes(fmt, columns, first), (stored.dtype, width, fmt, columns)
    panels = _aligned(np.zeros, packed_bytes(fmt, rows, columns, first)).reshape(_panels(rows), -1)
    for panel, last in _panel_runs(rows, width):
        block = stored[panel * PANEL_ROWS : last * PANEL_ROWS]
        present = block.shape[0]
        if present < (last - panel) * PANEL_ROWS:
            block = np.concatenate([block, np.zeros(((last - panel) * PANEL_ROWS - present, width), np.uint8)])
        block = np.ascontiguousarray(block).reshape(last - panel, PANEL_ROWS, width)
        FORMATS[fmt].pack_panels(block, present, panels[panel:last], columns, first)
    return Matrix(fmt, rows, columns, panels.reshape(-1), first)


def unpack(matrix: Matrix) -> Bytes:
    """Packed form to row form, uint8 [rows, row_bytes]; exact. Peak memory: the result and a few MB."""
    fmt, rows, columns, first = matrix.format, matrix.rows, matrix.columns, matrix.first
    width = row_bytes(fmt, columns, first)
    panels = matrix.data.reshape(_panels(rows), panel_bytes(fmt, columns, first))
    out = np.empty((rows, width), np.uint8)
    for panel, last in _panel_runs(rows, width):
        target = out[panel * PANEL_ROWS : last * PANEL_ROWS]
        target[:] = FORMATS[fmt].unpack_panels(panels[panel:last], columns, first)[: target.shape[0]]
    return out


def _panel_runs(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs of panels [first, last) of about SLAB_BYTES each."""
    panels = _panels(rows)
    step = max(1, SLAB_BYTES // max(1, PANEL_ROWS * width))
    return ((first, min(first + step, panels)) for first in range(0, panels, step))


def _aligned(make: Callable[[int, type[np.uint8]], Bytes], nbytes: int) -> Bytes:
    memory = make(nbytes + LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % LINE_BYTES
    return memory[start : start + nbytes]


# Numbers <-> row form


def encode(values: F32, fmt: str, quantizer: Quantizer = quantize) -> Bytes:
    """Numbers [rows, columns] in row form, uint8 [rows, row_bytes].

    f32 is as it is, bf16 and f16 are rounded, the others quantized. Peak memory: the result and a few MB; where columns are
    no multiple of the format's block, also a copy of the values.
    ValueError for finite numbers larger than any that the format has (in all but f32 and bf16), in quantized formats also
    for those that are not finite.
    """
    return FORMATS[fmt].encode(np.ascontiguousarray(values, dtype="<f4"), quantizer)


def decode(stored: Bytes, fmt: str, columns: int, first: int = 0) -> F32:
    """Row form, uint8 [rows, row_bytes], as numbers: f32 [rows, columns], contiguous. Exact; f32 is not copied.

    Peak memory: the result and a few MB.
    """
    return FORMATS[fmt].decode(stored, columns, first)


def values(matrix: Matrix) -> F32:
    """The numbers of a matrix, f32 [rows, columns]; exact. Peak memory: the result, and the matrix in row form."""
    return decode(unpack(matrix), matrix.format, matrix.columns, matrix.first)


def holds_infinities(stored: Bytes, fmt: str) -> bool:
    """Whether a scale or minimum of quantized rows [rows, row_bytes] is infinite or NaN."""
    return FORMATS[fmt].holds_infinities(stored)
