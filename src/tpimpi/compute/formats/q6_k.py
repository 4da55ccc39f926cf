"""GGML's q6_k: a weight is d * s * (q - 32), with a code q of 0..63 for each, an int8 scale s for each 16, and an f16
scale d for each 256.

A block is 128 bytes of low nibbles, 64 of pairs of high bits, 16 scales, d. Of each half of 128 columns, byte 32h + j
of the nibbles (h is 0 or 1) has column j of unit h in its low, of unit h + 2 in its high nibble; bits 2u and 2u + 1 of
byte j of the pairs are those of column j of unit u. Packed, a line of scales has those of two units, and a unit has 2
lines of high bits (`join_pairs`), then 4 of nibbles.
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
from tpimpi.compute.formats.words import (
    LOW_NIBBLES,
    LOW_PAIRS,
    join_nibbles,
    join_pairs,
    split_nibbles,
    split_pairs,
    swap_nibbles,
    transpose_fields,
)

_GRIDS = (-32, -31.5, -31, -30.5, -30, -32.5, -33, 31, 31.5)  # where a part's number of largest magnitude is laid
_PAIRS, _SCALES, _D = 128, 192, 208  # where they begin in a block
_FOUR = np.uint32(4)


class _Q6K(PairsOfBytes):
    def split(self, blocks: Bytes) -> Fields:
        nibbles = words_at(blocks, 0, _PAIRS).reshape(*blocks.shape[:-1], 2, 2, 8)
        codes = np.stack([nibbles & LOW_NIBBLES, nibbles >> _FOUR & LOW_NIBBLES], axis=-3)
        codes = codes.reshape(*blocks.shape[:-1], 8, 8)
        pairs = words_at(blocks, _PAIRS, _SCALES).reshape(*blocks.shape[:-1], 2, 8)
        codes |= split_in_fours(pairs, 2, LOW_PAIRS) << _FOUR
        return Fields(blocks[..., _SCALES:_D].reshape(*blocks.shape[:-1], 8, 2), codes)

    def pack_units(self, blocks: Bytes, units: slice) -> tuple[Array | None, Array]:
        if units != slice(0, UNITS):
            return super().pack_units(blocks, units)
        # The same in fewer steps: files are converted as fast as disks are.
        words = np.empty((*blocks.shape[:-1], 4 + UNITS * self.unit_lines), np.uint32)
        words[..., :4] = words_at(blocks, _SCALES, _D)
        made = words[..., 4:].reshape(*blocks.shape[:-1], 2, 2, 2, self.unit_lines)
        nibbles = words_at(blocks, 0, _PAIRS).reshape(*blocks.shape[:-1], 2, 2, 8)
        swap_nibbles(nibbles, made[..., 0, :, 2:], made[..., 1, :, 2:])
        pairs = words_at(blocks, _PAIRS, _SCALES).reshape(*blocks.shape[:-1], 2, 2, 4)
        lines = transpose_fields(pairs, 2).swapaxes(-1, -2)  # [..., halves, units, lines]
        made[..., :2] = lines.reshape(*blocks.shape[:-1], 2, 2, 2, 2)
        return None, words

    def join(self, fields: Fields, blocks: Bytes) -> None:
        nibbles = (fields.codes & LOW_NIBBLES).reshape(*blocks.shape[:-1], 2, 2, 2, 8)
        put_words(blocks, 0, nibbles[..., 0, :, :] | nibbles[..., 1, :, :] << _FOUR)
        put_words(blocks, _PAIRS, join_in_fours(fields.codes >> _FOUR & LOW_PAIRS, 2))
        blocks[..., _SCALES:_D] = fields.scales.reshape(*blocks.shape[:-1], 16)

    def pack_codes(self, codes: Array) -> Array:
        return np.concatenate([join_pairs(codes >> _FOUR & LOW_PAIRS), join_nibbles(codes & LOW_NIBBLES)], axis=-1)

    def unpack_codes(self, lines: Array) -> Array:
        return split_nibbles(lines[..., 2:]) | split_pairs(lines[..., :2]) << _FOUR

    def code_range(self) -> tuple[int, int]:
        return (-32, 31)

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32) - np.float32(-32)
        d = np.full(flat.shape[1], scale, np.float32)
        scales = np.ones((len(d), UNITS, 2), np.uint8)
        return self.make_blocks([d], scales, flat).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        levels = search_scales.even_levels(-32, 31)
        d, scales, codes = search_scales.scales_of_parts(x, 2 * UNITS, levels, _GRIDS, (-128, 127))
        whole = np.ascontiguousarray(scales.T.astype(np.int8)).view(np.uint8)
        return self.make_blocks([d], whole.reshape(-1, UNITS, 2), codes - np.float32(-32))

    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        codes -= 32
        multiply_by_16(codes, numbers[0][..., None, None] * scales.view(np.int8).astype(np.float32))


def multiply_by_16(codes: F32, scales: F32) -> None:
    """Multiply codes [..., units, 32] by scales [..., units, 2], one for each 16, in place."""
    halves = codes.reshape(*codes.shape[:-1], 2, 16)
    halves *= scales[..., None]


Q6_K = _Q6K(
    name="q6_k",
    kernel_code=6,
    block_bytes=210,
    f16_offsets=(_D,),
    unit_lines=6,
    largest=65504.0 * 128 * 31,
    activation_type="int8",
    stands_in_for=("nvfp4",),
)
