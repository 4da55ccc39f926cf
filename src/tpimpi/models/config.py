"""What a model is, as numbers.

`config_hf` and `config_gguf` make a ModelConfig; what they do not know they refuse: a key that tpimpi does not know
could change the mathematics, and an answer that is silently wrong is worse than none. So unknown keys are errors unless
they are switched off (null, false) or known to be harmless.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.keys import MAX_LAYERS, MAX_SIZE, Keys, is_positive, show

ROPE_THETA = 10000.0  # the base of the rotary angles where a file has none (Su et al. 2021)

_MAX_NORM_EPS = 1.0  # with more, rows of usual size are not normed any more
_MAX_ROPE_THETA = 1e30  # well within f32


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

    architecture: str  # one of ARCHITECTURES
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
    def from_dict(cls, values: Any, where: str = "config") -> ModelConfig:
        """Rebuild a config written by `to_dict`, whoever may have changed it since.

        Raises ModelError, which begins with `where`, for a field that is unknown, missing, or of no possible value.
        """
        _same_fields(values, cls, where)
        keys = Keys(values, where)
        architecture = values["architecture"]
        if architecture not in ARCHITECTURES:
            raise ModelError(f"{where}: architecture is {show(architecture)}; {', '.join(ARCHITECTURES)} are known")
        layers, head_dim = keys.integer("layers", high=MAX_LAYERS), keys.integer("head_dim")
        windows = values["attention_windows"]
        if not isinstance(windows, list | tuple) or len(windows) != layers or not all(map(_is_window, windows)):
            raise ModelError(
                f"{where}: attention_windows is {show(windows)}; {layers} whole numbers of 0 or more are needed"
            )
        return checked(
            cls(
                architecture=architecture,
                hidden=keys.integer("hidden"),
                intermediate=keys.integer("intermediate"),
                layers=layers,
                heads=keys.integer("heads"),
                kv_heads=keys.integer("kv_heads"),
                head_dim=head_dim,
                vocab=keys.integer("vocab"),
                context=keys.integer("context"),
                norm_eps=keys.number("norm_eps"),
                rope_theta=keys.number("rope_theta"),
                rope_scaling=_rope_scaling_from_dict(values["rope_scaling"], head_dim, where),
                attention_windows=tuple(windows),
                tied_head=keys.flag("tied_head"),
                qkv_bias=keys.flag("qkv_bias"),
                o_bias=keys.flag("o_bias"),
                mlp_bias=keys.flag("mlp_bias"),
                qk_norm=keys.flag("qk_norm"),
            ),
            where,
        )


def _rope_scaling_from_dict(values: Any, head_dim: int, where: str) -> RopeScaling | None:
    if values is None:
        return None
    _same_fields(values, RopeScaling, f"{where}: rope_scaling")
    kind, factors, keys = values["kind"], values["factors"], Keys(values, f"{where}: rope_scaling")
    if kind not in ("linear", "llama3", "factors"):
        raise ModelError(f"{where}: rope_scaling.kind is {show(kind)}; linear, llama3 and factors are known")
    wanted = head_dim // 2 if kind == "factors" else 0
    if not isinstance(factors, list | tuple) or len(factors) != wanted or not all(map(is_positive, factors)):
        raise ModelError(f"{where}: rope_scaling.factors is {show(factors)}; {wanted} positive numbers are needed")
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if kind == "llama3" and not low < high:
        raise ModelError(
            f"{where}: low_freq_factor is {low:g} and high_freq_factor is {high:g}; the first must be less"
        )
    original = values["original_context"]
    if kind == "llama3" or not (type(original) is int and original == 0):
        original = keys.integer("original_context")
    return RopeScaling(kind, keys.number("factor"), low, high, original, tuple(float(value) for value in factors))


def _same_fields(values: Any, kind: type[ModelConfig | RopeScaling], where: str) -> None:
    if not isinstance(values, dict):
        raise ModelError(f"{where}: is {show(values)}; an object is needed")
    wrong = sorted(set(values) ^ {field.name for field in fields(kind)})
    if wrong:
        raise ModelError(f"{where}: {show(wrong[0])} is {'unknown' if wrong[0] in values else 'missing'}")


def _is_window(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def checked(config: ModelConfig, path: Path | str) -> ModelConfig:
    """What must hold between the sizes, whatever file they came from."""
    if config.heads % config.kv_heads:
        raise ModelError(
            f"{path}: {config.heads} query heads and {config.kv_heads} key/value heads; "
            f"the first must be a multiple of the second"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: the head size is {config.head_dim}; rotary positions need an even one")
    if config.norm_eps > _MAX_NORM_EPS:
        raise ModelError(f"{path}: the norms' epsilon is {config.norm_eps:g}; at most {_MAX_NORM_EPS:g} makes sense")
    if config.rope_theta > _MAX_ROPE_THETA:
        raise ModelError(f"{path}: rope_theta is {config.rope_theta:g}; at most {_MAX_ROPE_THETA:g} makes sense")
    return config
