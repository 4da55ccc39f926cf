"""What a model is, as numbers: read from a config.json or from GGUF metadata; what is not known is refused.

A config key that tpimpi does not know could change the mathematics, and an answer that is silently wrong is worse
than none; so unknown keys are errors unless they are switched off (null, false) or known to be harmless.

Meaning and defaults of config.json's keys are those of transformers' Llama, Mistral, Qwen2 and Qwen3 models; those of
GGUF metadata are llama.cpp's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError


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


HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What transformers takes where config.json has no such key.
_HF_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # llama: as many as query heads
_HF_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_HF_MISTRAL_WINDOW = 4096
_HF_QWEN_WINDOW = 4096
_HF_QWEN_MAX_WINDOW_LAYERS = 28
_HF_QWEN3_HEAD_DIM = 128
_NORM_EPS = 1e-6
_ROPE_THETA = 10000.0

# Far above any real model, and low enough that no list made from a hostile config fills the memory.
_MAX_SIZE = 2**31 - 1
_MAX_LAYERS = 4096


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMON_KEYS = _words(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta
    rope_scaling rope_parameters partial_rotary_factor quantization_config
    """
)
_QWEN_WINDOW_KEYS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
_HF_KEYS = {
    "llama": _COMMON_KEYS | {"attention_bias", "mlp_bias"},
    "mistral": _COMMON_KEYS | {"sliding_window"},
    "qwen2": _COMMON_KEYS | _QWEN_WINDOW_KEYS,
    "qwen3": _COMMON_KEYS | _QWEN_WINDOW_KEYS | {"attention_bias"},
}

# Generation, training and bookkeeping: none of them changes a logit.
_HARMLESS_KEYS = _words(
    """
    torch_dtype dtype transformers_version use_cache initializer_range attention_dropout hidden_dropout
    residual_dropout attn_pdrop resid_pdrop embd_pdrop classifier_dropout pretraining_tp name_or_path
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id unk_token_id tokenizer_class prefix
    is_llama_config transformers.js_config unsloth_version unsloth_fixed max_sequence_length model_max_length
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate torchscript
    id2label label2id num_labels problem_type finetuning_task task_specific_params neftune_noise_alpha
    attn_implementation use_flash_attn tf_legacy_loss chunk_size_feed_forward
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty
    do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences remove_invalid_values repetition_penalty suppress_tokens target_lookbehind temperature
    top_k top_p typical_p
    """
)

_ROPE_KEYS = {
    "default": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "linear": {"rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"},
    "llama3": {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    },
}

# Below "<arch>."; what is not here must be zero or false.
_GGUF_KEYS = _words(
    """
    block_count context_length embedding_length feed_forward_length vocab_size expert_count
    attention.head_count attention.head_count_kv attention.layer_norm_rms_epsilon attention.key_length
    attention.value_length attention.sliding_window attention.causal
    rope.freq_base rope.dimension_count rope.scaling.type rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length rope.scale_linear tensor_data_layout expert_used_count
    """
)


