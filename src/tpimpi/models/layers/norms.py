"""The norms before blocks, and before the head."""

from __future__ import annotations

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend
from tpimpi.models.layer_spec import Norm


def pre_norm(backend: Backend, kind: Norm, x: F32, weight: F32, eps: float) -> F32:
    """x [n, hidden] normed: by RMS, or by LayerNorm without bias, which is the RMS norm of what is left of the mean."""
    if kind == "layer":
        x = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float32)
    return backend.rms_norm(x, weight, eps)
