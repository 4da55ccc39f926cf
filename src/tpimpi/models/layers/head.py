"""The output head of one tile."""

from __future__ import annotations

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.models.layers.parts import Parts


def head_logits(backend: Backend, x: F32, tile: Parts) -> F32:
    """Logits of one tile's run of the vocabulary, x [n, hidden] normed: [n, rows]."""
    return backend.linear(x, tile.matrices["rows"])
