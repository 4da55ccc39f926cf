"""GGML's q5_1: a weight is d * q + m, with a code q of 0..31 for each, an f16 scale d and an f16 minimum m for each
32.

A block is d and m, then high bits and nibbles as in q5_0. Packed as q5_0, with a line of minima after each line of
scales.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import search
from tpimpi.compute.formats.blocks_of_32 import join
from tpimpi.compute.formats.q5_0 import PairedOf5Bits, from_5_bits, to_5_bits

# See search.py.
_CANDIDATES = (
    (0, 31),
    (0, 31.5),
    (-0.5, 31),
    (-0.25, 31.25),
    (0.25, 31.5),
    (0, 30.75),
    (0.25, 31),
    (-0.25, 31),
    (0, 30),
)


class _Q51(PairedOf5Bits):
    def code_range(self) -> tuple[int, int]:
        return (-16, 15)  # with a minimum of -16 * scale, as in q5_0

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) + np.float32(16)
        d = np.full(flat.shape[1], scale, np.float32)
        return join([d, -16 * d], to_5_bits(flat)).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        d, m, q = search.search_affine(x, _CANDIDATES, (0, 31))
        return join([d, m], to_5_bits(q))

    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        from_5_bits(codes, out)
        out *= numbers[..., :1]
        out += numbers[..., 1:]


Q5_1 = _Q51(
    name="q5_1",
    kernel_code=11,
    block_bytes=24,
    f16_offsets=(0, 2),
    largest=65504.0,
    activation_type="int8",
    head_format="q8_0",
)