def config_from_hf(values: Any, path: Path | str) -> ModelConfig:
    """The config of a Hugging Face model: `values` is its parsed config.json, `path` names that file in messages.

    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds {_show(values)} where a JSON object is needed; it is no model's config.json")
    keys = _Keys(values, path)
    model_type = _hf_model_type(values, path)
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ModelError(
            f"{path}: quantization_config says the weights are quantized ({_show(method)}), which tpimpi does not "
            f"read; give --model the model's unquantized safetensors, or a GGUF file of it"
        )
    _refuse_unknown_hf_keys(values, _HF_KEYS[model_type], path)
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{path}: hidden_act is {_show(activation)}; tpimpi computes only 'silu'")

    layers = keys.integer("num_hidden_layers", high=_MAX_LAYERS)
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    if values.get("num_key_value_heads", 0) is None:
        kv_heads = heads
    else:
        kv_heads = keys.integer("num_key_value_heads", default=_HF_KV_HEADS.get(model_type, heads))
    if model_type == "qwen3":
        head_dim = keys.integer("head_dim", default=_HF_QWEN3_HEAD_DIM)
    elif values.get("head_dim") is None:
        head_dim = _even_split(hidden, heads, path, ("hidden_size", "num_attention_heads", "head_dim"))
    else:
        head_dim = keys.integer("head_dim")
    context = keys.integer("max_position_embeddings", default=_HF_CONTEXT[model_type])
    rope_theta, rope_scaling = _hf_rope(values, context, path)
    attention_bias = keys.flag("attention_bias")
    return _checked(
        ModelConfig(
            architecture=model_type,
            hidden=hidden,
            intermediate=keys.integer("intermediate_size"),
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab=keys.integer("vocab_size"),
            context=context,
            norm_eps=keys.number("rms_norm_eps", default=_NORM_EPS),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            attention_windows=_hf_windows(keys, model_type, layers),
            tied_head=keys.flag("tie_word_embeddings"),
            qkv_bias=model_type == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=keys.flag("mlp_bias"),
            qk_norm=model_type == "qwen3",
        ),
        path,
    )


def config_from_gguf(
    metadata: Mapping[str, Any],
    path: Path | str,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """The config of a GGUF file from its metadata (key -> number, string, or anything else for an array).

    `shapes` holds the file's tensors by their GGUF names, as [out, in]: which biases there are, and whether the head
    has a tensor of its own, is known from them alone. `rope_factors` is the `rope_freqs.weight` tensor.
    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    arch = metadata.get("general.architecture")
    if arch not in GGUF_ARCHITECTURES:
        raise ModelError(
            f"{path}: general.architecture is {_show(arch)}, which tpimpi does not compute; "
            f"it computes {', '.join(GGUF_ARCHITECTURES)}"
        )
    if metadata.get("general.type", "model") != "model":
        raise ModelError(f"{path}: general.type is {_show(metadata['general.type'])}; a file of type 'model' is needed")
    _refuse_unknown_gguf_keys(metadata, arch, path)
    keys = _Keys(metadata, path, f"{arch}.")

    layers = keys.integer("block_count", high=_MAX_LAYERS)
    hidden = keys.integer("embedding_length")
    heads = keys.integer("attention.head_count")
    key_length = f"{arch}.attention.key_length"
    if key_length in metadata:
        head_dim = keys.integer("attention.key_length")
    else:
        sizes = (f"{arch}.embedding_length", f"{arch}.attention.head_count", key_length)
        head_dim = _even_split(hidden, heads, path, sizes)
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, default=head_dim) != head_dim:
            raise ModelError(
                f"{path}: {arch}.{key} is {_show(metadata[f'{arch}.{key}'])} and the heads' size is {head_dim}; "
                f"tpimpi computes only models where they are the same"
            )
    context = keys.integer("context_length")
    embedding = shapes.get("token_embd.weight", ())
    qwen2, qwen3 = arch == "qwen2", arch == "qwen3"
    return _checked(
        ModelConfig(
            architecture=arch,
            hidden=hidden,
            intermediate=keys.integer("feed_forward_length"),
            layers=layers,
            heads=heads,
            kv_heads=keys.integer("attention.head_count_kv", default=heads),
            head_dim=head_dim,
            vocab=keys.integer("vocab_size", default=embedding[0] if embedding else None),
            context=context,
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("rope.freq_base", default=_ROPE_THETA),
            rope_scaling=_gguf_rope_scaling(metadata, arch, rope_factors, head_dim, path),
            attention_windows=(_gguf_window(keys, arch, context),) * layers,
            tied_head="output.weight" not in shapes,
            # Qwen2 without its biases, or Qwen3 without its norms, is a broken file and no other model.
            qkv_bias=qwen2 or any(f"blk.0.attn_{part}.bias" in shapes for part in "qkv"),
            o_bias="blk.0.attn_output.bias" in shapes,
            mlp_bias=any(f"blk.0.ffn_{part}.bias" in shapes for part in ("gate", "up", "down")),
            qk_norm=qwen3,
        ),
        path,
    )


