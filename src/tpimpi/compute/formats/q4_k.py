"""GGML's q4_k: a weight is d * s * q - dmin * m, with a code q of 0..15 for each, a scale s and a minimum m of 0..63
for each 32, and f16 numbers d and dmin for each 256.

A block is d and dmin (2 bytes each), 12 bytes of scales and minima, as `join_pairs_of_6_bits` lays out 8 units, then
128 bytes of codes: byte 32i + j has column j of unit 2i in its low, of unit 2i + 1 in its high nibble. Packed, a unit
has 4 lines of codes, as `join_nibbles` lays them out.
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
    join_pairs_of_6_bits,
    put_words,
    split_pairs_of_6_bits,
    words_at,
)
from tpimpi.compute.formats.words import LOW_NIBBLES, join_nibbles, split_nibbles, swap_nibbles

# Where a unit's least and greatest numbers are laid, beside the least and the greatest code.
_GRIDS = (
    (0, 0),
    (0, 0.5),
    (-0.5, 0),
    (-0.25, 0.25),
    (0.25, 0.5),
    (0, -0.25),
    (0.25, 0),
    (-0.25, 0),
    (0, -1),
    (0.5, -0.5),
)
_SCALES, _CODES = 4, 16  # where they begin in a block


class AffineSuperBlocks(PairsOf6Bits):
    """What q4_k and q5_k have in common: all but the codes."""

    def code_range(self) -> tuple[int, int]:
        half = 1 << (self.unit_lines - 1)
        return (-half, half - 1)

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        half = 1 << (self.unit_lines - 1)
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) + np.float32(half)
        d = np.full(flat.shape[1], scale, np.float32)
        scales = np.tile(np.array([1, half], np.uint8), (len(d), UNITS, 1))  # the minimum is -half * scale
        return self.make_blocks([d, d], scales, flat).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        high = (1 << self.unit_lines) - 1
        grids = [(first, high + last) for first, last in _GRIDS]
        d, dmin, scales, minima, codes = search_scales.scales_and_minima_of_parts(x, UNITS, high, 63, grids)
        return self.make_blocks([d, dmin], np.stack([scales.T, minima.T], axis=2).astype(np.uint8), codes)

    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        d, dmin = (number[..., None] * scales[..., i].astype(np.float32) for i, number in enumerate(numbers))
        codes *= d[..., None]
        codes -= dmin[..., None]


class _Q4K(AffineSuperBlocks):
    def split(self, blocks: Bytes) -> Fields:
        scales = split_pairs_of_6_bits(words_at(blocks, _SCALES, _CODES), 8)
        return Fields(scales, split_nibbles_of_units(words_at(blocks, _CODES, self.block_bytes)))

    def pack_units(self, blocks: Bytes, units: slice) -> tuple[Array | None, Array]:
        if units != slice(0, UNITS):
            return super().pack_units(blocks, units)
        # The same in fewer steps: files are converted as fast as disks are.
        words = np.empty((*blocks.shape[:-1], (self.block_bytes - _SCALES) // 4), np.uint32)
        stored = blocks.view("<u4")[..., _SCALES // 4 :]
        words[..., :3] = stored[..., :3]
        pairs, made = (part[..., 3:].reshape(*blocks.shape[:-1], 4, 8) for part in (stored, words))
        swap_nibbles(pairs, made[..., :4], made[..., 4:])
        return None, words

    def join(self, fields: Fields, blocks: Bytes) -> None:
        put_words(blocks, _SCALES, join_pairs_of_6_bits(fields.scales))
        put_words(blocks, _CODES, join_nibbles_of_units(fields.codes))

    def pack_codes(self, codes: Array) -> Array:
        return join_nibbles(codes)

    def unpack_codes(self, lines: Array) -> Array:
        return split_nibbles(lines)


def split_nibbles_of_units(words: Array) -> Array:
    """Words [..., 32] with two units in each 8, in the low and in the high nibbles: codes [..., 8, 8]."""
    pairs = words.reshape(*words.shape[:-1], 4, 8)
    codes = np.stack([pairs & LOW_NIBBLES, pairs >> np.uint32(4) & LOW_NIBBLES], axis=-2)
    return codes.reshape(*words.shape[:-1], 8, 8)


def join_nibbles_of_units(codes: Array) -> Array:
    """Undoes `split_nibbles_of_units`: words [..., 4, 8]."""
    return codes[..., 0::2, :] | codes[..., 1::2, :] << np.uint32(4)


Q4_K = _Q4K(
    name="q4_k",
    kernel_code=5,
    block_bytes=144,
    f16_offsets=(0, 2),
    unit_lines=4,
    largest=65504.0 * 63,  # of minima that are finite in f16
    activation_type="int8",
    head_format="q6_k",
    stands_in_for=("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"),
)
