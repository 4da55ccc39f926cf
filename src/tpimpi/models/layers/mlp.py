"""The feed-forward block of one tile."""

from __future__ import annotations

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.compute.backends.generic import activated
from tpimpi.models.layer_spec import Activation
from tpimpi.models.layers.parts import Parts


def mlp_partial(backend: Backend, x: F32, tile: Parts, activation: Activation, limit: float = 0.0) -> F32:
    """The gated feed-forward block of one tile's columns, x [n, hidden] normed: [n, hidden]. `limit` is of clamped_silu."""
    gate = backend.linear(x, tile.matrices["gate"], tile.parts.get("gate_bias"))
    up = backend.linear(x, tile.matrices["up"], tile.parts.get("up_bias"))
    gated = activated(backend, activation, gate, up, limit)
    return backend.linear(gated, tile.matrices["down"])
