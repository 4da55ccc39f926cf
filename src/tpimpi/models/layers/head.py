"""The output head of one tile, and what becomes of its logits."""

from __future__ import annotations

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.models.layers.parts import Parts


def head_logits(backend: Backend, x: F32, tile: Parts) -> F32:
    """Logits of one tile's run of the vocabulary, x [n, hidden] normed: [n, rows]."""
    return backend.linear(x, tile.matrices["rows"])


def scaled_logits(logits: F32, scale: float, softcap: float) -> F32:
    """Logits [n, vocab] times `scale`; with a `softcap` c > 0 then c tanh(logit / c). In place."""
    if scale != 1:
        logits *= np.float32(scale)
    if softcap:
        logits /= np.float32(softcap)
        np.tanh(logits, out=logits)
        logits *= np.float32(softcap)
    return logits
