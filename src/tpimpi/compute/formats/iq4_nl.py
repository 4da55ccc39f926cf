"""GGML's iq4_nl: a weight is d * v[q], with a code q of 0..15 for each, which stands for one of 16 values v, and an
f16 scale d for each 32.

A block is d, then 16 bytes of codes as in q4_0. Packed as q4_0.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import search_scales
from tpimpi.compute.formats.blocks_of_32 import PairedFormat, join, nibbles

VALUES = np.array((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32)  # GGML's

GRIDS = (-127, -120, -113, -104, -134, -141, 113, 106, 120)  # where a block's number of largest magnitude is laid


class _IQ4NL(PairedFormat):
    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        half = codes.shape[-1]
        out[..., :half], out[..., half:] = VALUES[codes & 15], VALUES[codes >> 4]
        out *= numbers

    def code_range(self) -> tuple[int, int]:
        return (-127, 127)  # of which VALUES are taken

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32)
        found = nibbles(np.searchsorted(VALUES, search_scales.listed_levels(VALUES)(flat)))
        blocks = join([np.full(flat.shape[1], scale, np.float32)], found)
        return blocks.reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        levels = search_scales.listed_levels(VALUES)
        d = search_scales.to_f16(search_scales.best_scale(x, levels, GRIDS))
        return join([d], nibbles(np.searchsorted(VALUES, levels(x * search_scales.inverse(d)))))


IQ4_NL = _IQ4NL(
    name="iq4_nl",
    kernel_code=12,
    block_bytes=18,
    f16_offsets=(0,),
    largest=65504.0 * 127,
    activation_type="int8",
    head_format="q6_k",
)
