"""GGML's q2_k: a weight is d * s * q - dmin * m, with a code q of 0..3 for each, a scale s and a minimum m of 0..15
for each 16, and f16 numbers d and dmin for each 256.

A block is 16 bytes of scales (low nibble) and minima (high nibble), 64 of codes, as q6_k's pairs, d, dmin. Packed, a
line of scales has those of two units, as they are, and a unit has 2 lines of codes (`join_pairs`).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search_scales
from tpimpi.compute.formats.blocks_of_256 import (
    UNITS,
    Fields,
    PairsOfBytes,
    join_in_fours,
    put_words,
    split_in_fours,
    words_at,
)
from tpimpi.compute.formats.q6_k import multiply_by_16
from tpimpi.compute.formats.words import LOW_PAIRS, join_pairs, split_pairs

# Where a part's least and greatest numbers are laid, beside the least and the greatest code.
_GRIDS = ((0, 0), (0, -1), (-0.25, 0.25), (0, 0.5), (-0.5, 0), (-0.4, 0.4), (0.25, 0), (0, -0.25), (0.3, -0.3))
_CODES, _D, _DMIN = 16, 80, 82  # where they begin in a block


class _Q2K(PairsOfBytes):
    def split(self, blocks: Bytes) -> Fields:
        pairs = words_at(blocks, _CODES, _D).reshape(*blocks.shape[:-1], 2, 8)
        return Fields(blocks[..., :_CODES].reshape(*blocks.shape[:-1], 8, 2), split_in_fours(pairs, 2, LOW_PAIRS))

    def join(self, fields: Fields, blocks: Bytes) -> None:
        blocks[..., :_CODES] = fields.scales.reshape(*blocks.shape[:-1], _CODES)
        put_words(blocks, _CODES, join_in_fours(fields.codes, 2))

    def pack_codes(self, codes: Array) -> Array:
        return join_pairs(codes)

    def unpack_codes(self, lines: Array) -> Array:
        return split_pairs(lines)

    def code_range(self) -> tuple[int, int]:
        return (-2, 1)

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) - np.float32(-2)
        d = np.full(flat.shape[1], scale, np.float32)
        scales = np.full((len(d), UNITS, 2), 0x21, np.uint8)  # the minimum is -2 * scale
        return self.make_blocks([d, d], scales, flat).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        grids = [(first, 3 + last) for first, last in _GRIDS]
        d, dmin, scales, minima, codes = search_scales.scales_and_minima_of_parts(
            x, 2 * UNITS, 3, 15, grids, plain=True
        )
        whole = np.ascontiguousarray((scales + 16 * minima).T.astype(np.uint8))
        return self.make_blocks([d, dmin], whole.reshape(-1, UNITS, 2), codes)

    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        d, dmin = (number[..., None, None] for number in numbers)
        multiply_by_16(codes, d * (scales & 15).astype(np.float32))
        halves = codes.reshape(*codes.shape[:-1], 2, 16)
        halves -= (dmin * (scales >> 4).astype(np.float32))[..., None]


Q2_K = _Q2K(
    name="q2_k",
    kernel_code=9,
    block_bytes=84,
    f16_offsets=(_D, _DMIN),
    unit_lines=2,
    largest=65504.0 * 15,
    activation_type="int8",
    head_format="q6_k",
    stands_in_for=("tq1_0", "tq2_0"),
)
