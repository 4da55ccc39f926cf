"""Keys and values as they are stored: in pages, of the rows of several sequences, in one of three formats.

f32 and f16 are rows of head_dim numbers. q8_0 is GGML's: blocks of 32 numbers along a head, each an f16 scale and 32 int8
codes, so head_dim is a multiple of 32. What is stored has the same bytes in every backend.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, I32, Array, Bytes

CACHED_FORMATS = ("f32", "f16", "q8_0")
_LARGEST_F16 = np.float32(65504)  # the largest finite f16
_Q8_NUMBERS, _Q8_BYTES = 32, 34  # of a block
_Q8_MOST_CODE = np.float32(127)
_NAN_F16 = np.frombuffer(b"\x00\x7e", np.uint8)


@dataclass(frozen=True)
class KVPages:
    """The pages of one layer on one rank: k and v [pages, kv_heads, positions of a page, row], views as a rule.

    A row is head_dim numbers, f32 or f16, or the bytes of their blocks (q8_0, uint8).
    """

    k: Array
    v: Array
    head_dim: int

    @property
    def page_size(self) -> int:
        """Positions of a page."""
        return int(self.k.shape[2])


@dataclass(frozen=True)
class Rows:
    """The rows of a step, on every rank the same: row i is position[i] of the sequence sequence[i], both int32 [n].

    tables[s, p], int32 [sequences, pages of the longest], is the page where sequence s has its positions from p times the
    positions of a page on; -1 where it has none. Rows of one sequence stand together, in the order of their positions.
    """

    sequence: I32
    position: I32
    tables: I32

    def spans(self) -> Iterator[slice]:
        """The runs of rows that are of one sequence."""
        edges = np.flatnonzero(np.diff(self.sequence)) + 1
        bounds = [0, *edges.tolist(), len(self.sequence)]
        return (slice(first, last) for first, last in itertools.pairwise(bounds) if first < last)


def row_layout(fmt: str, head_dim: int) -> tuple[np.dtype[Any], int]:
    """The dtype of a stored row of head_dim numbers, and how many it has. `fmt` is one of CACHED_FORMATS."""
    if fmt == "q8_0":
        assert head_dim % _Q8_NUMBERS == 0
        return np.dtype(np.uint8), head_dim // _Q8_NUMBERS * _Q8_BYTES
    return np.dtype({"f32": np.float32, "f16": np.float16}[fmt]), head_dim


def fits_q8_0(head_dim: int) -> bool:
    """Whether a head's numbers can be stored in blocks (q8_0)."""
    return head_dim % _Q8_NUMBERS == 0


def stored(values: F32, like: Array) -> Array:
    """Numbers [..., head_dim] as rows of the dtype of `like`: [..., row]."""
    if like.dtype == np.uint8:
        return to_q8_0(values)
    return to_f16(values) if like.dtype == np.float16 else values


def widened(rows: Array) -> F32:
    """What stored rows [..., row] stand for: [..., head_dim]."""
    if rows.dtype != np.uint8:
        return rows.astype(np.float32, copy=False)
    blocks = rows.reshape(*rows.shape[:-1], -1, _Q8_BYTES)
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float32)
    return (blocks[..., 2:].view(np.int8) * scales).reshape(*rows.shape[:-1], -1)


def to_f16(values: F32) -> npt.NDArray[Any]:
    """The nearest f16 of each number, ties to even. Same shape.

    What is beyond the range of f16, an infinity too, becomes +-65504, the largest that is finite: an infinite key or value
    would make NaN of every position after it. NaN stays NaN.
    """
    return np.maximum(np.minimum(values, _LARGEST_F16), -_LARGEST_F16).astype(np.float16)


def to_q8_0(values: F32) -> Bytes:
    """Numbers [..., head_dim] in blocks: [..., bytes]. A block's scale is the nearest f16 to a 127th of the greatest
    magnitude, at most 65504; codes are x / scale as the nearest integer, ties to even. With a NaN all 32 are NaN."""
    blocks = values.reshape(*values.shape[:-1], -1, _Q8_NUMBERS)
    greatest = np.abs(blocks).max(axis=-1, keepdims=True)
    lost = np.isnan(greatest)
    scale = (np.minimum(greatest, _LARGEST_F16 * _Q8_MOST_CODE) / _Q8_MOST_CODE).astype(np.float16)
    wide = np.where(lost, np.float32(0), scale.astype(np.float32))
    factor = np.divide(np.float32(1), wide, out=np.zeros_like(wide), where=wide != 0)
    with np.errstate(invalid="ignore"):
        codes = np.rint(np.clip(blocks * factor, -_Q8_MOST_CODE, _Q8_MOST_CODE))
    out = np.empty((*blocks.shape[:-1], _Q8_BYTES), np.uint8)
    out[..., :2] = np.where(lost, _NAN_F16, scale.view(np.uint8))
    out[..., 2:] = np.where(lost, np.float32(0), codes).astype(np.int8).view(np.uint8)
    return out.reshape(*values.shape[:-1], -1)


def store(kv: KVPages, rows: Rows, first_head: int, k: F32, v: F32) -> None:
    """As Backend.store."""
    page, heads = kv.page_size, first_head + np.arange(k.shape[1])
    places = rows.tables[rows.sequence, rows.position // page]
    assert (places >= 0).all(), "a row has no page"
    at = (places[:, None], heads[None], (rows.position % page)[:, None])
    for pages, new in ((kv.k, k), (kv.v, v)):
        pages[at] = stored(new, pages)


def gathered(pages: Array, table: I32, first_page: int, stop: int) -> Array:
    """A sequence's rows at positions from the beginning of its page `first_page` up to `stop`: [kv_heads, positions, row].

    A view where they are in one page.
    """
    page = pages.shape[2]
    places = table[first_page : -(-stop // page)]
    count = stop - first_page * page
    if len(places) == 1:
        return pages[places[0], :, :count]
    found = pages[places].transpose(1, 0, 2, 3)
    return found.reshape(found.shape[0], -1, found.shape[3])[:, :count]
