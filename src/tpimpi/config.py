"""What a model is, as numbers: read from a config.json or from GGUF metadata; what is not known is refused.

A config key that tpimpi does not know could change the mathematics, and an answer that is silently wrong is worse
than none; so unknown keys are errors unless they are switched off (null, false) or known to be harmless.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies are changed for long contexts.

    kind "linear": frequencies are divided by `factor`.
    kind "llama3": Llama 3.1's rule (wavelengths above original_context / low_freq_factor are divided by `factor`,
        below original_context / high_freq_factor kept, interpolated between).
    kind "factors": frequency i is divided by factors[i] (GGUF's `rope_freqs` tensor); head_dim / 2 of them.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_context: int = 0
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family (RMS norm, rotary positions, grouped-query attention, SwiGLU).

    Sizes are numbers of elements; `context` is in positions; `attention_windows` holds for each layer the number of
    positions a query sees (itself included), 0 for all of them.
    """

    architecture: str  # model_type of the source: llama, mistral, qwen2, qwen3
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    attention_windows: tuple[int, ...]
    tied_head: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form; `from_dict` undoes it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild a config written by `to_dict`; unknown or missing fields raise TypeError."""
        fields = dict(values)
        scaling = fields["rope_scaling"]
        if scaling is not None:
            fields["rope_scaling"] = RopeScaling(**{**scaling, "factors": tuple(scaling["factors"])})
        fields["attention_windows"] = tuple(fields["attention_windows"])
        return cls(**fields)
