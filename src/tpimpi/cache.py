"""The keys and values of this rank's KV heads."""

from __future__ import annotations

import numpy as np

from tpimpi.formats import F32


class KVCache:
    """f32 keys and values, each [layers, kv_heads of this rank, context, head_dim]; memory is touched as it fills."""

    def __init__(self, layers: int, kv_heads: int, context: int, head_dim: int) -> None:
        self.context = context
        self.k: F32 = np.zeros((layers, kv_heads, context, head_dim), np.float32)
        self.v: F32 = np.zeros((layers, kv_heads, context, head_dim), np.float32)

    def write(self, layer: int, first_head: int, start: int, k: F32, v: F32) -> None:
        """Put k and v, [positions, heads, head_dim], at positions from `start` of KV heads from `first_head`."""
        heads = slice(first_head, first_head + k.shape[1])
        positions = slice(start, start + k.shape[0])
        self.k[layer, heads, positions] = k.transpose(1, 0, 2)
        self.v[layer, heads, positions] = v.transpose(1, 0, 2)

    def read(self, layer: int, stop: int) -> tuple[F32, F32]:
        """Keys and values of positions [0, stop), each [kv_heads, stop, head_dim]; views, not copies."""
        return self.k[layer, :, :stop], self.v[layer, :, :stop]
