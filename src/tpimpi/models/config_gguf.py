"""Read a ModelConfig from a GGUF file's metadata.

Meaning and defaults of its keys are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures import Architecture
from tpimpi.models.architectures.base import GGUF_WINDOW, gguf_same_window, gguf_window
from tpimpi.models.architectures.of_gguf import GGUF_ARCHITECTURES, gguf_family
from tpimpi.models.config import ROPE_THETA, ModelConfig, checked
from tpimpi.models.keys import MAX_LAYERS, Keys, even_split, is_off, show, words
from tpimpi.models.rope_gguf import GgufRope

# Below "<arch>."; what is not here must be zero or false.
_GGUF_KEYS = words(
    """
    block_count context_length embedding_length feed_forward_length vocab_size expert_count
    attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length attention.sliding_window attention.causal
    rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length rope.scaling.attn_factor rope.scaling.yarn_log_multiplier
    rope.scaling.yarn_attn_factor
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scale_linear tensor_data_layout expert_used_count
    """
)
_QKV = ("q", "k", "v", "qkv")  # by which names files have these matrices, one by one or as one
# Of these a file may hold one number, or one for each layer.
_SIZES_OF_LAYERS = (
    *("feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("expert_used_count", "expert_feed_forward_length"),
)


def config_from_gguf(
    metadata: Mapping[str, Any],
    path: Path | str,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, Sequence[float]] = MappingProxyType({}),
) -> ModelConfig:
    """The config of a GGUF file from its metadata (key -> number, string, list of numbers, else an array that nobody read).

    `shapes` holds the file's tensors by their GGUF names, as [out, in]: which biases there are, and whether the head
    has a tensor of its own, is known from them alone. `rope_factors` has the tensors `rope_freqs.weight`
    ("factors"), `rope_factors_short.weight` ("short") and `rope_factors_long.weight` ("long") that there are.
    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{path}: general.architecture is {show(arch)}, which tpimpi does not compute; "
            f"it computes {', '.join(GGUF_ARCHITECTURES)}"
        )
    family = gguf_family(arch, mixture=metadata.get(f"{arch}.expert_count", 0) != 0)
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{path}: general.type is {show(metadata['general.type'])}; a file of type 'model' is needed")
    metadata = _with_sizes_of_layers(metadata, arch, path)
    _refuse_unknown_gguf_keys(metadata, family, path)
    keys = Keys(metadata, path, f"{arch}.")

    layers = _gguf_layers(keys, family)
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = _gguf_head_dim(keys, hidden, heads)
    context = keys.integer("context_length")
    embedding = shapes.get("token_embd.weight", ())
    rotary = _gguf_rotary_dims(keys, family, head_dim)
    rope = GgufRope(keys, context, rotary, truncate=family.gguf_yarn_truncate)
    fields: dict[str, Any] = {
        "architecture": family.name,
        "hidden": hidden,
        "intermediate": keys.integer("feed_forward_length"),
        "layers": layers,
        "heads": heads,
        "kv_heads": keys.integer("attention.head_count_kv", default=heads),
        "head_dim": head_dim,
        "vocab": keys.integer("vocab_size", default=embedding[0] if embedding else None),
        "context": context,
        "norm_eps": keys.number(family.gguf_norm_eps_key),
        "rope_theta": keys.number("rope.freq_base", default=ROPE_THETA),
        "rope_scaling": rope.scaling(rope_factors),
        "attention_windows": _gguf_windows(keys, family, context, layers),
        "tied_head": "output.weight" not in shapes,
        # A Qwen2 without its biases, or a Qwen3 without its norms, is a broken file and no other model.
        "qkv_bias": family.always_qkv_bias or any(f"blk.0.attn_{part}.bias" in shapes for part in _QKV),
        "o_bias": "blk.0.attn_output.bias" in shapes,
        "mlp_bias": any(f"blk.0.ffn_{part}.bias" in shapes for part in ("gate", "up", "down")),
        "qk_norm": "blk.0.attn_q_norm.weight" in shapes if family.optional_qk_norm else family.qk_norm,
        "rotary_dims": rotary if rotary != head_dim else 0,
    }
    return checked(ModelConfig(**{**fields, **family.gguf_fields(keys, layers)}), path)


