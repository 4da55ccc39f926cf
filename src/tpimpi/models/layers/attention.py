"""Attention of one tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends import Backend
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.models.layers.parts import Parts
from tpimpi.models.layers.rope import Angles


@dataclass(frozen=True)
class QKNormWeights:
    """Weights of the norms of queries and keys, f32, and their epsilon.

    Over each head: [head_dim] each. Over all heads together: [heads * head_dim] and [kv_heads * head_dim], of all ranks.
    """

    q: F32
    k: F32
    eps: float


def attention_partial(
    backend: Backend,
    x: F32,  # [n, hidden], normed
    tile: Parts,
    kv: KVPages,  # of the layer
    rows: Rows,
    spec: AttentionSpec,
    first_kv: int,  # where this tile's KV heads stand in the pages
    q_to_kv: tuple[int, ...],
    rotary: Angles | None,
    qk_norm: QKNormWeights | None = None,
    sinks: F32 | None = None,  # of this tile's query heads, [heads]: see Backend.attention
) -> F32:
    """Attention of one tile's query heads, through its columns of the output projection: [n, hidden]."""
    n, head_dim = x.shape[0], kv.head_dim

    def heads(name: str) -> F32:
        return backend.linear(x, tile.matrices[name], tile.parts.get(f"{name}_bias")).reshape(n, -1, head_dim)

    def normed_and_rotated(name: str) -> F32:
        y = heads(name)
        if qk_norm is not None:
            y = backend.rms_norm(y, qk_norm.q if name == "q" else qk_norm.k, qk_norm.eps)
        return rotated(backend, y, rotary, queries=name == "q")

    if "k" in tile.matrices:
        backend.store(kv, rows, first_kv, normed_and_rotated("k"), heads("v"))
    if "q" not in tile.matrices:
        return np.zeros(x.shape, np.float32)
    attended = backend.attention(normed_and_rotated("q"), kv, rows, q_to_kv, spec, sinks)
    return backend.linear(attended.reshape(n, -1), tile.matrices["o"])


def rotated(backend: Backend, y: F32, rotary: Angles | None, *, queries: bool) -> F32:
    """Queries or keys [n, heads, head_dim] at their positions."""
    if rotary is None:
        return y
    y = backend.rope(y, rotary.cos, rotary.sin)
    return y * rotary.query_scale if queries and rotary.query_scale is not None else y