class _Keys:
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
                f"{self.path}: {self.prefix}{key} is {_show(value)}; a whole number of 1 to {high} is needed"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number; a missing key is refused when there is no default."""
        value = self._get(key, default)
        if not _is_positive(value):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {_show(value)}; a positive number is needed")
        return float(value)

    def flag(self, key: str) -> bool:
        """A truth value, false if missing or null."""
        value = self.values.get(self.prefix + key)
        if value is not None and not isinstance(value, bool):
            raise ModelError(f"{self.path}: {self.prefix}{key} is {_show(value)}; true or false is needed")
        return bool(value)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(self.prefix + key, default)
        if value is None and self.prefix + key not in self.values:
            raise ModelError(f"{self.path}: key '{self.prefix}{key}' is missing, without which the model is not known")
        return value


def _hf_model_type(values: Mapping[str, Any], path: Path | str) -> str:
    model_type = values.get("model_type")
    known = ", ".join(HF_CLASSES)
    if model_type is None:
        raise ModelError(f"{path}: key 'model_type' is missing; tpimpi computes {known}")
    if not isinstance(model_type, str) or model_type not in HF_CLASSES:
        raise ModelError(
            f"{path}: model_type is {_show(model_type)}, which tpimpi does not compute; it computes {known}"
        )
    architectures = values.get("architectures")
    if architectures and architectures != [HF_CLASSES[model_type]]:
        raise ModelError(
            f"{path}: architectures is {_show(architectures)}; for model_type '{model_type}' tpimpi computes only "
            f"['{HF_CLASSES[model_type]}']"
        )
    return model_type


def _refuse_unknown_hf_keys(values: Mapping[str, Any], known: frozenset[str], path: Path | str) -> None:
    for key, value in values.items():
        if key in known or key in _HARMLESS_KEYS or key.startswith("_") or _is_off(value):
            continue
        raise ModelError(
            f"{path}: key {_show(key)} is {_show(value)}, which tpimpi does not know and which may change the "
            f"mathematics; remove the key if the model does not need it, else the model cannot be run"
        )


def _refuse_unknown_gguf_keys(metadata: Mapping[str, Any], arch: str, path: Path | str) -> None:
    prefix = f"{arch}."
    experts = metadata.get(f"{arch}.expert_count", 0)
    if experts != 0:
        raise ModelError(
            f"{path}: {arch}.expert_count is {_show(experts)}: a mixture of experts, which tpimpi does not compute; "
            f"a dense model is needed"
        )
    # The one key that changes the mathematics when it is false.
    causal = metadata.get(f"{arch}.attention.causal", True)
    if causal is not True:
        raise ModelError(f"{path}: {arch}.attention.causal is {_show(causal)}; tpimpi computes only true")
    for key, value in metadata.items():
        if key.startswith(prefix) and key.removeprefix(prefix) not in _GGUF_KEYS and not (_is_off(value) or value == 0):
            raise ModelError(
                f"{path}: key {_show(key)} is {_show(value)}, which tpimpi does not know and which may change the "
                f"mathematics; the model cannot be run"
            )


def _hf_rope(values: Mapping[str, Any], context: int, path: Path | str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, from the old layout (rope_theta, rope_scaling) or the new one.

    As in transformers: rope_scaling or rope_parameters, and what stands inside goes before what stands beside.
    """
    beside = {key: values[key] for key in ("rope_theta", "partial_rotary_factor") if values.get(key) is not None}
    read = []
    for name in ("rope_scaling", "rope_parameters"):
        inside = values.get(name)
        if inside is not None and not isinstance(inside, dict):
            raise ModelError(f"{path}: {name} is {_show(inside)}; a JSON object or null is needed")
        if inside:
            present = {key: value for key, value in inside.items() if value is not None}
            read.append(_hf_rope_dict({**beside, **present}, name, context, path))
    if len(read) == 2 and read[0] != read[1]:
        raise ModelError(f"{path}: rope_scaling and rope_parameters say different things; remove the wrong one")
    return read[0] if read else _hf_rope_dict(beside, "", context, path)


def _hf_rope_dict(
    values: Mapping[str, Any], name: str, context: int, path: Path | str
) -> tuple[float, RopeScaling | None]:
    prefix = f"{name}." if name else ""
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise ModelError(
            f"{path}: {prefix}rope_type is {_show(kind)}, which tpimpi does not compute; it computes "
            f"{', '.join(_ROPE_KEYS)}"
        )
    for key, value in values.items():
        if key not in _ROPE_KEYS[kind] and not _is_off(value):
            raise ModelError(
                f"{path}: key {_show(prefix + key)} is {_show(value)}, which tpimpi does not know for rope_type "
                f"'{kind}' and which may change the mathematics; remove it if the model does not need it"
            )
    partial = values.get("partial_rotary_factor", 1.0)
    if isinstance(partial, bool) or partial != 1:
        raise ModelError(f"{path}: partial_rotary_factor is {_show(partial)}; tpimpi computes only 1 (the whole head)")
    keys = _Keys({prefix + key: value for key, value in values.items()}, path, prefix)
    theta = keys.number("rope_theta", default=_ROPE_THETA)
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=keys.number("factor"))
    low, high = keys.number("low_freq_factor"), keys.number("high_freq_factor")
    if not low < high:
        raise ModelError(
            f"{path}: {prefix}low_freq_factor is {low:g} and {prefix}high_freq_factor is {high:g}; "
            f"the first must be the smaller one"
        )
    original = keys.integer("original_max_position_embeddings", default=context)
    return theta, RopeScaling("llama3", keys.number("factor"), low, high, original)


