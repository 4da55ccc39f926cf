"""Weight formats: how the numbers of a matrix are stored, one row after another, and packed for the kernels.

`f32` is IEEE 754 binary32, `bf16` its upper 16 bits. `q8_0`, `q4_0` and `q4_1` are GGML's: blocks of 32 weights along a row,
each with an f16 scale d, and for q4_1 an f16 minimum m. A weight w and its code q:

    q8_0    w = d * q          q in -128..127, int8 (GGML and `quantize` use -127..127)
    q4_0    w = d * (q - 8)    q in 0..15
    q4_1    w = d * q + m      q in 0..15

All is little-endian. A matrix [rows, columns] has two forms:

Row form, as in GGUF and safetensors files: uint8 [rows, row_bytes]. f32 and bf16 are plain; a row of a quantized format is
GGML's blocks one after another: d (2 bytes), for q4_1 m (2 bytes), then the codes: q8_0 32 bytes; q4_0 and q4_1 16 bytes, of
which byte j holds column j in its low and column 16 + j in its high nibble. Where `columns` is no multiple of 32, the last
block is filled up with zeros before it is quantized.

Packed form: panels of 16 rows, one after another; rows that are not there are zero bytes. A panel is made of lines of 64
bytes: 16 words of 4 bytes, one of each row, in order.

    f32     line j is column j.
    bf16    line j is columns 2j and 2j + 1; an odd last column is followed by zero.
    q8_0    The blocks are taken in pairs; if their number is odd, the last pair is one block. A pair is: a line of scales
            (16 f16 of the first block, one of each row, then 16 of the second, or zeros); then 8 lines of the first block,
            then 8 of the second. Line j of a block is columns 4j to 4j + 3, as unsigned bytes q + 128.
    q4_0    The same with 4 lines a block: line j is GGML's bytes 4j to 4j + 3.
    q4_1    The same as q4_0, with a line of minima, laid out as the scales, after each line of scales.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats.bf16 import SLAB_BYTES, from_bf16, to_bf16
from tpimpi.compute.formats.quantize import Quantizer, quantize

WEIGHT_FORMATS = ("f32", "bf16", "q8_0", "q4_0", "q4_1")
PANEL_ROWS = 16
BLOCK_WEIGHTS = 32
_LINE_BYTES = 64
# Magnitudes that a quantized format has at the largest f16 scale (of either sign, q4_1: and minimum).
LARGEST = {"q8_0": 65504.0 * 127, "q4_0": 65504.0 * 8, "q4_1": 65504.0}
_PLAIN_BYTES = {"f32": 4, "bf16": 2}  # of one number


@dataclass(frozen=True)
class _BlockLayout:
    """Of a quantized block: its f16 numbers (d, or d and m), and its 4-byte words of codes."""

    numbers: int
    words: int

    @property
    def nbytes(self) -> int:
        return 2 * self.numbers + 4 * self.words


_BLOCKS = {"q8_0": _BlockLayout(1, 8), "q4_0": _BlockLayout(1, 4), "q4_1": _BlockLayout(2, 4)}
_SIGN_BITS = np.uint32(0x80808080)  # exclusive or: int8 q <-> unsigned q + 128, four at once


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [rows, columns] in packed form."""

    format: str  # one of WEIGHT_FORMATS
    rows: int
    columns: int
    data: Bytes  # [packed_bytes(format, rows, columns)], contiguous; 64-byte aligned from `pack` or a tile


def is_quantized(fmt: str) -> bool:
    """Whether the format has blocks."""
    return fmt in _BLOCKS


def weight_bytes(fmt: str) -> float:
    """Size of one weight: 4, 2, 1.0625 (q8_0), 0.5625 (q4_0) or 0.625 (q4_1) bytes."""
    return _BLOCKS[fmt].nbytes / BLOCK_WEIGHTS if fmt in _BLOCKS else _PLAIN_BYTES[fmt]


