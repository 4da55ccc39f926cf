"""GGML's iq4_xs: a weight is d * (s - 32) * v[q], with a code q of 0..15 for each, which stands for one of iq4_nl's 16
values v, a scale s of 0..63 for each 32, and an f16 scale d for each 256.

A block is d, 2 bytes of the scales' high bits (bits 2u and 2u + 1 are unit u's), 4 of their low nibbles, then for each
unit 16 bytes of codes as in q4_0. Packed, the high bits of the scales stand where others have dmin, and one line has
their low nibbles; a unit has 4 lines of codes, as `join_nibbles` lays them out.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search_scales
from tpimpi.compute.formats.blocks import f16_bits
from tpimpi.compute.formats.blocks_of_256 import UNITS, Fields, SuperBlockFormat, put_words, words_at
from tpimpi.compute.formats.iq4_nl import GRIDS, VALUES
from tpimpi.compute.formats.words import LOW_NIBBLES, join_nibbles, split_nibbles

_HIGH, _LOW, _CODES = 2, 4, 8  # where they begin in a block
_UNIT = np.arange(UNITS)


class _IQ4XS(SuperBlockFormat):
    def split(self, blocks: Bytes) -> Fields:
        scales = _scales(words_at(blocks, _LOW, _CODES), f16_bits(blocks, _HIGH), UNITS)
        words = words_at(blocks, _CODES, self.block_bytes).reshape(*blocks.shape[:-1], UNITS, 4)
        codes = np.concatenate([words & LOW_NIBBLES, words >> np.uint32(4) & LOW_NIBBLES], axis=-1)
        return Fields(scales, codes)

    def join(self, fields: Fields, blocks: Bytes) -> None:
        blocks[..., _HIGH:_LOW] = self.spare_bits(fields.scales)[..., None].view(np.uint8)
        put_words(blocks, _LOW, self.pack_scales(fields.scales))
        put_words(blocks, _CODES, fields.codes[..., :4] | fields.codes[..., 4:] << np.uint32(4))

    def scale_lines(self, units: int) -> int:
        return 1

    def pack_scales(self, scales: Bytes) -> Array:
        low = (scales[..., 0] & 15).astype(np.uint32) << (4 * _UNIT[: scales.shape[-2]]).astype(np.uint32)
        return np.bitwise_or.reduce(low, axis=-1)[..., None]

    def spare_bits(self, scales: Bytes) -> Array:
        high = (scales[..., 0] >> 4).astype(np.uint16) << (2 * _UNIT[: scales.shape[-2]]).astype(np.uint16)
        return np.bitwise_or.reduce(high, axis=-1)

    def unpack_scales(self, words: Array, spare: Array, units: int) -> Bytes:
        return _scales(words, spare, units)

    def pack_codes(self, codes: Array) -> Array:
        return join_nibbles(codes)

    def unpack_codes(self, lines: Array) -> Array:
        return split_nibbles(lines)

    def code_range(self) -> tuple[int, int]:
        return (-127, 127)  # of which VALUES are taken

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32)
        found = np.searchsorted(VALUES, search_scales.listed_levels(VALUES)(flat)).astype(np.float32)
        d = np.full(flat.shape[1], scale, np.float32)
        blocks = self.make_blocks([d], np.full((len(d), UNITS, 1), 33, np.uint8), found)
        return blocks.reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        levels = search_scales.listed_levels(VALUES)
        d, scales, found = search_scales.scales_of_parts(x, UNITS, levels, GRIDS, (-32, 31))
        whole = (scales.T + np.float32(32)).astype(np.uint8)[..., None]
        return self.make_blocks([d], whole, np.searchsorted(VALUES, found).astype(np.float32))

    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        codes[:] = VALUES[codes.astype(np.intp)]
        codes *= numbers[0][..., None, None] * (scales.astype(np.float32) - 32)


def _scales(low: Array, high: Array, units: int) -> Bytes:
    """Scales [..., units, 1] of their low nibbles, words [..., 1], and their high bits, uint16 [...]."""
    nibbles = low >> (4 * _UNIT[:units]).astype(np.uint32) & 15
    pairs = high[..., None] >> (2 * _UNIT[:units]).astype(np.uint16) & 3
    return (nibbles | pairs << 4).astype(np.uint8)[..., None]


IQ4_XS = _IQ4XS(
    name="iq4_xs",
    kernel_code=13,
    block_bytes=136,
    f16_offsets=(0,),
    unit_lines=4,
    largest=65504.0 * 32 * 127,
    activation_type="int8",
    head_format="q6_k",
)
