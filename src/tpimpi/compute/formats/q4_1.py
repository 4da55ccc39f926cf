"""GGML's q4_1: a weight is d * q + m, with a code q of 0..15 for each, an f16 scale d and an f16 minimum m for each 32.

A block is d and m (2 bytes each), then 16 bytes of codes as in q4_0. Packed as q4_0, with a line of minima after each line
of scales.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import search
from tpimpi.compute.formats.blocks_of_32 import PairedFormat, from_nibbles, join, nibbles

_CODES = (0, 15)
# See search.py.
CANDIDATE_PAIRS = (
    *((0, 15), (0, 15.5), (-0.5, 15), (-0.25, 15.25), (0.25, 15.5), (0, 14.75), (1, 15)),
    *((0.25, 15), (0, 15.25), (-0.25, 15), (-0.5, 14.75), (0, 14), (1, 14), (-0.25, 14)),
)


class _Q41(PairedFormat):
    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        from_nibbles(codes, out)
        out *= numbers[..., :1]
        out += numbers[..., 1:]

    def quantize_blocks(self, x: F32) -> Bytes:
        d, m, q = search.search_affine(x, CANDIDATE_PAIRS, _CODES)
        return join([d, m], nibbles(q))

    def code_range(self) -> tuple[int, int]:
        return (-8, 7)  # with a minimum of -8 * scale, as in q4_0

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T + np.int8(8)
        d = np.full(flat.shape[1], scale, np.float32)
        return join([d, -8 * d], nibbles(flat)).reshape(*codes.shape[:-1], self.block_bytes)


Q4_1 = _Q41(
    name="q4_1",
    kernel_code=4,
    block_bytes=20,
    f16_offsets=(0, 2),
    largest=65504.0,  # at the largest minimum that is finite in f16
    activation_type="int8",
    head_format="q8_0",  # the head and the embedding table would lose more than their size is worth
)
