"""GGML's q3_k: a weight is d * (s - 32) * (q - 4), with a code q of 0..7 for each, a scale s of 0..63 for each 16, and
an f16 scale d for each 256.

A block is 32 bytes of high bits, as in q5_k, 64 of pairs of low bits, as q6_k's pairs, 12 of scales, d. Of scales byte
i < 8 has the low nibbles of scales i and i + 8, bits 2u and 2u + 1 of byte 8 + i the high bits of scale 4u + i.
Packed, scales are as in q4_k, the two of a unit its pair, and a unit has a line of high bits, then 2 of pairs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search_scales
from tpimpi.compute.formats.blocks_of_256 import (
    UNITS,
    Fields,
    PairsOf6Bits,
    join_in_eights,
    join_in_fours,
    put_words,
    split_in_eights,
    split_in_fours,
    words_at,
)
from tpimpi.compute.formats.q6_k import multiply_by_16
from tpimpi.compute.formats.words import LOW_BITS, LOW_PAIRS, join_bits, join_pairs, split_bits, split_pairs

_GRIDS = (-4, -4.5, -3.5, -4.25, -3.75, -5, 3, 3.5, -3)  # where a part's number of largest magnitude is laid
_PAIRS, _SCALES, _D = 32, 96, 108  # where they begin in a block
_TWO = np.uint32(2)


class _Q3K(PairsOf6Bits):
    def split(self, blocks: Bytes) -> Fields:
        pairs = words_at(blocks, _PAIRS, _SCALES).reshape(*blocks.shape[:-1], 2, 8)
        codes = split_in_fours(pairs, 2, LOW_PAIRS) | split_in_eights(words_at(blocks, 0, _PAIRS)) << _TWO
        nibbles, high = blocks[..., _SCALES : _SCALES + 8], blocks[..., _SCALES + 8 : _D]
        scales = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1)
        for u in range(4):
            scales[..., 4 * u : 4 * u + 4] |= (high >> 2 * u & 3) << 4
        return Fields(scales.reshape(*blocks.shape[:-1], 8, 2), codes)

    def join(self, fields: Fields, blocks: Bytes) -> None:
        put_words(blocks, 0, join_in_eights(fields.codes >> _TWO & LOW_BITS))
        put_words(blocks, _PAIRS, join_in_fours(fields.codes & LOW_PAIRS, 2))
        scales = fields.scales.reshape(*blocks.shape[:-1], 16)
        blocks[..., _SCALES : _SCALES + 8] = scales[..., :8] & 15 | scales[..., 8:] << 4
        blocks[..., _SCALES + 8 : _D] = 0
        for u in range(4):
            blocks[..., _SCALES + 8 : _D] |= (scales[..., 4 * u : 4 * u + 4] >> 4) << 2 * u

    def pack_codes(self, codes: Array) -> Array:
        return np.concatenate([join_bits(codes >> _TWO & LOW_BITS), join_pairs(codes & LOW_PAIRS)], axis=-1)

    def unpack_codes(self, lines: Array) -> Array:
        return split_pairs(lines[..., 1:]) | split_bits(lines[..., :1]) << _TWO

    def code_range(self) -> tuple[int, int]:
        return (-4, 3)

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) - np.float32(-4)
        d = np.full(flat.shape[1], scale, np.float32)
        scales = np.full((len(d), UNITS, 2), 33, np.uint8)
        return self.make_blocks([d], scales, flat).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        levels = search_scales.even_levels(-4, 3)
        d, scales, codes = search_scales.scales_of_parts(x, 2 * UNITS, levels, _GRIDS, (-32, 31))
        whole = np.ascontiguousarray((scales.T + np.float32(32)).astype(np.uint8))
        return self.make_blocks([d], whole.reshape(-1, UNITS, 2), codes - np.float32(-4))

    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        codes -= 4
        multiply_by_16(codes, numbers[0][..., None, None] * (scales.astype(np.float32) - 32))


Q3_K = _Q3K(
    name="q3_k",
    kernel_code=8,
    block_bytes=110,
    f16_offsets=(_D,),
    unit_lines=3,
    largest=65504.0 * 32 * 4,
    activation_type="int8",
    head_format="q6_k",
)
