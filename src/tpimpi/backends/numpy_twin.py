"""Every operation as NumPy says it most plainly: the oracle of the other backends, and a backend that needs no torch."""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from tpimpi.formats import F32, Array, decode


class NumpyTwin:
    """See `Backend` for shapes and meaning."""

    name = "numpy"

    def __init__(self, threads: int) -> None:
        # The BLAS beneath NumPy would else take every core, in every rank.
        self._limits = threadpool_limits(threads, user_api="blas")

    def linear(self, x: F32, weight: Array, bias: F32 | None = None) -> F32:
        y = x @ decode(weight).T
        return y if bias is None else y + bias

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        mean_square = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        inverse: F32 = np.reciprocal(np.sqrt(mean_square + np.float32(eps)))
        return x * inverse * weight

    def rope(self, x: F32, cos: F32, sin: F32) -> F32:
        first, second = np.split(x, 2, axis=-1)
        cos, sin = cos[:, None], sin[:, None]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

    def attention(self, q: F32, k: F32, v: F32, q_to_kv: tuple[int, ...], start: int, window: int) -> F32:
        n, _, head_dim = q.shape
        position = start + np.arange(n)[:, None]
        key = np.arange(start + n)[None]
        seen = (key <= position) & ((key > position - window) if window else True)
        heads = list(q_to_kv)
        scores = np.einsum("nhd,hkd->hnk", q, k[heads]) * np.float32(head_dim**-0.5)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return np.einsum("hnk,hkd->nhd", weights, v[heads])

    def swiglu(self, gate: F32, up: F32) -> F32:
        with np.errstate(over="ignore"):  # exp(-gate) may be infinite: gate / inf is the right limit, 0
            return gate / (1 + np.exp(-gate)) * up
