"""What a model family is: its names, its tensors, and how its config.json and its GGUF metadata are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tpimpi.errors import ModelError
from tpimpi.models.keys import Keys, show

# A size of a tensor, as a number of the config: "queries" is heads * head_dim, "keys" is kv_heads * head_dim.
# "mlp" is intermediate in a dense layer, shared_intermediate in one with experts; "expert" an expert's columns.
Dimension = Literal["hidden", "mlp", "expert", "experts", "queries", "keys", "heads", "head_dim", "vocab"]
# The field of ModelConfig that says whether a matrix has a bias.
BiasFlag = Literal["qkv_bias", "o_bias", "mlp_bias", "expert_bias", "router_logits_bias"]
# Which layers have a tensor: all; those without experts, those with, or those whose experts include shared ones.
Layers = Literal["all", "dense", "experts", "shared"]
# Keys and the number of layers -> attention_windows.
Windows = Callable[[Keys, int], tuple[int, ...]]
# Keys and the number of layers -> fields of ModelConfig that are not a Llama's.
Fields = Callable[[Keys, int], dict[str, Any]]


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a layer, or of the model beside its layers.

    `part` is its name in tiles and slices. `hf` and `gguf` are its names in Hugging Face and GGUF files, without
    "model.layers.N." or "blk.N." before and ".weight" or ".bias" behind. `shape` is [out, in] of a matrix, [out] of a norm.
    Of an expert's, `{expert}` stands for its number; where a file has all experts' as one, FusedSpec says so.
    """

    part: str
    hf: str
    gguf: str
    shape: tuple[Dimension, ...]
    bias: BiasFlag | None = None  # None: never one
    layers: Layers = "all"
    bare_name: bool = False  # its names stand as they are, with nothing behind

    @property
    def per_expert(self) -> bool:
        """Whether each expert has one."""
        return "{expert}" in self.hf


@dataclass(frozen=True)
class FusedSpec:
    """A matrix in a file that is several of a layer's: the rows of the first of `parts`, then those of the next; and its
    bias, where they have one.

    `hf` or `gguf` is None where that kind of file has them one by one; either kind may have them so all the same. Of
    experts it is a stack [experts, rows, columns], or `transposed`, where a Hugging Face file has numbers and no blocks,
    [experts, columns, rows]. `interleaved`: the parts' rows take turns. `bare_name`: nothing behind it, of a bias "_bias".
    """

    hf: str | None
    gguf: str | None
    parts: tuple[str, ...]
    interleaved: bool = False
    transposed: bool = False
    bare_name: bool = False

    def name_of(self, stored: str, kind: str) -> str:
        """The name in a file of the matrix, or its bias, that is called `stored` there; `kind` is weight or bias."""
        if self.bare_name:
            return stored if kind == "weight" else f"{stored}_bias"
        return f"{stored}.{kind}"


EMBEDDING = TensorSpec("embedding", "embed_tokens", "token_embd", ("vocab", "hidden"))
OUTPUT_NORM = TensorSpec("norm", "norm", "output_norm", ("hidden",))
HEAD = TensorSpec("head", "lm_head", "output", ("vocab", "hidden"))  # not there where the head is the embedding table

ATTENTION_NORM = TensorSpec("attn_norm", "input_layernorm", "attn_norm", ("hidden",))
ATTENTION = (
    TensorSpec("q", "self_attn.q_proj", "attn_q", ("queries", "hidden"), "qkv_bias"),
    TensorSpec("k", "self_attn.k_proj", "attn_k", ("keys", "hidden"), "qkv_bias"),
    TensorSpec("v", "self_attn.v_proj", "attn_v", ("keys", "hidden"), "qkv_bias"),
    TensorSpec("o", "self_attn.o_proj", "attn_output", ("hidden", "queries"), "o_bias"),
)
QK_NORM = (
    TensorSpec("q_norm", "self_attn.q_norm", "attn_q_norm", ("head_dim",)),
    TensorSpec("k_norm", "self_attn.k_norm", "attn_k_norm", ("head_dim",)),
)
MLP_NORM = TensorSpec("mlp_norm", "post_attention_layernorm", "ffn_norm", ("hidden",))
MLP = (
    TensorSpec("gate", "mlp.gate_proj", "ffn_gate", ("mlp", "hidden"), "mlp_bias"),
    TensorSpec("up", "mlp.up_proj", "ffn_up", ("mlp", "hidden"), "mlp_bias"),
    TensorSpec("down", "mlp.down_proj", "ffn_down", ("hidden", "mlp"), "mlp_bias"),
)
EXPERT_PARTS = ("expert_gate", "expert_up", "expert_down")
FUSED_GATE_UP = FusedSpec("mlp.gate_up_proj", "ffn_up", ("gate", "up"))


def no_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """Every layer sees all positions, whatever the file holds."""
    return (0,) * layers


def no_fields(keys: Keys, layers: int) -> dict[str, Any]:
    """As a Llama."""
    return {}


