"""Codes of a few bits in words of 4 bytes, laid out as the kernels take them apart.

A unit of 32 columns is 8 words: byte i of word k is the code of column 4k + i. All arrays are uint32, a unit's words
along the last axis; what is put together is part of a code, in its lowest bits.
"""

from __future__ import annotations

import functools

import numpy as np

from tpimpi.compute.arrays import Array

LOW_NIBBLES = np.uint32(0x0F0F0F0F)
LOW_PAIRS = np.uint32(0x03030303)
LOW_BITS = np.uint32(0x01010101)


def join_nibbles(codes: Array) -> Array:
    """Codes of 4 bits [..., 8] as lines [..., 4]: line j has word 2j in the low nibbles, word 2j + 1 in the high ones."""
    return codes[..., 0::2] | codes[..., 1::2] << np.uint32(4)


def split_nibbles(lines: Array) -> Array:
    """Undoes `join_nibbles`."""
    codes = np.empty((*lines.shape[:-1], 8), np.uint32)
    codes[..., 0::2] = lines & LOW_NIBBLES
    codes[..., 1::2] = lines >> np.uint32(4) & LOW_NIBBLES
    return codes


def join_pairs(codes: Array) -> Array:
    """Codes of 2 bits [..., 8] as lines [..., 2]: line h has word 4h + k in bits 2k and 2k + 1 of each byte."""
    return _joined(codes.reshape(*codes.shape[:-1], 2, 4), 2)


def split_pairs(lines: Array) -> Array:
    """Undoes `join_pairs`."""
    return _split(lines, 4, 2, LOW_PAIRS).reshape(*lines.shape[:-1], 8)


def join_bits(codes: Array) -> Array:
    """Codes of 1 bit [..., 8] as one line [..., 1]: bit k of each byte is word k."""
    return _joined(codes, 1)[..., None]


def split_bits(lines: Array) -> Array:
    """Undoes `join_bits`."""
    return _split(lines[..., 0], 8, 1, LOW_BITS)


def _joined(codes: Array, bits: int) -> Array:
    out = codes[..., 0].copy()
    for k in range(1, codes.shape[-1]):
        out |= codes[..., k] << np.uint32(bits * k)
    return out


def _split(lines: Array, count: int, bits: int, mask: np.uint32) -> Array:
    return np.stack([lines >> np.uint32(bits * k) & mask for k in range(count)], axis=-1)


def swap_nibbles(words: Array, low: Array, high: Array) -> None:
    """Of words [..., 8] that hold two units the lines [..., 4] of each, as `join_nibbles` makes them of its codes."""
    even, odd = words[..., 0::2], words[..., 1::2]
    np.bitwise_or(even & LOW_NIBBLES, (odd & LOW_NIBBLES) << np.uint32(4), out=low)
    np.bitwise_or(even >> np.uint32(4) & LOW_NIBBLES, odd & ~LOW_NIBBLES, out=high)


def transpose_fields(words: Array, bits: int) -> Array:
    """Words [..., n], each byte of which has n fields: field i of word k becomes field k of word i."""
    count = words.shape[-1]
    out = [words[..., k].copy() for k in range(count)]
    distance = 1
    while distance < count:
        shift = np.uint32(distance * bits)
        mask = np.uint32({1: 0x55555555, 2: 0x33333333, 4: 0x0F0F0F0F}[distance * bits])
        for k in range(count):
            if not k & distance:
                changed = (out[k] >> shift ^ out[k + distance]) & mask
                out[k + distance] ^= changed
                out[k] ^= changed << shift
        distance *= 2
    return np.stack(out, axis=-1)


def rows_of_bits_to_line(words: Array) -> Array:
    """Words of which bit j is column j's, in the order of `join_bits`: bit k of byte i is that of column 4k + i."""
    return _permuted(words, _tables(to_line=True))


def line_to_rows_of_bits(words: Array) -> Array:
    """Undoes `rows_of_bits_to_line`."""
    return _permuted(words, _tables(to_line=False))


def _permuted(words: Array, tables: Array) -> Array:
    by_byte = np.ascontiguousarray(words)[..., None].view(np.uint8)  # [..., 4]
    found = tables[0][by_byte[..., 0]]
    for i in range(1, 4):
        found |= tables[i][by_byte[..., i]]
    return found


@functools.cache
def _tables(*, to_line: bool) -> Array:
    """For each value of each byte of a word its bits, each at its new place: uint32 [4, 256]."""
    values = np.arange(256, dtype=np.uint32)
    tables = np.zeros((4, 256), np.uint32)
    for j in range(32):
        place = j % 4 * 8 + j // 4 if to_line else j % 8 * 4 + j // 8
        tables[j // 8] |= (values >> np.uint32(j % 8) & np.uint32(1)) << np.uint32(place)
    return tables
