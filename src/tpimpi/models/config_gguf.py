"""Read a ModelConfig from a GGUF file's metadata.

Meaning and defaults of its keys are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures import GGUF_ARCHITECTURES, Architecture
from tpimpi.models.config import ROPE_THETA, ModelConfig, RopeScaling, checked
from tpimpi.models.keys import MAX_LAYERS, Keys, even_split, is_off, is_positive, show, words

# Below "<arch>."; what is not here must be zero or false.
_GGUF_KEYS = words(
    """
    block_count context_length embedding_length feed_forward_length vocab_size expert_count
    attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length attention.sliding_window attention.causal
    rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length rope.scale_linear tensor_data_layout expert_used_count
    """
)
# Of these a file may hold one number, or one for each layer.
_SIZES_OF_LAYERS = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")


def config_from_gguf(
    metadata: Mapping[str, Any],
    path: Path | str,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """The config of a GGUF file from its metadata (key -> number, string, list of numbers, else an array that nobody read).

    `shapes` holds the file's tensors by their GGUF names, as [out, in]: which biases there are, and whether the head
    has a tensor of its own, is known from them alone. `rope_factors` is the `rope_freqs.weight` tensor.
    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{path}: general.architecture is {show(arch)}, which tpimpi does not compute; "
            f"it computes {', '.join(GGUF_ARCHITECTURES)}"
        )
    family = GGUF_ARCHITECTURES[arch]
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{path}: general.type is {show(metadata['general.type'])}; a file of type 'model' is needed")
    metadata = _with_sizes_of_layers(metadata, arch, path)
    _refuse_unknown_gguf_keys(metadata, arch, path)
    keys = Keys(metadata, path, f"{arch}.")

    layers = keys.integer("block_count", high=MAX_LAYERS)
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    head_dim = _gguf_head_dim(keys, hidden, heads)
    context = keys.integer("context_length")
    embedding = shapes.get("token_embd.weight", ())
    return checked(
        ModelConfig(
            architecture=family.name,
            hidden=hidden,
            intermediate=keys.integer("feed_forward_length"),
            layers=layers,
            heads=heads,
            kv_heads=keys.integer("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            vocab=keys.integer("vocab_size", default=embedding[0] if embedding else None),
            context=context,
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("rope.freq_base", default=ROPE_THETA),
            rope_scaling=_gguf_rope_scaling(metadata, arch, rope_factors, head_dim, path),
            attention_windows=(_gguf_window(keys, family, context),) * layers,
            tied_head="output.weight" not in shapes,
            # A Qwen2 without its biases, or a Qwen3 without its norms, is a broken file and no other model.
            qkv_bias=family.always_qkv_bias or any(f"blk.0.attn_{part}.bias" in shapes for part in "qkv"),
            o_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias=any(f"blk.0.ffn_{part}.bias" in shapes for part in ("gate", "up", "down")),
            qk_norm=family.qk_norm,
        ),
        path,
    )


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
    """The size of a head, which must be the same for keys, for values, and for the rotary positions."""
    key_length = f"{keys.prefix}attention.key_length"
    if key_length in keys.values:
        head_dim = keys.integer("attention.key_length")
    else:
        sizes = (f"{keys.prefix}embedding_length", f"{keys.prefix}attention.head_count", key_length)
        head_dim = even_split(hidden, heads, keys.path, sizes)
    for name in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(name, default=head_dim) != head_dim:
            key = keys.prefix + name
            raise ModelError(
                f"{keys.path}: {key} is {show(keys.values[key])} and the heads' size is {head_dim}; "
                f"tpimpi computes only models where they are the same"
            )
    return head_dim


def _refuse_unknown_gguf_keys(metadata: Mapping[str, Any], arch: str, path: Path | str) -> None:
    prefix = f"{arch}."
    experts = metadata.get(f"{arch}.expert_count", 0)
    if experts != 0:
        raise ModelError(
            f"{path}: {arch}.expert_count is {show(experts)}: a mixture of experts, which tpimpi does not compute; "
            f"a dense model is needed"
        )
    # The one key that changes the mathematics when it is false.
    causal = metadata.get(f"{arch}.attention.causal", True)
    if causal is not True:
        raise ModelError(f"{path}: {arch}.attention.causal is {show(causal)}; tpimpi computes only true")
    for key, value in metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in _GGUF_KEYS and not (is_off(value) or value == 0):
            raise ModelError(
                f"{path}: key {show(key)} is {show(value)}, which tpimpi does not know and which may change the "
                f"mathematics; the model cannot be run"
            )


def _gguf_window(keys: Keys, family: Architecture, context: int) -> int:
    key = "attention.sliding_window"
    value = keys.values.get(keys.prefix + key)
    if value is None or value == 0:
        return 0
    window = keys.integer(key)
    if window >= context:
        return 0
    if not family.gguf_has_windows:
        raise ModelError(
            f"{keys.path}: {keys.prefix}{key} is {window}, and GGUF does not say in which layers; "
            f"give --model the Hugging Face directory of this model"
        )
    return window


def _gguf_rope_scaling(
    metadata: Mapping[str, Any], arch: str, rope_factors: Sequence[float] | None, head_dim: int, path: Path | str
) -> RopeScaling | None:
    key = f"{arch}.rope.scaling"
    kind = metadata.get(f"{key}.type")
    if kind not in (None, "none", "linear"):
        raise ModelError(f"{path}: {key}.type is {show(kind)}, which tpimpi does not compute; it computes none, linear")
    # rope.scale_linear is its name in files of 2023; to llama.cpp 0 is "not scaled", and no type is linear.
    factor = metadata.get(f"{key}.factor", metadata.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" or (not isinstance(factor, bool) and factor == 0):
        factor = 1.0
    if not is_positive(factor):
        raise ModelError(f"{path}: {key}.factor is {show(factor)}; a positive number is needed")
    if rope_factors is not None:
        if len(rope_factors) != head_dim // 2:
            raise ModelError(
                f"{path}: tensor rope_freqs.weight has {len(rope_factors)} numbers; "
                f"{head_dim // 2} (half the head size of {head_dim}) are needed"
            )
        for value in rope_factors:
            if not is_positive(value):
                raise ModelError(f"{path}: tensor rope_freqs.weight holds {value}; positive numbers are needed")
        return RopeScaling("factors", factors=tuple(float(value) * float(factor) for value in rope_factors))
    return RopeScaling("linear", factor=float(factor)) if factor != 1 else None
