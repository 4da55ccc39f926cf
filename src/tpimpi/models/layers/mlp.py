"""The feed-forward block of one tile."""

from __future__ import annotations

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.models.layer_spec import Activation
from tpimpi.models.layers.parts import Parts


def mlp_partial(backend: Backend, x: F32, tile: Parts, activation: Activation) -> F32:
    """The gated feed-forward block of one tile's columns, x [n, hidden] normed: [n, hidden]."""
    gate = backend.linear(x, tile.matrices["gate"], tile.parts.get("gate_bias"))
    up = backend.linear(x, tile.matrices["up"], tile.parts.get("up_bias"))
    gated = backend.swiglu(gate, up) if activation == "silu" else backend.geglu(gate, up)
    return backend.linear(gated, tile.matrices["down"])
