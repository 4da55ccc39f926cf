"""Quantizing a matrix with NumPy: the twin of the native kernel, to the same bytes (see search.py for the algorithm)."""

from __future__ import annotations

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.search import LIMIT

_SLAB_WEIGHTS = 1 << 15  # worked on at a time: 128 KiB an array, so that the few of them stay in the cache


def quantize(values: F32, fmt: str) -> Bytes:
    """Numbers [rows, columns] in a quantized format: uint8 [rows, row_bytes]. A Quantizer.

    `columns` must be a multiple of the format's block. Peak memory: the result and a few MB. ValueError for numbers that are
    not finite.
    """
    form = FORMATS[fmt]
    rows, columns = values.shape
    assert columns % form.block_weights == 0, columns
    blocks = np.ascontiguousarray(values, dtype=np.float32).reshape(-1, form.block_weights)
    out = np.empty((len(blocks), form.block_bytes), np.uint8)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        step = _SLAB_WEIGHTS // form.block_weights
        for first in range(0, len(blocks), step):
            # Blocks are columns here: a sum over a block adds whole rows.
            x = np.ascontiguousarray(blocks[first : first + step].T)  # [block_weights, blocks]
            if not np.isfinite(x).all():
                raise ValueError("holds numbers that are not finite")
            np.clip(x, -LIMIT, LIMIT, out=x)
            count = x.shape[1]
            if count == 1:  # NumPy adds a single column in another order, and a block would depend on those beside it
                x = np.repeat(x, 2, axis=1)
            out[first : first + step] = form.quantize_blocks(x)[:count]
    return out.reshape(rows, form.row_bytes(columns))
