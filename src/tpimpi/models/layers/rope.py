"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), with the scalings that models use."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32, I32
from tpimpi.models.layer_spec import Rope, RopeScaling


@dataclass(frozen=True)
class Angles:
    """Rotary angles of rows at their positions: cos and sin, each [n, dims / 2] f32; dims elements of a head are rotated.

    `query_scale`, [n, 1, 1] f32, is what queries are multiplied by; None: nothing.
    """

    cos: F32
    sin: F32
    query_scale: F32 | None = None


def rope_frequencies(rope: Rope, context: int) -> F32:
    """Angle per position of each pair of elements, [dims / 2] f32 (Su et al. 2021; scaling as in RopeScaling).

    `context` is the number of positions that the sequence has room for.
    """
    exponents = np.arange(0, rope.dims, 2, dtype=np.float32) / np.float32(rope.dims)
    frequencies = (1.0 / np.power(np.float32(rope.theta), exponents)).astype(np.float32)
    scaling = rope.scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / np.float32(scaling.factor)
    if scaling.kind == "factors":
        return frequencies / np.asarray(scaling.factors, np.float32)
    if scaling.kind == "longrope":
        factors = scaling.long_factors if context > scaling.original_context else scaling.factors
        return frequencies / np.asarray(factors, np.float32)
    if scaling.kind == "yarn":
        return _yarn_frequencies(frequencies, rope, scaling)
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: F32, scaling: RopeScaling) -> F32:
    """Llama 3.1's rule, as transformers' `_compute_llama3_parameters` states it: [dims / 2] f32."""
    assert scaling.kind == "llama3", scaling.kind
    wavelengths = 2 * np.pi / frequencies
    slow = frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (scaling.original_context / wavelengths - low) / (high - low)
    between = (1 - smooth) * slow + smooth * frequencies
    scaled = np.where(wavelengths > scaling.original_context / low, slow, between)
    return np.where(wavelengths < scaling.original_context / high, frequencies, scaled).astype(np.float32)


def _yarn_frequencies(frequencies: F32, rope: Rope, scaling: RopeScaling) -> F32:
    """Peng et al. 2023, section 3.2, as transformers' `_compute_yarn_parameters` states it: [dims / 2] f32."""

    def correction_dim(times: float) -> float:
        """The pair (not a whole number) that rotates so many times within the original context."""
        return rope.dims * math.log(scaling.original_context / (times * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = correction_dim(scaling.beta_fast), correction_dim(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dims - 1)
    ramp = (np.arange(rope.dims // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    stretched = np.clip(ramp, 0, 1).astype(np.float32)
    return (frequencies / np.float32(scaling.factor) * stretched + frequencies * (1 - stretched)).astype(np.float32)


def angles(rope: Rope, frequencies: F32, position: I32) -> Angles:
    """Angles of these positions, int32 [n]; `frequencies` are those of `rope`."""
    numbers = position.astype(np.float32)[:, None]
    phases = numbers * frequencies
    cos, sin = np.cos(phases), np.sin(phases)
    scaling = rope.scaling
    if scaling is None:
        return Angles(cos, sin)
    if scaling.attention_factor != 1:
        cos, sin = cos * np.float32(scaling.attention_factor), sin * np.float32(scaling.attention_factor)
    if not scaling.query_growth:
        return Angles(cos, sin)
    grown = 1 + scaling.query_growth * np.log(1 + np.floor(numbers / scaling.original_context))
    return Angles(cos, sin, grown.astype(np.float32)[:, None])
