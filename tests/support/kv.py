"""Keys and values of sequences, put into pages here and there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpimpi.compute.kv import KVPages, Rows

DEFAULT_PAGE = 16  # positions


def paged(
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],
    page: int = DEFAULT_PAGE,
    seed: int = 0,
    head_dim: int | None = None,
) -> tuple[KVPages, np.ndarray]:
    """Pages with the stored keys and values of each sequence, [kv_heads, its positions, row], and the sequences' tables.

    Pages are in no order; what is not written is NaN, and places that no page has are -1.
    """
    kv_heads, _, row = sequences[0][0].shape
    counts = [-(-k.shape[1] // page) for k, _ in sequences]
    places = np.random.default_rng(seed).permutation(sum(counts) + 2).astype(np.int32)
    tables = np.full((len(sequences), max(counts)), -1, np.int32)
    dtype = sequences[0][0].dtype
    both = np.full((2, len(places), kv_heads, page, row), 0xFF if dtype == np.uint8 else np.nan, dtype)
    for number, (sequence, count) in enumerate(zip(sequences, counts, strict=True)):
        tables[number, :count], places = places[:count], places[count:]
        for pages, of in zip(both, sequence, strict=True):
            for i, place in enumerate(tables[number, :count]):
                part = of[:, i * page : (i + 1) * page]
                pages[place, :, : part.shape[1]] = part
    return KVPages(both[0], both[1], row if head_dim is None else head_dim), tables


def one(k: np.ndarray, v: np.ndarray, start: int, page: int = DEFAULT_PAGE, seed: int = 0) -> tuple[KVPages, Rows]:
    """Pages of k and v [kv_heads, positions, head_dim], f32 or f16, and rows of its positions from `start`."""
    kv, tables = paged([(k, v)], page, seed)
    position = np.arange(start, k.shape[1], dtype=np.int32)
    return kv, Rows(np.zeros_like(position), position, tables)
