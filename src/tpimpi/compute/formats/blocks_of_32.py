"""What GGML's q8_0, q4_0, q4_1, q5_0, q5_1 and iq4_nl have in common: blocks of 32 weights along a row.

Row form: blocks one after another; a block is its f16 numbers (the scale d, of some then the minimum m), then its
codes.

Packed form: the blocks are taken in pairs; if their number is odd, the last pair is one block. A pair is: a line of
scales (16 f16 of the first block, one of each row, then 16 of the second, or zeros), where there are minima a line of
them laid out likewise; then the lines of codes of the first block, then those of the second: line j is bytes 4j to 4j
+ 3 of each row's codes, unless a format says otherwise.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats.base import LINE_BYTES, PANEL_ROWS
from tpimpi.compute.formats.blocks import BlockFormat

BLOCK_WEIGHTS = 32


@dataclass(frozen=True, kw_only=True)
class PairedFormat(BlockFormat):
    """A format of blocks of 32 weights, packed in pairs."""

    block_weights: int = BLOCK_WEIGHTS

    @property
    def numbers(self) -> int:
        """F16 numbers of a block: d, or d and m."""
        return len(self.f16_offsets)

    @property
    def code_words(self) -> int:
        """4-byte words of codes of a block."""
        return (self.block_bytes - 2 * self.numbers) // 4

    @abstractmethod
    def dequantize(self, numbers: F32, codes: Bytes, out: F32) -> None:
        """Numbers [rows, blocks, 1 or 2] and bytes of codes [rows, blocks, bytes] into weights `out` [rows, blocks, 32]."""

    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        blocks = self.blocks(columns)
        return ((self.numbers * -(-blocks // 2) + self.code_words * blocks) * LINE_BYTES,)

    def to_lines(self, words: Array) -> Array:
        """Words of codes, uint32 [..., words a block], as lines hold them. Those of absent rows are zeroed afterwards."""
        return words

    def from_lines(self, words: Array) -> Array:
        """Undoes `to_lines`."""
        return words

    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        panels = rows.shape[0]
        numbers, codes = self._numbers_and_codes(rows)
        words = self.to_lines(np.ascontiguousarray(codes).view("<u4"))
        words.reshape(panels * PANEL_ROWS, -1)[present:] = 0
        for begin, last, number_lines, word_lines in self._pair_lines(out, words.shape[2]):
            pairs, _, per_pair, _ = number_lines.shape[1:]
            kinds, lines = number_lines.shape[2], word_lines.shape[2]
            number_lines[:] = (
                numbers[:, :, begin:last].reshape(panels, PANEL_ROWS, pairs, per_pair, kinds).transpose(0, 2, 4, 3, 1)
            )
            word_lines[:] = words[:, :, begin:last].reshape(panels, PANEL_ROWS, pairs, lines).transpose(0, 2, 3, 1)

    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        count, width = panels.shape[0], self.row_bytes(columns)
        rows = np.empty((count, PANEL_ROWS, width), np.uint8)
        numbers, codes = self._numbers_and_codes(rows)
        for begin, last, number_lines, word_lines in self._pair_lines(panels, numbers.shape[2]):
            shape = (count, PANEL_ROWS, last - begin, -1)
            numbers[:, :, begin:last] = number_lines.transpose(0, 4, 1, 3, 2).reshape(shape)
            words = np.ascontiguousarray(word_lines.transpose(0, 3, 1, 2)).reshape(*shape[:-1], self.code_words)
            codes[:, :, begin:last] = self.from_lines(words).view("<u2")
        return rows.reshape(count * PANEL_ROWS, width)

    def decode_blocks(self, blocks: Bytes, out: F32) -> None:
        stored_numbers, stored_codes = self._numbers_and_codes(blocks.reshape(blocks.shape[0], -1))
        numbers = np.ascontiguousarray(stored_numbers).view("<f2").astype(np.float32)  # [rows, blocks, 1 or 2]
        self.dequantize(numbers, np.ascontiguousarray(stored_codes).view(np.uint8), out)

    def _numbers_and_codes(self, rows: Bytes) -> tuple[Array, Array]:
        """Views of rows [..., row_bytes] as uint16: numbers [..., blocks, 1 or 2], codes [..., blocks, 2 * words]."""
        halves = rows.view("<u2").reshape(*rows.shape[:-1], -1, self.block_bytes // 2)
        return halves[..., : self.numbers], halves[..., self.numbers :]

    def _pair_lines(self, panels: Bytes, blocks: int) -> Iterator[tuple[int, int, Array, Array]]:
        """Views of panels [panels, panel_bytes] for the whole pairs, then for the odd block, if there is one.

        (first block, last block, numbers uint16 [panels, pairs, 1 or 2, blocks a pair, 16], words uint32 [panels, pairs,
        lines of codes, 16]).
        """
        count, first, line = panels.shape[0], 0, 0
        for pairs, per_pair in ((blocks // 2, 2), (blocks % 2, 1)):
            if pairs:
                lines = self.numbers + per_pair * self.code_words
                run = panels[:, line * LINE_BYTES : (line + pairs * lines) * LINE_BYTES]
                words = run.view("<u4").reshape(count, pairs, lines, PANEL_ROWS)
                numbers = run.view("<u2").reshape(count, pairs, lines, 2, PANEL_ROWS)
                last = first + pairs * per_pair
                yield first, last, numbers[:, :, : self.numbers, :per_pair], words[:, :, self.numbers :]
                first, line = last, line + pairs * lines


def join(numbers: list[F32], codes: Bytes) -> Bytes:
    """Whole blocks: the numbers [blocks] each, as f16, then the bytes of codes [bytes, blocks]: uint8 [blocks, bytes]."""
    head = np.stack([number.astype("<f2") for number in numbers], axis=1).view(np.uint8)  # [blocks, 2 or 4]
    return np.concatenate([head, codes.T], axis=1)


def nibbles(codes: Array) -> Bytes:
    """Codes of 0 to 15, [32, blocks], two a byte: uint8 [16, blocks]. Byte j holds column j low and column 16 + j high."""
    whole: Bytes = codes.astype(np.uint8)
    half = BLOCK_WEIGHTS // 2
    return np.bitwise_or(whole[:half], np.left_shift(whole[half:], 4))


def from_nibbles(codes: Bytes, out: F32) -> None:
    """Undoes `nibbles`, along the last axis: bytes [..., 16] into numbers `out` [..., 32]."""
    half = BLOCK_WEIGHTS // 2
    out[..., :half], out[..., half:] = codes & 15, codes >> 4
