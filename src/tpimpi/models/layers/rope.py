"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with the scalings that models use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.models.config import ModelConfig, RopeScaling


@dataclass(frozen=True)
class Angles:
    """Rotary angles of a run of positions from `start`: cos and sin, each [positions, head_dim / 2] f32."""

    start: int
    cos: F32
    sin: F32


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
    """Llama 3.1's rule, as transformers' `_compute_llama3_parameters` states it: [head_dim / 2] f32."""
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