@dataclass(frozen=True)
class Architecture:
    """A family of models. One more is one more module like llama.py, and its line in the registry (`ARCHITECTURES`)."""

    name: str  # ModelConfig.architecture; model_type in config.json
    hf_class: str  # in config.json's `architectures`
    gguf_name: str  # general.architecture in GGUF
    layer_tensors: tuple[
        TensorSpec, ...
    ]  # every tensor of a layer, in the order in which messages and files of ours have them
    fused: tuple[FusedSpec, ...] = ()
    partial_rotary: bool = False  # a part of each head may be rotated
    optional_qk_norm: bool = False  # some of its models have the norms of queries and keys
    always_qkv_bias: bool = (
        False  # whatever the files say; else config.json's attention_bias, or what a GGUF file holds
    )

    # config.json: the keys beside those that all families have, and what transformers takes where one is missing and that is
    # not what it takes for a Llama.
    hf_keys: frozenset[str] = frozenset()
    hf_defaults: Mapping[str, Any] = field(default_factory=dict)
    hf_activation_key: str = "hidden_act"
    hf_norm_eps_key: str = "rms_norm_eps"
    hf_intermediate_key: str = "intermediate_size"
    hf_o_bias: bool = True  # attention_bias is also of the output projection
    hf_rope_names: Mapping[str, str] = field(default_factory=dict)  # other names of rope types
    hf_query_growth: bool = False  # llama_4_scaling_beta is understood
    hf_rope_by_layer: bool = False  # a rope for full attention, and another one, unscaled, for layers with a window
    hf_windows: Windows = no_windows
    hf_fields: Fields = no_fields
    hf_norm_offset: float = 0.0  # what a norm's weight is in the file, plus this, is what is multiplied
    hf_interleaves_qk: bool = False
    hf_default_rope: Mapping[str, Any] = field(default_factory=dict)  # rope parameters where a file has none
    hf_quantization: str = ""  # the quant_method whose tensors are read
    # Keys that say how many layers behind the model's own predict further tokens, and their number where there is none.
    hf_mtp_keys: tuple[str, ...] = ()
    hf_mtp_layers: int = 0

    # GGUF: the keys beside those that all families have, without "<arch>."; whether rows of Q and K are interleaved within
    # each head; and which layers have a window.
    gguf_keys: frozenset[str] = frozenset()
    gguf_norm_eps_key: str = "attention.layer_norm_rms_epsilon"
    gguf_interleaves_qk: bool = False
    gguf_windows: Windows | None = None  # None: none can be said
    gguf_fields: Fields = no_fields
    gguf_yarn_truncate: bool = True  # between whole elements, as llama.cpp always does
    gguf_mtp_key: str = ""  # how many layers of block_count are behind the model's own

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed."""
        return any(tensor.part == "q_norm" for tensor in self.layer_tensors)

    @property
    def mixture(self) -> bool:
        """Whether it has experts."""
        return any(tensor.part == "router" for tensor in self.layer_tensors)


# Windows of config.json


def hf_layer_types(keys: Keys, layers: int) -> list[str] | None:
    """layer_types, None where there is none. Raises ModelError where it is no list of the two kinds that are computed."""
    types = keys.values.get("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != layers:
        found = f"{len(types)} entries" if isinstance(types, list) else show(types)
        raise ModelError(f"{keys.path}: layer_types has {found}; a list of {layers} (num_hidden_layers) is needed")
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{keys.path}: layer_types[{layer}] is {show(kind)}, which tpimpi does not compute; "
                f"'full_attention' or 'sliding_attention' is needed"
            )
    return types


def hf_window(keys: Keys, default: int | None) -> int:
    """sliding_window in positions; 0 where it is null."""
    if keys.values.get("sliding_window", default) is None:
        return 0
    return keys.integer("sliding_window", default=default)


def hf_windows_of_types(default_window: int | None, default_period: int, period_key: str | None = None) -> Windows:
    """A rule: layer_types says which layers have the window; without it all have but every `default_period`th.

    `period_key` is the key that older files have for the period.
    """

    def windows(keys: Keys, layers: int) -> tuple[int, ...]:
        window, types = hf_window(keys, default_window), hf_layer_types(keys, layers)
        if types is None:
            period = default_period if period_key is None else keys.integer(period_key, default=default_period)
            types = ["sliding_attention" if (layer + 1) % period else "full_attention" for layer in range(layers)]
        for layer, kind in enumerate(types):
            if kind == "sliding_attention" and not window:
                raise ModelError(
                    f"{keys.path}: layer_types[{layer}] is 'sliding_attention', but there is no window (sliding_window is "
                    f"{show(keys.values.get('sliding_window'))}); a window, or 'full_attention', is needed"
                )
        return tuple(window if kind == "sliding_attention" else 0 for kind in types)

    return windows


# Windows of GGUF

GGUF_WINDOW, GGUF_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


def gguf_window(keys: Keys, default: int = 0) -> int:
    """The window in positions, 0 where there is none."""
    value = keys.values.get(keys.prefix + GGUF_WINDOW, default)
    return 0 if value is None or (type(value) is int and value == 0) else keys.integer(GGUF_WINDOW, default=default)


def gguf_same_window(keys: Keys, layers: int) -> tuple[int, ...]:
    """A rule: every layer has the window."""
    return (gguf_window(keys),) * layers


def gguf_periodic_windows(period: int, default_window: int = 0) -> Windows:
    """A rule: a flag for each layer says which have the window, or all have but every so manieth, by default `period`th."""

    def windows(keys: Keys, layers: int) -> tuple[int, ...]:
        window, pattern = gguf_window(keys, default_window), keys.values.get(keys.prefix + GGUF_PATTERN)
        if isinstance(pattern, list):
            if len(pattern) != layers or any(type(flag) is not bool for flag in pattern):
                raise ModelError(
                    f"{keys.path}: {keys.prefix}{GGUF_PATTERN} is {show(pattern)}; true or false for each of {layers} "
                    f"layers, or one number, is needed"
                )
            return tuple(window if flag else 0 for flag in pattern)
        every = period if pattern is None else keys.integer(GGUF_PATTERN)
        return tuple(window if (layer + 1) % every else 0 for layer in range(layers))

    return windows