def row_bytes(fmt: str, columns: int) -> int:
    """Bytes of a row in row form."""
    return _blocks(columns) * _BLOCKS[fmt].nbytes if fmt in _BLOCKS else columns * _PLAIN_BYTES[fmt]


def panel_bytes(fmt: str, columns: int) -> int:
    """Bytes of a panel of 16 rows in packed form, a multiple of 64."""
    if fmt == "f32":
        return columns * _LINE_BYTES
    if fmt == "bf16":
        return -(-columns // 2) * _LINE_BYTES
    block, blocks = _BLOCKS[fmt], _blocks(columns)
    return (block.numbers * -(-blocks // 2) + block.words * blocks) * _LINE_BYTES


def packed_bytes(fmt: str, rows: int, columns: int) -> int:
    """Bytes of a matrix in packed form."""
    return _panels(rows) * panel_bytes(fmt, columns)


def _blocks(columns: int) -> int:
    return -(-columns // BLOCK_WEIGHTS)


def _panels(rows: int) -> int:
    return -(-rows // PANEL_ROWS)


def runs_of_rows(matrix: Matrix, numbers: int) -> Iterator[tuple[int, Matrix]]:
    """The matrix in runs of whole panels, of about so many numbers each: (first row, a view of the run)."""
    step = max(1, numbers // max(1, PANEL_ROWS * matrix.columns))
    width = panel_bytes(matrix.format, matrix.columns)
    for first in range(0, _panels(matrix.rows), step):
        rows = min(step * PANEL_ROWS, matrix.rows - first * PANEL_ROWS)
        data = matrix.data[first * width : (first + _panels(rows)) * width]
        yield first * PANEL_ROWS, Matrix(matrix.format, rows, matrix.columns, data)


# Row form <-> packed form


def pack(stored: Bytes, fmt: str, columns: int) -> Matrix:
    """Row form, uint8 [rows, row_bytes], to packed form; exact. Peak memory: the result and a few MB."""
    rows, width = stored.shape
    assert stored.dtype == np.uint8 and width == row_bytes(fmt, columns), (stored.dtype, width, fmt, columns)
    panels = _aligned_zeros(packed_bytes(fmt, rows, columns)).reshape(_panels(rows), panel_bytes(fmt, columns))
    for first, last in _panel_runs(rows, width):
        block = stored[first * PANEL_ROWS : last * PANEL_ROWS]
        there = block.shape[0]
        if there < (last - first) * PANEL_ROWS:
            block = np.concatenate([block, np.zeros(((last - first) * PANEL_ROWS - there, width), np.uint8)])
        _pack_run(np.ascontiguousarray(block).reshape(last - first, PANEL_ROWS, width), there, fmt, panels[first:last])
    return Matrix(fmt, rows, columns, panels.reshape(-1))


def _pack_run(block: Bytes, there: int, fmt: str, out: Bytes) -> None:
    """Pack `block` [panels, 16, row_bytes], of which `there` rows exist, into `out` [panels, panel_bytes], zeroed."""
    panels = block.shape[0]
    if fmt not in _BLOCKS:
        if block.shape[2] % 4:  # bf16, an odd number of columns
            block = np.concatenate([block, np.zeros((panels, PANEL_ROWS, 2), np.uint8)], axis=2)
        out.view("<u4").reshape(panels, -1, PANEL_ROWS)[:] = block.view("<u4").transpose(0, 2, 1)
        return
    numbers, codes = _numbers_and_codes(block, fmt)
    words = np.ascontiguousarray(codes).view("<u4")
    if fmt == "q8_0":
        words ^= _SIGN_BITS
        words.reshape(panels * PANEL_ROWS, -1)[there:] = 0
    for first, last, number_lines, word_lines in _pair_lines(out, fmt, words.shape[2]):
        pairs, _, per_pair, _ = number_lines.shape[1:]
        kinds, lines = number_lines.shape[2], word_lines.shape[2]
        number_lines[:] = (
            numbers[:, :, first:last].reshape(panels, PANEL_ROWS, pairs, per_pair, kinds).transpose(0, 2, 4, 3, 1)
        )
        word_lines[:] = words[:, :, first:last].reshape(panels, PANEL_ROWS, pairs, lines).transpose(0, 2, 3, 1)


def unpack(matrix: Matrix) -> Bytes:
    """Packed form to row form, uint8 [rows, row_bytes]; exact. Peak memory: the result and a few MB."""
    fmt, rows, columns = matrix.format, matrix.rows, matrix.columns
    width = row_bytes(fmt, columns)
    panels = matrix.data.reshape(_panels(rows), panel_bytes(fmt, columns))
    out = np.empty((rows, width), np.uint8)
    for first, last in _panel_runs(rows, width):
        target = out[first * PANEL_ROWS : last * PANEL_ROWS]
        target[:] = _unpack_run(panels[first:last], fmt, columns)[: target.shape[0]]
    return out


def _unpack_run(run: Bytes, fmt: str, columns: int) -> Bytes:
    """Panels [panels, panel_bytes] in row form, [panels * 16, row_bytes]."""
    panels, width = run.shape[0], row_bytes(fmt, columns)
    if fmt not in _BLOCKS:
        words = np.ascontiguousarray(run.view("<u4").reshape(panels, -1, PANEL_ROWS).transpose(0, 2, 1))
        return words.view(np.uint8).reshape(panels * PANEL_ROWS, -1)[:, :width]
    block = np.empty((panels, PANEL_ROWS, width), np.uint8)
    numbers, codes = _numbers_and_codes(block, fmt)
    blocks = numbers.shape[2]
    for first, last, number_lines, word_lines in _pair_lines(run, fmt, blocks):
        shape = (panels, PANEL_ROWS, last - first, -1)
        numbers[:, :, first:last] = number_lines.transpose(0, 4, 1, 3, 2).reshape(shape)
        words = np.ascontiguousarray(word_lines.transpose(0, 3, 1, 2)).reshape(shape)
        if fmt == "q8_0":
            words ^= _SIGN_BITS
        codes[:, :, first:last] = words.view("<u2")
    return block.reshape(panels * PANEL_ROWS, width)


def _numbers_and_codes(block: Bytes, fmt: str) -> tuple[Array, Array]:
    """Views of quantized rows [..., row_bytes] as uint16: numbers [..., blocks, 1 or 2], codes [..., blocks, 2 * words]."""
    layout = _BLOCKS[fmt]
    halves = block.view("<u2").reshape(*block.shape[:-1], -1, layout.nbytes // 2)
    return halves[..., : layout.numbers], halves[..., layout.numbers :]


def _pair_lines(panels: Bytes, fmt: str, blocks: int) -> Iterator[tuple[int, int, Array, Array]]:
    """Views of panels [panels, panel_bytes] for the whole pairs, then for the odd block, if there is one.

    (first block, last block, numbers uint16 [panels, pairs, 1 or 2, blocks a pair, 16], words uint32 [panels, pairs, lines
    of codes, 16]).
    """
    layout, count = _BLOCKS[fmt], panels.shape[0]
    first = line = 0
    for pairs, per_pair in ((blocks // 2, 2), (blocks % 2, 1)):
        if pairs:
            lines = layout.numbers + per_pair * layout.words
            run = panels[:, line * _LINE_BYTES : (line + pairs * lines) * _LINE_BYTES]
            words = run.view("<u4").reshape(count, pairs, lines, PANEL_ROWS)
            numbers = run.view("<u2").reshape(count, pairs, lines, 2, PANEL_ROWS)
            last = first + pairs * per_pair
            yield first, last, numbers[:, :, : layout.numbers, :per_pair], words[:, :, layout.numbers :]
            first, line = last, line + pairs * lines


def _panel_runs(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Runs of panels [first, last) of about SLAB_BYTES each."""
    panels = _panels(rows)
    step = max(1, SLAB_BYTES // max(1, PANEL_ROWS * width))
    return ((first, min(first + step, panels)) for first in range(0, panels, step))


def _aligned_zeros(nbytes: int) -> Bytes:
    memory = np.zeros(nbytes + _LINE_BYTES, np.uint8)
    start = -memory.ctypes.data % _LINE_BYTES
    return memory[start : start + nbytes]


# Numbers <-> row form


def encode(values: F32, fmt: str, quantizer: Quantizer = quantize) -> Bytes:
    """Numbers [rows, columns] in row form, uint8 [rows, row_bytes]: f32 as it is, bf16 rounded, the others quantized.

    Peak memory: the result and a few MB; where columns are no multiple of 32, also a copy of the values.
    In the quantized formats ValueError for numbers that are not finite, or larger than any that the format has.
    """
    values = np.ascontiguousarray(values, dtype="<f4")
    if fmt == "f32":
        return values.view(np.uint8)
    if fmt == "bf16":
        return to_bf16(values).view(np.uint8)
    if missing := -values.shape[1] % BLOCK_WEIGHTS:
        values = np.pad(values, ((0, 0), (0, missing)))
    if (greatest := max(values.max(initial=0), -values.min(initial=0))) > LARGEST[fmt] and np.isfinite(greatest):
        raise ValueError(f"holds {greatest:g}, and {fmt} nothing over {LARGEST[fmt]:g}")
    return quantizer(values, fmt)


def decode(stored: Bytes, fmt: str, columns: int) -> F32:
    """Row form, uint8 [rows, row_bytes], as numbers: f32 [rows, columns], contiguous. Exact; f32 is not copied.

    Peak memory: the result and a few MB.
    """
    if fmt == "f32":
        return stored.view("<f4")
    if fmt == "bf16":
        return from_bf16(stored.view("<u2"))
    out = np.empty((stored.shape[0], _blocks(columns) * BLOCK_WEIGHTS), np.float32)
    step = max(1, SLAB_BYTES // 4 // max(1, out.shape[1]))
    for first in range(0, stored.shape[0], step):
        _dequantize(np.ascontiguousarray(stored[first : first + step]), fmt, out[first : first + step])
    return np.ascontiguousarray(out[:, :columns])


def _dequantize(stored: Bytes, fmt: str, out: F32) -> None:
    """Quantized rows [rows, row_bytes] as numbers, into `out` [rows, blocks * 32]."""
    numbers, codes = _numbers_and_codes(stored, fmt)
    d = np.ascontiguousarray(numbers[..., :1]).view("<f2").astype(np.float32)  # [rows, blocks, 1]
    codes = np.ascontiguousarray(codes).view(np.uint8)  # [rows, blocks, 32 or 16]
    w = out.reshape(*codes.shape[:2], BLOCK_WEIGHTS)
    with np.errstate(over="ignore", invalid="ignore"):  # scales that a hostile file holds; they are refused elsewhere
        if fmt == "q8_0":
            np.multiply(codes.view(np.int8), d, out=w)
            return
        half = BLOCK_WEIGHTS // 2
        w[..., :half], w[..., half:] = codes & 15, codes >> 4
        if fmt == "q4_0":
            w -= 8
        w *= d
        if fmt == "q4_1":
            w += np.ascontiguousarray(numbers[..., 1:]).view("<f2").astype(np.float32)


def values(matrix: Matrix) -> F32:
    """The numbers of a matrix, f32 [rows, columns]; exact. Peak memory: the result, and the matrix in row form."""
    return decode(unpack(matrix), matrix.format, matrix.columns)


def holds_infinities(stored: Bytes, fmt: str) -> bool:
    """Whether a scale or minimum of quantized rows [rows, row_bytes] is infinite or NaN."""
    numbers, _ = _numbers_and_codes(stored, fmt)
    return bool(((numbers & 0x7C00) == 0x7C00).any())
