"""The KV cache: the keys and values of this rank's KV heads, of one sequence.

It is one run of positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Array
from tpimpi.system.buffers import RELEASE_BYTES, Pages

KV_FORMATS = ("auto", "f16", "f32")  # what --kv takes; auto is as precise as the weights deserve, see `kv_dtype`
_LARGEST_F16 = np.float32(65504)  # the largest finite f16


class KVCache:
    """Keys and values, each [layers, kv_heads of this rank, context, head_dim], f32 or f16 (see `to_f16`).

    Memory is touched as it fills.
    """

    def __init__(
        self, layers: int, kv_heads: int, context: int, head_dim: int, dtype: npt.DTypeLike = np.float32
    ) -> None:
        self.k: Array
        self.v: Array
        self.context, self.head_dim = context, head_dim
        self.filled = 0  # positions that were ever written
        nbytes = cache_bytes(layers, kv_heads, context, head_dim, dtype) // 2
        # np.zeros would take large pages, and with them the memory of positions that are not there yet.
        self._memory = [Pages(nbytes, large=False) for _ in "kv"]
        self.k, self.v = (
            pages.array.view(dtype).reshape(layers, kv_heads, context, head_dim) for pages in self._memory
        )

    def take_over(self, other: KVCache, positions: int) -> None:
        """Have the first `positions` of a cache that differs in `context` alone; its memory is given back layer by layer."""
        for layer in range(len(self.k)):
            for ours, theirs in ((self.k, other.k), (self.v, other.v)):
                ours[layer, :, :positions] = theirs[layer, :, :positions]
            for pages in other._memory:
                whole = pages.array.nbytes * (layer + 1) // len(self.k) // RELEASE_BYTES * RELEASE_BYTES
                pages.release(0, whole)
        self.filled = max(self.filled, positions)

    def write(self, layer: int, first_head: int, start: int, k: F32, v: F32) -> None:
        """Put k and v, [positions, heads, head_dim], at positions from `start` of KV heads from `first_head`."""
        heads = slice(first_head, first_head + k.shape[1])
        positions = slice(start, start + k.shape[0])
        self.filled = max(self.filled, positions.stop)
        for cache, new in ((self.k, k), (self.v, v)):
            fitting: Array = to_f16(new) if cache.dtype == np.float16 else new
            cache[layer, heads, positions] = fitting.transpose(1, 0, 2)

    @property
    def filled_bytes(self) -> int:
        """Memory that the positions written so far take."""
        return (self.k.nbytes + self.v.nbytes) // max(self.context, 1) * self.filled

    def read(self, layer: int, stop: int) -> tuple[Array, Array]:
        """Keys and values of positions [0, stop), each [kv_heads, stop, head_dim]; views, not copies."""
        return self.k[layer, :, :stop], self.v[layer, :, :stop]


def cache_bytes(layers: int, kv_heads: int, context: int, head_dim: int, dtype: npt.DTypeLike) -> int:
    """Memory that a KVCache of this shape takes when it is full."""
    return 2 * layers * kv_heads * context * head_dim * np.dtype(dtype).itemsize


def kv_dtype(kv: str, weight_formats: Iterable[str]) -> np.dtype[Any]:
    """The dtype of the cache for one of KV_FORMATS: auto is f32 where all of the layers' weights are f32, else f16."""
    if kv == "auto":
        kv = "f32" if set(weight_formats) == {"f32"} else "f16"
    return np.dtype({"f16": np.float16, "f32": np.float32}[kv])


def to_f16(values: F32) -> npt.NDArray[Any]:
    """The nearest f16 of each number, ties to even. Same shape.

    What is beyond the range of f16, an infinity too, becomes +-65504, the largest that is finite: an infinite key or value
    would make NaN of every position after it. NaN stays NaN.
    """
    return np.maximum(np.minimum(values, _LARGEST_F16), -_LARGEST_F16).astype(np.float16)
