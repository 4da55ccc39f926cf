"""GGML's q4_0: a weight is d * (q - 8), with a code q of 0..15 for each and an f16 scale d for each 32.

A block is d (2 bytes), then 16 bytes of codes, of which byte j holds column j in its low and column 16 + j in its high
nibble. Packed, a block has 4 lines of codes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import search
from tpimpi.compute.formats.blocks_of_32 import PairedFormat, from_nibbles, join, nibbles

_CODES = (-8, 7)
CANDIDATES = (-8, -8.5, -7.25, -8.75, -7.75, -8.25, -9, -7, -7.5, 7.5, -6.75, 8)  # see search.py


class _Q40(PairedFormat):
    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        from_nibbles(codes, out)
        out -= 8
        out *= numbers

    def quantize_blocks(self, x: F32) -> Bytes:
        top = x[np.abs(x).argmax(axis=0), np.arange(x.shape[1])]
        d, q = search.search_scale(x, top, -8, CANDIDATES, _CODES)
        return join([d], nibbles(q + np.float32(8)))

    def code_range(self) -> tuple[int, int]:
        return _CODES

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T + np.int8(8)
        return join([np.full(flat.shape[1], scale, np.float32)], nibbles(flat)).reshape(
            *codes.shape[:-1], self.block_bytes
        )


Q4_0 = _Q40(
    name="q4_0",
    kernel_code=3,
    block_bytes=18,
    f16_offsets=(0,),
    largest=65504.0 * 8,  # at the largest scale that is finite in f16, of either sign
    activation_type="int8",
    head_format="q8_0",  # the head and the embedding table would lose more than their size is worth
)