def _gguf_layers(keys: Keys, family: Architecture) -> int:
    """The layers of the model: block_count less those behind them, which predict further tokens."""
    layers = keys.integer("block_count", high=MAX_LAYERS)
    key = family.gguf_mtp_key
    more = keys.values.get(keys.prefix + key, 0) if key else 0
    if is_off(more) or more == 0:
        return layers
    more = keys.integer(key, high=MAX_LAYERS)
    if more >= layers:
        raise ModelError(
            f"{keys.path}: {keys.prefix}{key} is {more}, and block_count, which counts them, {layers}; it must be less"
        )
    return layers - more


def _with_sizes_of_layers(metadata: Mapping[str, Any], arch: str, path: Path | str) -> dict[str, Any]:
    """The metadata with one number for each size that a file may give layer by layer, where all layers have the same."""
    values = dict(metadata)
    layers = values.get(f"{arch}.block_count")
    for name in _SIZES_OF_LAYERS:
        sizes = values.get(f"{arch}.{name}")
        if not isinstance(sizes, list):
            continue
        if len(sizes) != layers:
            raise ModelError(
                f"{path}: {arch}.{name} has {len(sizes)} numbers; one for each layer is needed, {show(layers)} (block_count)"
            )
        if any(size != sizes[0] for size in sizes):
            raise ModelError(
                f"{path}: {arch}.{name} is {show(sizes)}; tpimpi computes only models whose layers are all of one size"
            )
        values[f"{arch}.{name}"] = sizes[0]
    return values


def _gguf_head_dim(keys: Keys, hidden: int, heads: int) -> int:
    """The size of a head, which must be the same for keys and for values."""
    key_length = f"{keys.prefix}attention.key_length"
    if key_length in keys.values:
        head_dim = keys.integer("attention.key_length")
    else:
        sizes = (f"{keys.prefix}embedding_length", f"{keys.prefix}attention.head_count", key_length)
        head_dim = even_split(hidden, heads, keys.path, sizes)
    if keys.integer("attention.value_length", default=head_dim) != head_dim:
        key = f"{keys.prefix}attention.value_length"
        raise ModelError(
            f"{keys.path}: {key} is {show(keys.values[key])} and the heads' size is {head_dim}; "
            f"tpimpi computes only models where they are the same"
        )
    return head_dim


def _gguf_rotary_dims(keys: Keys, family: Architecture, head_dim: int) -> int:
    """How many elements of a head are rotated."""
    dims = keys.integer("rope.dimension_count", default=head_dim)
    if dims > head_dim or (dims != head_dim and not family.partial_rotary):
        raise ModelError(
            f"{keys.path}: {keys.prefix}rope.dimension_count is {dims} and the heads' size is {head_dim}; "
            f"tpimpi computes only {family.gguf_name} models where they are the same"
        )
    return dims


def _refuse_unknown_gguf_keys(metadata: Mapping[str, Any], family: Architecture, path: Path | str) -> None:
    arch, known = family.gguf_name, _GGUF_KEYS | family.gguf_keys | {family.gguf_mtp_key}
    prefix = f"{arch}."
    experts = metadata.get(f"{arch}.expert_count", 0)
    if experts != 0 and not family.mixture:
        raise ModelError(
            f"{path}: {arch}.expert_count is {show(experts)}: a mixture of experts, which tpimpi does not compute; "
            f"a dense model is needed"
        )
    # The one key that changes the mathematics when it is false.
    causal = metadata.get(f"{arch}.attention.causal", True)
    if causal is not True:
        raise ModelError(f"{path}: {arch}.attention.causal is {show(causal)}; tpimpi computes only true")
    for key, value in metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in known and not (is_off(value) or value == 0):
            raise ModelError(
                f"{path}: key {show(key)} is {show(value)}, which tpimpi does not know and which may change the "
                f"mathematics; the model cannot be run"
            )


def _gguf_windows(keys: Keys, family: Architecture, context: int, layers: int) -> tuple[int, ...]:
    window = gguf_window(keys)
    if window and family.gguf_windows is None and window < context:
        raise ModelError(
            f"{keys.path}: {keys.prefix}{GGUF_WINDOW} is {window}, and GGUF does not say in which layers; "
            f"give --model the Hugging Face directory of this model"
        )
    if family.gguf_windows is None or (family.gguf_windows is gguf_same_window and window >= context):
        return (0,) * layers
    return family.gguf_windows(keys, layers)
