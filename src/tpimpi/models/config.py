"""What a model is, as numbers.

`config_hf` and `config_gguf` make a ModelConfig; what they do not know they refuse: a key that tpimpi does not know
could change the mathematics, and an answer that is silently wrong is worse than none. So unknown keys are errors unless
they are switched off (null, false) or known to be harmless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from tpimpi.compute.attention import AttentionSpec
from tpimpi.compute.router import ROUTER_BIASES, SCORINGS, RouterBias, RouterSpec, Scoring
from tpimpi.errors import ModelError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.keys import MAX_LAYERS, MAX_SIZE, Keys, is_positive, show
from tpimpi.models.layer_spec import ACTIVATIONS, NORMS, Activation, LayerSpec, Norm, Rope, RopeScaling

ROPE_THETA = 10000.0  # the base of the rotary angles where a file has none (Su et al. 2021)

ROPE_KINDS = ("linear", "llama3", "factors", "yarn", "longrope")  # of RopeScaling

MAX_EXPERTS = 1024  # of a layer
_MAX_NORM_EPS = 1.0  # with more, rows of usual size are not normed any more
_MAX_ROPE_THETA = 1e30  # well within f32


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer with rotary positions, grouped-query attention and a gated feed-forward block.

    Sizes are numbers of elements; `heads` are of queries; `context` is the published one, in positions; `rope_theta` is the
    base of the rotary angles; `attention_windows` holds for each layer the number of positions a query sees (itself
    included), 0 for all of them. What differs from a Llama has a default, which is a Llama's. See `layer` for one layer.
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

    rotary_dims: int = 0  # elements of a head that are rotated; 0: all
    local_rope_theta: float = 0.0  # of layers that have a window, which then have no scaling; 0: as the others
    unrotated_layers: tuple[int, ...] = ()  # those without positions
    qk_norm_over_all: bool = False  # one norm over all heads together, where qk_norm
    norm: Norm = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    parallel_blocks: bool = False
    activation: Activation = "silu"
    attention_scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    # Of a mixture of experts; `router` says which layers have them.
    experts: int = 0  # in each layer that has any; 0: every layer is dense
    experts_per_token: int = 0
    expert_intermediate: int = 0  # columns of an expert; `intermediate` is of the dense layers
    shared_intermediate: int = 0  # columns of the experts that every position uses, together; 0: none
    dense_layers: tuple[int, ...] = ()  # layers without experts
    router_scoring: Scoring = "softmax"
    router_normalized: bool = False
    router_scale: float = 1.0
    router_bias: RouterBias = "none"
    expert_bias: bool = False  # of gate, up and down
    activation_limit: float = 0.0  # of a clamped activation
    attention_sinks: bool = False  # a logit for each head, beside those of the positions

    # Of random weights: experts are as a trace says, whatever the router gives, which repeats after so many positions;
    # and the part of them that is predicted rightly.
    trace_positions: int = 0
    trace_predicted: float = 0.0

    def layer(self, index: int) -> LayerSpec:
        """What this layer is."""
        window, rope = self.attention_windows[index], None
        if index not in self.unrotated_layers:
            local = bool(window and self.local_rope_theta)
            rope = Rope(
                theta=self.local_rope_theta if local else self.rope_theta,
                dims=self.rotary_dims or self.head_dim,
                scaling=None if local else self.rope_scaling,
            )
        return LayerSpec(
            attention=AttentionSpec(
                scale=self.attention_scale or self.head_dim**-0.5, softcap=self.attention_softcap, window=window
            ),
            rope=rope,
            qk_norm=("all" if self.qk_norm_over_all else "head") if self.qk_norm else "none",
            norm=self.norm,
            pre_norms=self.pre_norms,
            post_norms=self.post_norms,
            activation=self.activation,
            activation_limit=self.activation_limit,
            router=self.router(index),
            residual_scale=self.residual_scale,
            parallel=self.parallel_blocks,
        )

    def router(self, layer: int) -> RouterSpec | None:
        """How this layer's experts are chosen; None where it is dense."""
        if not self.experts or layer in self.dense_layers:
            return None
        return RouterSpec(
            experts=self.experts,
            top_k=self.experts_per_token,
            scoring=self.router_scoring,
            normalized=self.router_normalized,
            scale=self.router_scale,
            bias=self.router_bias,
        )

    @property
    def router_logits_bias(self) -> bool:
        """Whether the router's bias is added to its logits."""
        return self.router_bias == "logits"

    def mlp_columns(self, layer: int) -> int:
        """Columns of what every position goes through in the feed-forward block of this layer; 0: experts alone."""
        return self.intermediate if self.router(layer) is None else self.shared_intermediate

    def with_layers(self, layers: int) -> ModelConfig:
        """The same model with so many layers, all like the first; those of a mixture have experts."""
        unrotated = tuple(range(layers)) if 0 in self.unrotated_layers else ()
        return replace(
            self,
            layers=layers,
            attention_windows=self.attention_windows[:1] * layers,
            unrotated_layers=unrotated,
            dense_layers=(),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, without what is as in a Llama; `from_dict` undoes it."""
        values = _without_defaults(self)
        if self.rope_scaling is not None:
            values["rope_scaling"] = _without_defaults(self.rope_scaling, keep=_FIRST_SCALING_FIELDS)
        return values

    @classmethod
    def from_dict(cls, values: Any, where: str = "config") -> ModelConfig:
        """Rebuild a config written by `to_dict`, whoever may have changed it since.

        Raises ModelError, which begins with `where`, for a field that is unknown, missing, or of no possible value.
        """
        return config_from_dict(values, where)


# Fields of RopeScaling that were there from the beginning, and are always written.
_FIRST_SCALING_FIELDS = ("factor", "low_freq_factor", "high_freq_factor", "original_context", "factors")


def _without_defaults(of: ModelConfig | RopeScaling, keep: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass by name, but those that have a default and are as it says."""
    return {
        field.name: getattr(of, field.name)
        for field in fields(of)
        if field.default is MISSING or field.name in keep or getattr(of, field.name) != field.default
    }


def config_from_dict(values: Any, where: str) -> ModelConfig:
    """See ModelConfig.from_dict."""
    values = _whole(values, ModelConfig, where)
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
    found: dict[str, Any] = {
        "attention_windows": tuple(windows),
        "unrotated_layers": _layers_below(keys, "unrotated_layers", layers),
    }
    for name in ("hidden", "intermediate", "heads", "kv_heads", "vocab", "context"):
        found[name] = keys.integer(name)
    for name in ("norm_eps", "rope_theta", "embedding_scale", "residual_scale", "logit_scale"):
        found[name] = keys.number(name)
    for name in ("local_rope_theta", "attention_scale", "attention_softcap", "logit_softcap"):
        found[name] = _number_or_0(keys, name)
    for name in (
        *("tied_head", "qkv_bias", "o_bias", "mlp_bias", "qk_norm", "qk_norm_over_all"),
        *("pre_norms", "post_norms", "parallel_blocks"),
    ):
        found[name] = keys.flag(name)
    found |= _experts_from_dict(keys, layers)
    rotary = 0 if _is_0(values["rotary_dims"]) else keys.integer("rotary_dims", high=head_dim)
    return checked(
        ModelConfig(
            architecture=architecture,
            layers=layers,
            head_dim=head_dim,
            rotary_dims=rotary,
            rope_scaling=_rope_scaling_from_dict(values["rope_scaling"], rotary or head_dim, where),
            norm=keys.choice("norm", NORMS),
            activation=keys.choice("activation", ACTIVATIONS),
            **found,
        ),
        where,
    )


def _experts_from_dict(keys: Keys, layers: int) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    found: dict[str, Any] = {"dense_layers": _layers_below(keys, "dense_layers", layers)}
    for name in ("experts", "experts_per_token", "expert_intermediate", "shared_intermediate"):
        found[name] = 0 if _is_0(keys.values[name]) else keys.integer(name)
    for name in ("router_normalized", "expert_bias", "attention_sinks"):
        found[name] = keys.flag(name)
    found["trace_positions"] = 0 if _is_0(keys.values["trace_positions"]) else keys.integer("trace_positions")
    found["trace_predicted"] = _number_or_0(keys, "trace_predicted")
    found["router_scale"] = keys.number("router_scale")
    found["activation_limit"] = _number_or_0(keys, "activation_limit")
    found["router_scoring"] = keys.choice("router_scoring", SCORINGS)
    found["router_bias"] = keys.choice("router_bias", ROUTER_BIASES)
    return found


def _layers_below(keys: Keys, name: str, layers: int) -> tuple[int, ...]:
    """A list of some of so many layers."""
    value = keys.values[name]
    if not isinstance(value, list | tuple) or not all(_is_window(layer) and layer < layers for layer in value):
        raise ModelError(f"{keys.path}: {name} is {show(value)}; layers below {layers} are needed")
    return tuple(value)


def _number_or_0(keys: Keys, name: str) -> float:
    """A positive number, or the 0 that says that there is none."""
    return 0.0 if _is_0(keys.values[name]) else keys.number(name)


def _is_0(value: Any) -> bool:
    return type(value) in (int, float) and value == 0


def _rope_scaling_from_dict(values: Any, dims: int, where: str) -> RopeScaling | None:
    """`dims`: elements of a head that are rotated."""
    if values is None:
        return None
    values = _whole(values, RopeScaling, f"{where}: rope_scaling", needed=("kind", *_FIRST_SCALING_FIELDS))
    kind, keys = values["kind"], Keys(values, f"{where}: rope_scaling")
    if kind not in ROPE_KINDS:
        raise ModelError(f"{where}: rope_scaling.kind is {show(kind)}; {', '.join(ROPE_KINDS)} are known")
    factors = _factors(values, "factors", dims // 2 if kind in ("factors", "longrope") else 0, where)
    long_factors = _factors(values, "long_factors", dims // 2 if kind == "longrope" else 0, where)
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if kind == "llama3" and not low < high:
        raise ModelError(
            f"{where}: low_freq_factor is {low:g} and high_freq_factor is {high:g}; the first must be less"
        )
    original = values["original_context"]
    if kind in ("llama3", "yarn", "longrope") or not (type(original) is int and original == 0):
        original = keys.integer("original_context")
    return RopeScaling(
        kind=kind,
        factor=keys.number("factor"),
        low_freq_factor=low,
        high_freq_factor=high,
        original_context=original,
        factors=factors,
        long_factors=long_factors,
        attention_factor=keys.number("attention_factor"),
        beta_fast=keys.number("beta_fast"),
        beta_slow=keys.number("beta_slow"),
        truncate=keys.flag("truncate"),
        query_growth=_number_or_0(keys, "query_growth"),
    )


def _factors(values: Mapping[str, Any], name: str, count: int, where: str) -> tuple[float, ...]:
    factors = values[name]
    if not isinstance(factors, list | tuple) or len(factors) != count or not all(map(is_positive, factors)):
        raise ModelError(f"{where}: rope_scaling.{name} is {show(factors)}; {count} positive numbers are needed")
    return tuple(float(value) for value in factors)


def _whole(
    values: Any, kind: type[ModelConfig | RopeScaling], where: str, needed: Sequence[str] = ()
) -> dict[str, Any]:
    """These fields of a dataclass with what has a default and is not there; `needed` must be there all the same."""
    if not isinstance(values, dict):
        raise ModelError(f"{where}: is {show(values)}; an object is needed")
    defaults = {field.name: field.default for field in fields(kind)}
    unknown = sorted(set(values) - set(defaults), key=str)
    if unknown:
        raise ModelError(f"{where}: {show(unknown[0])} is unknown")
    for name, default in sorted(defaults.items()):
        if name not in values and (default is MISSING or name in needed):
            raise ModelError(f"{where}: {show(name)} is missing")
    return {**{name: value for name, value in defaults.items() if name not in values}, **values}


def _is_window(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def checked(config: ModelConfig, path: Path | str) -> ModelConfig:
    """Returns `config` where what must hold between its sizes does; ModelError, which begins with `path`, where not."""
    if config.heads % config.kv_heads:
        raise ModelError(
            f"{path}: {config.heads} query heads and {config.kv_heads} key/value heads; "
            f"the first must be a multiple of the second"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: the head size is {config.head_dim}; rotary positions need an even one")
    family = ARCHITECTURES[config.architecture]
    layer = family.layer_tensors
    parts = {tensor.part for tensor in layer}
    flags = {
        "qk_norm": config.qk_norm if family.optional_qk_norm else family.qk_norm,
        "qk_norm_over_all": any(tensor.part == "q_norm" and tensor.shape == ("queries",) for tensor in layer),
        "pre_norms": "attn_norm" in parts,
        "post_norms": "attn_post_norm" in parts,
        "parallel_blocks": "attn_norm" in parts and "mlp_norm" not in parts,
    }
    for name, needed in flags.items():
        if getattr(config, name) != needed:
            raise ModelError(f"{path}: {name} is {getattr(config, name)}; a {config.architecture} model needs {needed}")
    _check_experts(config, path)
    if config.rotary_dims % 2:
        raise ModelError(f"{path}: {config.rotary_dims} elements of a head are rotated; an even number is needed")
    if config.norm_eps > _MAX_NORM_EPS:
        raise ModelError(f"{path}: the norms' epsilon is {config.norm_eps:g}; at most {_MAX_NORM_EPS:g} makes sense")
    if config.rope_theta > _MAX_ROPE_THETA:
        raise ModelError(f"{path}: rope_theta is {config.rope_theta:g}; at most {_MAX_ROPE_THETA:g} makes sense")
    return config


def _check_experts(config: ModelConfig, path: Path | str) -> None:
    """What must hold between the numbers of a mixture."""
    mixture = ARCHITECTURES[config.architecture].mixture
    if mixture != bool(config.experts):
        needed = "at least one" if mixture else "none"
        raise ModelError(f"{path}: {config.experts} experts; a {config.architecture} model needs {needed}")
    if not mixture:
        return
    if not 1 <= config.experts_per_token <= config.experts:
        raise ModelError(
            f"{path}: a position uses {config.experts_per_token} experts of {config.experts}; 1 to {config.experts} are "
            f"needed"
        )
    if not config.expert_intermediate:
        raise ModelError(f"{path}: the experts have 0 columns; at least 1 is needed")
    if config.experts > MAX_EXPERTS:
        raise ModelError(f"{path}: {config.experts} experts; at most {MAX_EXPERTS} are computed")