def _hf_windows(keys: _Keys, model_type: str, layers: int) -> tuple[int, ...]:
    values, path = keys.values, keys.path
    if model_type == "llama":
        return (0,) * layers
    if model_type == "mistral":
        if values.get("sliding_window", 0) is None:
            return (0,) * layers
        return (keys.integer("sliding_window", default=_HF_MISTRAL_WINDOW),) * layers
    window = 0
    if keys.flag("use_sliding_window") and values.get("sliding_window", 0) is not None:
        window = keys.integer("sliding_window", default=_HF_QWEN_WINDOW)
    types = values.get("layer_types")
    if types is None:
        first = values.get("max_window_layers", _HF_QWEN_MAX_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"{path}: max_window_layers is {_show(first)}; a whole number, 0 or more, is needed")
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        found = f"{len(types)} entries" if isinstance(types, list) else _show(types)
        raise ModelError(f"{path}: layer_types has {found}; a list of {layers} (num_hidden_layers) is needed")
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{path}: layer_types[{layer}] is {_show(kind)}, which tpimpi does not compute; "
                f"'full_attention' or 'sliding_attention' is needed"
            )
        if kind == "sliding_attention" and not window:
            raise ModelError(
                f"{path}: layer_types[{layer}] is 'sliding_attention', but there is no window "
                f"(use_sliding_window is {_show(values.get('use_sliding_window'))}, sliding_window is "
                f"{_show(values.get('sliding_window'))}); a window, or 'full_attention', is needed"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


def _gguf_window(keys: _Keys, arch: str, context: int) -> int:
    key = "attention.sliding_window"
    value = keys.values.get(keys.prefix + key)
    if value is None or value == 0:
        return 0
    window = keys.integer(key)
    if window >= context:
        return 0
    if arch != "llama":
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
        raise ModelError(
            f"{path}: {key}.type is {_show(kind)}, which tpimpi does not compute; it computes none, linear"
        )
    # rope.scale_linear is its name in files of 2023; to llama.cpp 0 is "not scaled", and no type is linear.
    factor = metadata.get(f"{key}.factor", metadata.get(f"{arch}.rope.scale_linear", 1.0))
    if kind == "none" or (not isinstance(factor, bool) and factor == 0):
        factor = 1.0
    if not _is_positive(factor):
        raise ModelError(f"{path}: {key}.factor is {_show(factor)}; a positive number is needed")
    if rope_factors is not None:
        if len(rope_factors) != head_dim // 2:
            raise ModelError(
                f"{path}: tensor rope_freqs.weight has {len(rope_factors)} numbers; "
                f"{head_dim // 2} (half the head size of {head_dim}) are needed"
            )
        for value in rope_factors:
            if not _is_positive(value):
                raise ModelError(f"{path}: tensor rope_freqs.weight holds {value}; positive numbers are needed")
        return RopeScaling("factors", factors=tuple(float(value) * float(factor) for value in rope_factors))
    return RopeScaling("linear", factor=float(factor)) if factor != 1 else None


def _even_split(hidden: int, heads: int, path: Path | str, names: tuple[str, str, str]) -> int:
    if hidden % heads:
        raise ModelError(
            f"{path}: {names[0]} is {hidden}, no multiple of {names[1]}, which is {heads}, and there is no {names[2]}; "
            f"one of the three is wrong"
        )
    return hidden // heads


def _checked(config: ModelConfig, path: Path | str) -> ModelConfig:
    """What must hold between the sizes, whatever file they came from."""
    if config.heads % config.kv_heads:
        raise ModelError(
            f"{path}: {config.heads} query heads and {config.kv_heads} key/value heads; "
            f"the first must be a multiple of the second"
        )
    if config.head_dim % 2:
        raise ModelError(f"{path}: the head size is {config.head_dim}; rotary positions need an even one")
    return config


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_positive(value: Any) -> bool:
    # Also refuses integers beyond a float's range, which JSON can hold.
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and 0 < float(value) < math.inf
    except OverflowError:
        return False


_SHORT = reprlib.Repr()  # bounded in length and depth, whatever stands in the file
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _show(value: Any) -> str:
    """A value from a file as it may stand in a one-line message."""
    return _SHORT.repr(value)
