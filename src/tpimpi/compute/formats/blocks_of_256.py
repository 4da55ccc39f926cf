"""What GGML's K-quants and iq4_xs have in common: blocks of 256 weights along a row, in units of 32.

Row form: GGML's blocks, one after another.

Packed form: the blocks that a row touches, one after another. A block is a line of its f16 numbers (16 scales d, one
of each row, then 16 minima dmin or zeros), the lines of its units' scales, then each unit's lines of codes. A matrix
that is a cut of columns may begin and end within a block, at a unit's border: it has the numbers of that block and its
own units, whose scales take fewer lines. The lines of scales and of codes are words, one of each row; what they hold
stands with each format.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats.base import LINE_BYTES, PANEL_ROWS
from tpimpi.compute.formats.blocks import UNIT_WEIGHTS, BlockFormat, f16_bits, f16_numbers
from tpimpi.compute.formats.words import LOW_BITS

BLOCK_WEIGHTS = 256
UNITS = BLOCK_WEIGHTS // UNIT_WEIGHTS  # of a block


class Fields(NamedTuple):
    """Blocks taken apart: what belongs to each unit."""

    scales: Bytes  # [..., units, 1 or 2]: as many bits as the format's have, or GGML's bytes
    codes: Array  # uint32 [..., units, 8], in words as words.py states


class _Run(NamedTuple):
    """Blocks of a row of which the same units are there, and where their lines begin."""

    first: int  # block
    blocks: int
    units: slice
    line: int


@dataclass(frozen=True, kw_only=True)
class SuperBlockFormat(BlockFormat):
    """A format of blocks of 256 weights."""

    block_weights: int = BLOCK_WEIGHTS
    unit_lines: int  # lines of codes of a unit

    @abstractmethod
    def split(self, blocks: Bytes) -> Fields:
        """GGML's blocks [..., block_bytes], contiguous, taken apart."""

    @abstractmethod
    def join(self, fields: Fields, blocks: Bytes) -> None:
        """Undoes `split`, into `blocks`, whose f16 numbers are there."""

    @abstractmethod
    def scale_lines(self, units: int) -> int:
        """Lines of scales of so many units."""

    @abstractmethod
    def pack_scales(self, scales: Bytes) -> Array:
        """Scales [..., units, 1 or 2] as words uint32 [..., scale lines]."""

    @abstractmethod
    def unpack_scales(self, words: Array, spare: Array, units: int) -> Bytes:
        """Undoes `pack_scales`, and `spare_bits` [...]."""

    def spare_bits(self, scales: Bytes) -> Array | None:
        """Bits of scales [..., units, 1 or 2] that stand where dmin would, uint16 [...]; None in most formats."""
        return None

    @abstractmethod
    def pack_codes(self, codes: Array) -> Array:
        """Codes, words [..., 8], as the words of a unit's lines [..., unit_lines]."""

    @abstractmethod
    def unpack_codes(self, lines: Array) -> Array:
        """Undoes `pack_codes`."""

    @abstractmethod
    def dequantize(self, numbers: list[F32], scales: Bytes, codes: F32) -> None:
        """Make weights of codes [..., units, 32], in place; numbers [...] each, scales [..., units, 1 or 2]."""

    def panel_shape(self, columns: int, first: int = 0) -> tuple[int, ...]:
        lines = sum(run.blocks * self._block_lines(run.units) for run in self._runs(columns, first))
        return (lines * LINE_BYTES,)

    def pack_panels(self, rows: Bytes, present: int, out: Bytes, columns: int, first: int) -> None:
        panels = rows.shape[0]
        blocks = rows.reshape(panels, PANEL_ROWS, -1, self.block_bytes)
        for run in self._runs(columns, first):
            cut = np.ascontiguousarray(blocks[:, :, run.first : run.first + run.blocks])
            numbers, words = self._lines(out, run)
            for i, place in enumerate(self.f16_offsets):
                numbers[:, :, i] = f16_bits(cut, place).transpose(0, 2, 1)
            spare, packed = self.pack_units(cut, run.units)
            if spare is not None:
                numbers[:, :, 1] = spare.transpose(0, 2, 1)
            words[:] = packed.transpose(0, 2, 3, 1)

    def pack_units(self, blocks: Bytes, units: slice) -> tuple[Array | None, Array]:
        """`spare_bits`, and the words of the lines of scales and of codes [..., lines], of these units of blocks."""
        fields = self.split(blocks)
        scales, codes = fields.scales[..., units, :], self.pack_codes(fields.codes[..., units, :])
        words = [self.pack_scales(scales), codes.reshape(*codes.shape[:-2], -1)]
        return self.spare_bits(scales), np.concatenate(words, axis=-1)

    def unpack_panels(self, panels: Bytes, columns: int, first: int) -> Bytes:
        count, width = panels.shape[0], self.row_bytes(columns, first)
        rows = np.zeros((count, PANEL_ROWS, width), np.uint8)
        blocks = rows.reshape(count, PANEL_ROWS, -1, self.block_bytes)
        for run in self._runs(columns, first):
            units = run.units.stop - run.units.start
            numbers, lines = self._lines(panels, run)
            words = np.ascontiguousarray(lines.transpose(0, 3, 1, 2))  # [panels, 16, blocks, lines]
            some = self.scale_lines(units)
            scales = self.unpack_scales(words[..., :some], numbers[:, :, 1].transpose(0, 2, 1), units)
            codes = self.unpack_codes(words[..., some:].reshape(*words.shape[:3], units, self.unit_lines))
            if units < UNITS:
                scales, codes = (_among_zeros(part, run.units) for part in (scales, codes))
            made = np.zeros((*words.shape[:3], self.block_bytes), np.uint8)
            for i, place in enumerate(self.f16_offsets):
                made[..., place : place + 2] = np.ascontiguousarray(numbers[:, :, i].transpose(0, 2, 1))[
                    ..., None
                ].view(np.uint8)
            self.join(Fields(scales, codes), made)
            blocks[:, :, run.first : run.first + run.blocks] = made
        return rows.reshape(count * PANEL_ROWS, width)

    def decode_blocks(self, blocks: Bytes, out: F32) -> None:
        fields = self.split(blocks)
        codes = out.reshape(*blocks.shape[:-1], UNITS, UNIT_WEIGHTS)
        codes[:] = np.ascontiguousarray(fields.codes).view(np.uint8)
        self.dequantize([f16_numbers(blocks, place) for place in self.f16_offsets], fields.scales, codes)

    def make_blocks(self, numbers: list[F32], scales: Bytes, codes: F32) -> Bytes:
        """Blocks of their numbers [blocks] each, scales [blocks, units, 1 or 2] and codes [256, blocks]: [blocks, bytes]."""
        blocks = np.zeros((codes.shape[1], self.block_bytes), np.uint8)
        for place, number in zip(self.f16_offsets, numbers, strict=True):
            blocks[:, place : place + 2] = number.astype("<f2")[:, None].view(np.uint8)
        words = np.ascontiguousarray(codes.T.astype(np.uint8)).view("<u4").reshape(-1, UNITS, UNIT_WEIGHTS // 4)
        self.join(Fields(scales, words), blocks)
        return blocks

    def _block_lines(self, units: slice) -> int:
        count = units.stop - units.start
        return 1 + self.scale_lines(count) + count * self.unit_lines

    def _runs(self, columns: int, first: int) -> Iterator[_Run]:
        """The block that is cut at its begin, if any, the whole ones, and the one that is cut at its end."""
        left, block, line = -(-columns // UNIT_WEIGHTS), 0, 0
        start = first // UNIT_WEIGHTS
        while left:
            units = slice(start, min(UNITS, start + left))
            whole = units == slice(0, UNITS)
            run = _Run(block, left // UNITS if whole else 1, units, line)
            yield run
            left -= run.blocks * (units.stop - units.start)
            block, line, start = block + run.blocks, line + run.blocks * self._block_lines(units), 0

    def _lines(self, panels: Bytes, run: _Run) -> tuple[Array, Array]:
        """Views of a run in panels: numbers uint16 [panels, blocks, 2, 16], words uint32 [panels, blocks, lines, 16]."""
        lines = self._block_lines(run.units)
        own = panels[:, run.line * LINE_BYTES : (run.line + run.blocks * lines) * LINE_BYTES]
        own = own.reshape(panels.shape[0], run.blocks, lines, LINE_BYTES)
        numbers = own[:, :, 0].view("<u2").reshape(*own.shape[:2], 2, PANEL_ROWS)
        return numbers, own[:, :, 1:].view("<u4")


class PairsOf6Bits(SuperBlockFormat):
    """A format with two numbers of 6 bits for each unit: a scale and a minimum, or two scales."""

    def scale_lines(self, units: int) -> int:
        return pair_lines(units)

    def pack_scales(self, scales: Bytes) -> Array:
        return join_pairs_of_6_bits(scales)

    def unpack_scales(self, words: Array, spare: Array, units: int) -> Bytes:
        return split_pairs_of_6_bits(words, units)


class PairsOfBytes(SuperBlockFormat):
    """A format with two bytes for each unit, one for each 16 weights."""

    def scale_lines(self, units: int) -> int:
        return -(-units // 2)

    def pack_scales(self, scales: Bytes) -> Array:
        return join_pairs_of_bytes(scales)

    def unpack_scales(self, words: Array, spare: Array, units: int) -> Bytes:
        return split_pairs_of_bytes(words, units)


def _among_zeros(part: Array, units: slice) -> Array:
    whole = np.zeros((*part.shape[:3], UNITS, part.shape[4]), part.dtype)
    whole[..., units, :] = part
    return whole


def join_pairs_of_6_bits(pairs: Bytes) -> Array:
    """Two numbers of 6 bits for each unit, [..., units, 2], as words [..., lines].

    Up to 2 units: one line, its bytes the first numbers, then the second ones. Up to 4: a line of first, a line of
    second numbers. Else a third line, which has in byte i the low 4 bits of both numbers of unit 4 + i; their high 2
    bits stand above the numbers of unit i.
    """
    units = pairs.shape[-2]
    filled = np.zeros((*pairs.shape[:-2], 8, 2), np.uint8)
    filled[..., :units, :] = pairs
    lines = np.empty((*pairs.shape[:-2], 3, 4), np.uint8)
    for number in range(2):
        lines[..., number, :] = filled[..., :4, number] | (filled[..., 4:, number] >> 4) << 6
    if units <= 2:
        lines[..., 0, 2:] = lines[..., 1, :2]
    lines[..., 2, :] = filled[..., 4:, 0] & 15 | filled[..., 4:, 1] << 4
    return lines.view("<u4")[..., : pair_lines(units), 0]


def split_pairs_of_6_bits(words: Array, units: int) -> Bytes:
    """Undoes `join_pairs_of_6_bits`."""
    lines = np.ascontiguousarray(words)[..., None].view(np.uint8)  # [..., lines, 4]
    pairs = np.zeros((*words.shape[:-1], 8, 2), np.uint8)
    if units <= 2:
        pairs[..., :2, 0], pairs[..., :2, 1] = lines[..., 0, :2] & 63, lines[..., 0, 2:] & 63
        return pairs[..., :units, :]
    for number in range(2):
        pairs[..., :4, number] = lines[..., number, :] & 63
    if units > 4:
        for number in range(2):
            low = lines[..., 2, :] >> 4 * number & 15
            pairs[..., 4:, number] = low | (lines[..., number, :] >> 6) << 4
    return pairs[..., :units, :]


def pair_lines(units: int) -> int:
    """Lines of `join_pairs_of_6_bits`."""
    return 1 if units <= 2 else 2 if units <= 4 else 3


def split_in_fours(words: Array, bits: int, mask: np.uint32) -> Array:
    """Words [..., 2, 8] that hold `bits` bits of four units each, those of a column in one byte: codes [..., 8, 8]."""
    units = [words >> np.uint32(bits * i) & mask for i in range(4)]
    return np.stack(units, axis=-2).reshape(*words.shape[:-2], UNITS, 8)


def join_in_fours(codes: Array, bits: int) -> Array:
    """Undoes `split_in_fours`."""
    units = codes.reshape(*codes.shape[:-2], 2, 4, 8)
    words = units[..., 0, :].copy()
    for i in range(1, 4):
        words |= units[..., i, :] << np.uint32(bits * i)
    return words


def split_in_eights(words: Array) -> Array:
    """Words [..., 8] that hold a bit of each unit, those of a column in one byte: codes [..., 8, 8]."""
    return np.stack([words >> np.uint32(i) & LOW_BITS for i in range(UNITS)], axis=-2)


def join_in_eights(codes: Array) -> Array:
    """Undoes `split_in_eights`."""
    words = codes[..., 0, :].copy()
    for i in range(1, UNITS):
        words |= codes[..., i, :] << np.uint32(i)
    return words


def words_at(blocks: Bytes, start: int, stop: int) -> Array:
    """Bytes [start, stop) of blocks [..., block_bytes] as uint32 [..., words]."""
    return np.ascontiguousarray(blocks[..., start:stop]).view("<u4")


def put_words(blocks: Bytes, start: int, words: Array) -> None:
    """Undoes `words_at`: words [..., n], whatever their last axes, into blocks from byte `start` on."""
    size = 4 * math.prod(words.shape[blocks.ndim - 1 :])
    blocks[..., start : start + size] = np.ascontiguousarray(words).view(np.uint8).reshape(*blocks.shape[:-1], size)


def join_pairs_of_bytes(pairs: Bytes) -> Array:
    """Two bytes for each unit, [..., units, 2], as words [..., half as many lines]: unit 2i, then unit 2i + 1."""
    units = pairs.shape[-2]
    filled = np.zeros((*pairs.shape[:-2], -(-units // 2) * 2, 2), np.uint8)
    filled[..., :units, :] = pairs
    return filled.reshape(*pairs.shape[:-2], -1).view("<u4")


def split_pairs_of_bytes(words: Array, units: int) -> Bytes:
    """Undoes `join_pairs_of_bytes`."""
    pairs = np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape[:-1], -1, 2)
    return pairs[..., :units, :]
