"""GGML's q5_0: a weight is d * (q - 16), with a code q of 0..31 for each and an f16 scale d for each 32.

A block is d, then 4 bytes of high bits, bit j of them column j's, then 16 bytes of low nibbles as in q4_0. Packed, a
block has a line of high bits, in the order of `join_bits`, then 4 lines of nibbles as in q4_0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search
from tpimpi.compute.formats.blocks_of_32 import PairedFormat, from_nibbles, join, nibbles
from tpimpi.compute.formats.words import line_to_rows_of_bits, rows_of_bits_to_line

_CANDIDATES = (-16, -16.5, -15.25, -16.75, -15.75, -17, -15, -15.5, 15.5, 16)  # see search.py


class PairedOf5Bits(PairedFormat):
    """What q5_0 and q5_1 have in common: their codes."""

    def to_lines(self, words: Array) -> Array:
        lines = words.copy()
        lines[..., 0] = rows_of_bits_to_line(words[..., 0])
        return lines

    def from_lines(self, words: Array) -> Array:
        rows = words.copy()
        rows[..., 0] = line_to_rows_of_bits(words[..., 0])
        return rows


def from_5_bits(codes: Bytes, out: F32) -> None:
    """Codes of blocks [..., 20], high bits and nibbles, as numbers of 0..31 into `out` [..., 32]."""
    from_nibbles(codes[..., 4:], out)
    out += np.unpackbits(codes[..., :4], axis=-1, bitorder="little") * np.float32(16)


def to_5_bits(codes: F32) -> Bytes:
    """Undoes `from_5_bits`, of blocks that are columns: codes [32, blocks] to bytes [20, blocks]."""
    whole = codes.astype(np.uint8)
    return np.concatenate([np.packbits(whole >> 4, axis=0, bitorder="little"), nibbles(whole & 15)])


class _Q50(PairedOf5Bits):
    def code_range(self) -> tuple[int, int]:
        return (-16, 15)

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) + np.float32(16)
        blocks = join([np.full(flat.shape[1], scale, np.float32)], to_5_bits(flat))
        return blocks.reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        top = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
        d, q = search.search_scale(x, top, -16, _CANDIDATES, (-16, 15))
        return join([d], to_5_bits(q + np.float32(16)))

    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        from_5_bits(codes, out)
        out -= 16
        out *= numbers


Q5_0 = _Q50(
    name="q5_0",
    kernel_code=10,
    block_bytes=22,
    f16_offsets=(0,),
    largest=65504.0 * 16,
    activation_type="int8",
    head_format="q8_0",
)
