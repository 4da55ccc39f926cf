"""Attention in two steps, where queries and keys are normed over all heads together (OLMo 2 and 3): the heads are on several
ranks, so the sums of squares are added over the ranks between the projections and the attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.backends import Backend
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.models.layers.attention import QKNormWeights, rotated
from tpimpi.models.layers.parts import Parts
from tpimpi.models.layers.rope import Angles


@dataclass(frozen=True)
class TileHeads:
    """Which heads of the model a tile has: [first, last) each; and `counted`, the KV heads that no rank before has too."""

    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    counted: tuple[int, int]


@dataclass
class _Piece:
    """Of one tile, [n, heads of the tile, head_dim] each; None where it has none."""

    q: F32 | None
    k: F32 | None
    v: F32 | None
    of: TileHeads


class Projections:
    """One layer's queries, keys and values on a rank, of n positions, from their projection to their attention."""

    def __init__(self, backend: Backend, head_dim: int) -> None:
        self.backend, self._head_dim = backend, head_dim
        self._pieces: dict[tuple[int, int], _Piece] = {}  # by the query heads of their tile

    def add(self, x: F32, tile: Parts, of: TileHeads) -> F32:
        """Project x [n, hidden] by one tile. Returns the sums of squares of its queries and keys, [n, 2]."""
        made: dict[str, F32 | None] = {}
        squares = np.zeros((x.shape[0], 2), np.float32)
        for name in ("q", "k", "v"):
            made[name] = None
            if name in tile.matrices:
                y = self.backend.linear(x, tile.matrices[name], tile.parts.get(f"{name}_bias"))
                made[name] = y.reshape(x.shape[0], -1, self._head_dim)
        if (q := made["q"]) is not None:
            squares[:, 0] = np.einsum("nhd,nhd->n", q, q)
        if (k := made["k"]) is not None:
            own = k[:, of.counted[0] - of.kv_heads[0] : of.counted[1] - of.kv_heads[0]]
            squares[:, 1] = np.einsum("nhd,nhd->n", own, own)
        self._pieces[of.heads] = _Piece(q, k, made["v"], of)
        return squares

    def finish(
        self,
        squares: F32,  # [n, 2], over all ranks
        norm: QKNormWeights,
        kv: KVPages,  # of the layer
        rows: Rows,
        first_kv: int,  # of this rank's KV heads
        rotary: Angles | None,
    ) -> None:
        """Norm and rotate queries and keys, and put keys and values into the pages."""
        for piece in self._pieces.values():
            if piece.q is not None:
                q = self._normed(piece.q, squares[:, 0], norm.q, piece.of.heads, norm.eps)
                piece.q = rotated(self.backend, q, rotary, queries=True)
            if piece.k is not None and piece.v is not None:
                k = self._normed(piece.k, squares[:, 1], norm.k, piece.of.kv_heads, norm.eps)
                k = rotated(self.backend, k, rotary, queries=False)
                self.backend.store(kv, rows, piece.of.kv_heads[0] - first_kv, k, piece.v)

    def _normed(self, y: F32, squares: F32, weight: F32, heads: tuple[int, int], eps: float) -> F32:
        """y [n, heads, head_dim] over the root of the mean square of all heads, times their part of `weight`."""
        inverse = 1 / np.sqrt(squares / np.float32(weight.size) + np.float32(eps))
        return y * inverse[:, None, None] * weight.reshape(-1, self._head_dim)[slice(*heads)]

    def attention(
        self,
        tile: Parts,
        heads: tuple[int, int],
        kv: KVPages,
        rows: Rows,
        spec: AttentionSpec,
        q_to_kv: tuple[int, ...],
    ) -> F32:
        """Attention of one tile's query heads, through its columns of the output projection: [n, hidden]."""
        q = self._pieces[heads].q
        assert q is not None, "a tile of the output projection without queries"
        attended = self.backend.attention(np.ascontiguousarray(q), kv, rows, q_to_kv, spec)
        return self.backend.linear(attended.reshape(q.shape[0], -1), tile.matrices["o"])
