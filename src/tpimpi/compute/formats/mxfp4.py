"""GGML's mxfp4 (OCP Microscaling Formats 1.0): a weight is 2^(e - 127) * v / 2, with a code of 4 bits for each, which
stands for a number v / 2 of E2M1, and an exponent e for each 32.

A block is e (1 byte), then 16 bytes of codes as in q4_0. Packed, four blocks have one line of exponents, a row's word
those of the four, then the lines of codes of each as in q4_0; the last blocks of a row may be fewer than four.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import search_scales
from tpimpi.compute.formats.base import LINE_BYTES, PANEL_ROWS
from tpimpi.compute.formats.blocks import UNIT_WEIGHTS, BlockFormat
from tpimpi.compute.formats.blocks_of_32 import nibbles

VALUES = np.array((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12), np.float32)  # of E2M1, doubled
_SORTED = np.array((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12), np.float32)
_CODES_OF_SORTED = np.array((15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7), np.uint8)
_GROUP = 4  # blocks that share a line of exponents
_CODE_LINES = 4  # of a block


class _MXFP4(BlockFormat):
    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        blocks = self.blocks(columns)
        return ((-(-blocks // _GROUP) + _CODE_LINES * blocks) * LINE_BYTES,)

    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        blocks = rows.reshape(rows.shape[0], PANEL_ROWS, -1, self.block_bytes)
        for begin, group in self._groups(blocks.shape[2]):
            lines = out[:, begin // _GROUP * _group_bytes(_GROUP) :][:, : _group_bytes(group)]
            words = lines.view("<u4").reshape(rows.shape[0], -1, PANEL_ROWS)
            cut = blocks[:, :, begin : begin + group]
            words[:, 0].reshape(rows.shape[0], PANEL_ROWS, 1).view(np.uint8)[..., :group] = cut[..., 0]
            codes = np.ascontiguousarray(cut[..., 1:]).view("<u4").reshape(rows.shape[0], PANEL_ROWS, -1)
            words[:, 1:] = codes.transpose(0, 2, 1)

    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        count = panels.shape[0]
        rows = np.empty((count, PANEL_ROWS, self.row_bytes(columns)), np.uint8)
        blocks = rows.reshape(count, PANEL_ROWS, -1, self.block_bytes)
        for begin, group in self._groups(blocks.shape[2]):
            lines = panels[:, begin // _GROUP * _group_bytes(_GROUP) :][:, : _group_bytes(group)]
            words = np.ascontiguousarray(lines).view("<u4").reshape(count, -1, PANEL_ROWS)
            cut = blocks[:, :, begin : begin + group]
            cut[..., 0] = words[:, 0].reshape(count, PANEL_ROWS, 1).view(np.uint8)[..., :group]
            codes = np.ascontiguousarray(words[:, 1:].transpose(0, 2, 1)).view(np.uint8)
            cut[..., 1:] = codes.reshape(count, PANEL_ROWS, group, -1)
        return rows.reshape(count * PANEL_ROWS, -1)

    def decode_blocks(self, blocks: Bytes, out: F32) -> None:
        half = UNIT_WEIGHTS // 2
        out[..., :half], out[..., half:] = VALUES[blocks[..., 1:] & 15], VALUES[blocks[..., 1:] >> 4]
        out *= _half_power(blocks[..., :1])

    def code_range(self) -> tuple[int, int]:
        return (-15, 15)  # of which VALUES are taken

    def blocks_of_codes(self, codes: npt.NDArray[np.int8], scale: float) -> Bytes:
        flat = codes.reshape(-1, self.block_weights).T.astype(np.float32)
        nearest = np.sign(flat) * search_scales.listed_levels(_SORTED)(
            np.abs(flat)
        )  # a half the same way on both sides
        found = _CODES_OF_SORTED[np.searchsorted(_SORTED, nearest)]
        exponents = np.full((flat.shape[1], 1), 128 + np.frexp(scale)[1] - 1, np.uint8)
        return np.concatenate([exponents, nibbles(found).T], axis=1).reshape(*codes.shape[:-1], self.block_bytes)

    def quantize_blocks(self, x: F32) -> Bytes:
        largest = np.abs(x).max(axis=0)
        exponent = np.frexp(largest)[1] - 1  # largest is 2^exponent at least, and less than twice that
        levels = search_scales.listed_levels(_SORTED)
        best_e, best, least = np.zeros(largest.shape, np.uint8), np.zeros_like(x), np.full_like(largest, np.inf)
        for more in (-2, -1):  # 6 and 4 are the greatest numbers of E2M1
            e = np.where(largest > 0, np.clip(exponent + more + 127, 0, 255), 0).astype(np.uint8)
            scale = _half_power(e)
            found = levels(np.clip(np.ldexp(x, 128 - e.astype(np.int32)), -12, 12))
            error = np.square(x - found * scale).sum(axis=0)
            best_e, best = np.where(error < least, e, best_e), np.where(error < least, found, best)
            least = np.minimum(error, least)
        codes = _CODES_OF_SORTED[np.searchsorted(_SORTED, best)]
        return np.concatenate([best_e[:, None], nibbles(codes).T], axis=1)

    def _groups(self, blocks: int) -> list[tuple[int, int]]:
        """(first block, blocks) of each group of a row."""
        return [(begin, min(_GROUP, blocks - begin)) for begin in range(0, blocks, _GROUP)]


def _group_bytes(blocks: int) -> int:
    return (1 + blocks * _CODE_LINES) * LINE_BYTES


def _half_power(exponents: Array) -> F32:
    """2^(e - 128) of bytes e."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 128)


MXFP4 = _MXFP4(
    name="mxfp4",
    kernel_code=14,
    block_weights=UNIT_WEIGHTS,
    block_bytes=17,
    f16_offsets=(),
    largest=6 * 2.0**125,
    activation_type="int8",
    head_format="q8_0",
)
