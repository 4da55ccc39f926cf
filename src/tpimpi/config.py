"""What a model is, as numbers; and what the readers of config.json and of GGUF metadata share.

`config_hf` and `config_gguf` make a ModelConfig; what they do not know they refuse: a key that tpimpi does not know
could change the mathematics, and an answer that is silently wrong is worse than none. So unknown keys are errors unless
they are switched off (null, false) or known to be harmless.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError

ROPE_THETA = 10000.0

# Far above any real model, and low enough that no list made from a hostile config fills the memory.
_MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096


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


class Keys:
    """Typed look-ups in a dictionary that somebody else wrote."""

    def __init__(self, values: Mapping[str, Any], path: Path | str, prefix: str = "") -> None:
        self.values = values
        self.path = path
        self.prefix = prefix

    def integer(self, key: str, default: int | None = None, high: int = _MAX_SIZE) -> int:
        """A positive whole number; a missing key is refused when there is no default."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ModelError(
                f"{self.path}: {self.prefix}{key} is {show(value)}; a whole number of 1 to {high} is needed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; a missing key is refused when there is no default."""
        value = self._get(key, default)
        if not is_positive(value):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {show(value)}; a positive number is needed")
        return float(value)

    def flag(self, key: str) -> bool:
        """A truth value, false if missing or null."""
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {show(value)}; true or false is needed")
        return bool(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key, default)
        if value is None and self.prefix + key not in self.values:
            raise ModelError(f"{self.path}: key '{self.prefix}{key}' is missing, without which the model is not known")
        return value


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def even_split(hidden: int, heads: int, path: Path | str, names: tuple[str, str, str]) -> int:
    if hidden % heads:
        raise ModelError(
            f"{path}: {names[0]} is {hidden}, no multiple of {names[1]}, which is {heads}, and there is no {names[2]}; "
            f"one of the three is wrong"
        )
    return hidden // heads


def checked(config: ModelConfig, path: Path | str) -> ModelConfig:
    """What must hold between the sizes, whatever file they came from."""
    if config.heads % config.kv_heads:
        raise ModelError(
            f"{path}: {config.heads} query heads and {config.kv_heads} key/value heads; "
            f"the first must be a multiple of the second"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: the head size is {config.head_dim}; rotary positions need an even one")
    return config


def is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def is_positive(value: Any) -> bool:
    # Also refuses integers beyond a float's range, which JSON can hold.
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < math.inf
    except OverflowError:
        return False


_SHORT = reprlib.Repr()  # bounded in length and depth, whatever stands in the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def show(value: Any) -> str:
    """A value from a file as it may stand in a one-line message."""
    return _SHORT.repr(value)
