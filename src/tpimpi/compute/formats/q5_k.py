"""GGML's q5_k: as q4_k, with codes of 0..31.

A block is d, dmin and scales as in q4_k, then 32 bytes of high bits, of which bit u of byte j is that of column j of
unit u, then 128 bytes of low nibbles as in q4_k. Packed, a unit has a line of high bits (`join_bits`), then 4 lines of
nibbles.
"""

from __future__ import annotations

import numpy as np

from tpimpi.compute.arrays import Array, Bytes
from tpimpi.compute.formats.blocks_of_256 import (
    UNITS,
    Fields,
    join_in_eights,
    join_pairs_of_6_bits,
    put_words,
    split_in_eights,
    split_pairs_of_6_bits,
    words_at,
)
from tpimpi.compute.formats.q4_k import AffineSuperBlocks, join_nibbles_of_units, split_nibbles_of_units
from tpimpi.compute.formats.words import (
    LOW_BITS,
    LOW_NIBBLES,
    join_bits,
    join_nibbles,
    split_bits,
    split_nibbles,
    swap_nibbles,
    transpose_fields,
)

_SCALES, _BITS, _CODES = 4, 16, 48  # where they begin in a block
_FOUR = np.uint32(4)


class _Q5K(AffineSuperBlocks):
    def split(self, blocks: Bytes) -> Fields:
        scales = split_pairs_of_6_bits(words_at(blocks, _SCALES, _BITS), 8)
        codes = split_nibbles_of_units(words_at(blocks, _CODES, self.block_bytes))
        codes |= split_in_eights(words_at(blocks, _BITS, _CODES)) << _FOUR
        return Fields(scales, codes)

    def pack_units(self, blocks: Bytes, units: slice) -> tuple[Array | None, Array]:
        if units != slice(0, UNITS):
            return super().pack_units(blocks, units)
        # The same in fewer steps: files are converted as fast as disks are.
        words = np.empty((*blocks.shape[:-1], 3 + UNITS * self.unit_lines), np.uint32)
        words[..., :3] = words_at(blocks, _SCALES, _BITS)
        made = words[..., 3:].reshape(*blocks.shape[:-1], 4, 2, self.unit_lines)
        pairs = words_at(blocks, _CODES, self.block_bytes).reshape(*blocks.shape[:-1], 4, 8)
        swap_nibbles(pairs, made[..., 0, 1:], made[..., 1, 1:])
        made[..., 0] = transpose_fields(words_at(blocks, _BITS, _CODES), 1).reshape(*blocks.shape[:-1], 4, 2)
        return None, words

    def join(self, fields: Fields, blocks: Bytes) -> None:
        put_words(blocks, _SCALES, join_pairs_of_6_bits(fields.scales))
        put_words(blocks, _BITS, join_in_eights(fields.codes >> _FOUR & LOW_BITS))
        put_words(blocks, _CODES, join_nibbles_of_units(fields.codes & LOW_NIBBLES))

    def pack_codes(self, codes: Array) -> Array:
        return pack_5_bits(codes)

    def unpack_codes(self, lines: Array) -> Array:
        return unpack_5_bits(lines)


def pack_5_bits(codes: Array) -> Array:
    """Codes of 5 bits [..., 8] as lines [..., 5]: their high bits, then their nibbles."""
    return np.concatenate([join_bits(codes >> _FOUR & LOW_BITS), join_nibbles(codes & LOW_NIBBLES)], axis=-1)


def unpack_5_bits(lines: Array) -> Array:
    """Undoes `pack_5_bits`."""
    return split_nibbles(lines[..., 1:]) | split_bits(lines[..., :1]) << _FOUR


Q5_K = _Q5K(
    name="q5_k",
    kernel_code=7,
    block_bytes=176,
    f16_offsets=(0, 2),
    unit_lines=5,
    largest=65504.0 * 63,  # of minima that are finite in f16
    activation_type="int8",
    head_format="q6_k",
    stands_in_for=("iq3_xxs", "iq3_s"),
)
