"""Operations that a backend has by its other operations."""

from __future__ import annotations

from collections.abc import Sequence

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.compute.experts import ExpertUse


def activated(backend: Backend, activation: str, gate: F32, up: F32, limit: float) -> F32:
    """gate and up [n, columns] by an activation: silu, gelu_tanh or clamped_silu, the last with its limit."""
    if activation == "silu":
        return backend.swiglu(gate, up)
    if activation == "gelu_tanh":
        return backend.geglu(gate, up)
    assert activation == "clamped_silu", activation
    return backend.clamped_swiglu(gate, up, limit)


def experts(backend: Backend, x: F32, uses: Sequence[ExpertUse], activation: str, limit: float, out: F32) -> None:
    """As Backend.experts, one expert after another."""
    for use in uses:
        matrices, parts, rows = use.matrices, use.parts, use.rows
        down_bias = parts.get("down_bias")
        if matrices and len(rows):
            own = x[rows]
            gate = backend.linear(own, matrices["gate"], parts.get("gate_bias"))
            up = backend.linear(own, matrices["up"], parts.get("up_bias"))
            result = backend.linear(activated(backend, activation, gate, up, limit), matrices["down"], down_bias)
            out[rows] += use.weights[:, None] * result
        elif down_bias is not None:
            out[rows] += use.weights[:, None] * down_bias
