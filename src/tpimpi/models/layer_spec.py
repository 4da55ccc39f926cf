"""What a layer is, as data: all that the mathematics in `layers` and the loop over blocks ask about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.router import RouterSpec

Norm = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh", "clamped_silu"]
QKNormKind = Literal["none", "head", "all"]

NORMS: tuple[Norm, ...] = ("rms", "layer")
ACTIVATIONS: tuple[Activation, ...] = ("silu", "gelu_tanh", "clamped_silu")


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary angles are changed for long contexts.

    kind "linear": frequencies are divided by `factor`.
    kind "llama3": Llama 3.1's rule (wavelengths above original_context / low_freq_factor are divided by `factor`,
        below original_context / high_freq_factor kept, interpolated between).
    kind "factors": frequency i is divided by factors[i] (GGUF's `rope_freqs` tensor); half as many as rotated elements.
    kind "yarn": Peng et al. 2023, arXiv 2309.00071: elements that turn more than `beta_fast` times within original_context
        keep their frequency, those that turn less than `beta_slow` times are divided by `factor`, interpolated between;
        `truncate`: between whole elements.
    kind "longrope": Ding et al. 2024, arXiv 2402.13753: frequency i is divided by factors[i], or by long_factors[i] where
        the sequence has room for more than original_context positions.

    `attention_factor` multiplies cosines and sines. Where `query_growth` is b > 0 the query at position p is multiplied by
    1 + b ln(1 + floor(p / original_context)) (Ministral 3; as Llama 4's).
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    query_growth: float = 0.0


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of cosines and sines for contexts that are `factor` times longer (Peng et al. 2023, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


@dataclass(frozen=True)
class Rope:
    """The rotary positions of a layer: the base of the frequencies, and how many elements of a head are rotated.

    Of these the first half are paired with the second: element i with i + dims / 2.
    """

    theta: float
    dims: int
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class LayerSpec:
    """One layer: attention and feed-forward block, each x + residual_scale * post_norm(block(pre_norm(x))).

    What is not there is left out of that. Where a layer is `parallel` both blocks read the norm of the same x, and are
    added together.
    """

    attention: AttentionSpec
    rope: Rope | None  # None: no positions at all
    qk_norm: QKNormKind  # of queries and keys: none, over each head, or over all heads together
    norm: Norm  # of the norms before the blocks and before the head; LayerNorm is without bias
    pre_norms: bool
    post_norms: bool  # always RMS norms
    activation: Activation  # down(activation(gate) * up); clamped_silu: see Backend.clamped_swiglu
    activation_limit: float  # of clamped_silu
    router: RouterSpec | None  # None: a dense block
    residual_scale: float
    parallel: bool
