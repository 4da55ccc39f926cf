"""The mathematics of a layer on one rank, tile by tile: pure functions that return a partial.

A partial is what one tile adds to its block's output, [positions, hidden] f32; the sum over all tiles of all ranks is the
whole. The functions know neither MPI nor files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from tpimpi.compute.backends import Backend
from tpimpi.compute.formats.packed import F32, Array, Matrix
from tpimpi.models.config import ModelConfig, RopeScaling
from tpimpi.models.kv.cache import KVCache


class Parts(Protocol):
    """What a tile holds, by name; shapes in slicefile."""

    @property
    def parts(self) -> Mapping[str, Array]:
        """Biases."""

    @property
    def matrices(self) -> Mapping[str, Matrix]:
        """Weight matrices."""


@dataclass(frozen=True)
class Angles:
    """Rotary angles of a run of positions from `start`: cos and sin, each [positions, head_dim / 2] f32."""

    start: int
    cos: F32
    sin: F32


@dataclass(frozen=True)
class QKNorm:
    """Weights, [head_dim] f32 each, of the norm over each query and key head (Qwen3), and its epsilon."""

    q: F32
    k: F32
    eps: float


def rope_frequencies(config: ModelConfig) -> F32:
    """Angle per position of each pair of elements, [head_dim / 2] f32 (Su et al. 2021; scaling as in RopeScaling)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = (1.0 / np.power(np.float32(config.rope_theta), exponents)).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "factors":
        return frequencies / np.asarray(scaling.factors, np.float32)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: F32, scaling: RopeScaling) -> F32:
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * np.pi / frequencies
    slow = frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * slow + smooth * frequencies
    scaled = np.where(wavelengths > scaling.original_context / low, slow, between)
    return np.where(wavelengths < scaling.original_context / high, frequencies, scaled).astype(np.float32)


def angles(frequencies: F32, start: int, positions: int) -> Angles:
    """Angles of `positions` positions from `start`."""
    phases = np.arange(start, start + positions, dtype=np.float32)[:, None] * frequencies
    return Angles(start, np.cos(phases), np.sin(phases))


def attention_partial(
    backend: Backend,
    x: F32,  # [n, hidden], normed
    tile: Parts,
    cache: KVCache,
    layer: int,
    first_kv: int,  # where this tile's KV heads stand in the cache
    q_to_kv: tuple[int, ...],
    rotary: Angles,
    window: int,
    qk_norm: QKNorm | None = None,
) -> F32:
    """Attention of one tile's query heads, through its columns of the output projection: [n, hidden]."""
    n, head_dim = x.shape[0], rotary.cos.shape[1] * 2

    def heads(name: str) -> F32:
        return backend.linear(x, tile.matrices[name], tile.parts.get(f"{name}_bias")).reshape(n, -1, head_dim)

    def turned(name: str) -> F32:
        y = heads(name)
        if qk_norm is not None:
            y = backend.rms_norm(y, qk_norm.q if name == "q" else qk_norm.k, qk_norm.eps)
        return backend.rope(y, rotary.cos, rotary.sin)

    if "k" in tile.matrices:
        cache.write(layer, first_kv, rotary.start, turned("k"), heads("v"))
    if "q" not in tile.matrices:
        return np.zeros_like(x)
    k, v = cache.read(layer, rotary.start + n)
    seen = backend.attention(turned("q"), k, v, q_to_kv, rotary.start, window)
    return backend.linear(seen.reshape(n, -1), tile.matrices["o"])


def mlp_partial(backend: Backend, x: F32, tile: Parts) -> F32:
    """SwiGLU of one tile's columns, x [n, hidden] normed: [n, hidden]."""
    gate = backend.linear(x, tile.matrices["gate"], tile.parts.get("gate_bias"))
    up = backend.linear(x, tile.matrices["up"], tile.parts.get("up_bias"))
    return backend.linear(backend.swiglu(gate, up), tile.matrices["down"])


def head_logits(backend: Backend, x: F32, tile: Parts) -> F32:
    """Logits of one tile's run of the vocabulary, x [n, hidden] normed: [n, rows]."""
    return backend.linear(x, tile.matrices["rows"])
