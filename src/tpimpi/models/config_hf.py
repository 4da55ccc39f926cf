"""Read a ModelConfig from a Hugging Face config.json.

Meaning and defaults of its keys are those of transformers' Llama, Mistral, Qwen2 and Qwen3 models.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.config import (
    MAX_LAYERS,
    ROPE_THETA,
    Keys,
    ModelConfig,
    RopeScaling,
    checked,
    even_split,
    is_off,
    show,
    words,
)

HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What transformers takes where config.json has no such key.
_HF_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}  # llama: as many as query heads
_HF_CONTEXT = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_HF_MISTRAL_WINDOW = 4096
_HF_QWEN_WINDOW = 4096
_HF_QWEN_MAX_WINDOW_LAYERS = 28
_HF_QWEN3_HEAD_DIM = 128
_NORM_EPS = 1e-6

_COMMON_KEYS = words(
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
_HARMLESS_KEYS = words(
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


def config_from_hf(values: Any, path: Path | str) -> ModelConfig:
    """The config of a Hugging Face model: `values` is its parsed config.json, `path` names that file in messages.

    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds {show(values)} where a JSON object is needed; it is no model's config.json")
    keys = Keys(values, path)
    model_type = _hf_model_type(values, path)
    if values.get("quantization_config"):
        method = values["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise ModelError(
            f"{path}: quantization_config says the weights are quantized ({show(method)}), which tpimpi does not "
            f"read; give --model the model's unquantized safetensors, or a GGUF file of it"
        )
    _refuse_unknown_hf_keys(values, _HF_KEYS[model_type], path)
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelError(f"{path}: hidden_act is {show(activation)}; tpimpi computes only 'silu'")

    layers = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    if values.get("num_key_value_heads", 0) is None:
        kv_heads = heads
    else:
        kv_heads = keys.integer("num_key_value_heads", default=_HF_KV_HEADS.get(model_type, heads))
    if model_type == "qwen3":
        head_dim = keys.integer("head_dim", default=_HF_QWEN3_HEAD_DIM)
    elif values.get("head_dim") is None:
        head_dim = even_split(hidden, heads, path, ("hidden_size", "num_attention_heads", "head_dim"))
    else:
        head_dim = keys.integer("head_dim")
    context = keys.integer("max_position_embeddings", default=_HF_CONTEXT[model_type])
    rope_theta, rope_scaling = _hf_rope(values, context, path)
    attention_bias = keys.flag("attention_bias")
    return checked(
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


def _hf_model_type(values: Mapping[str, Any], path: Path | str) -> str:
    model_type = values.get("model_type")
    known = ", ".join(HF_CLASSES)
    if model_type is None:
        raise ModelError(f"{path}: key 'model_type' is missing; tpimpi computes {known}")
    if not isinstance(model_type, str) or model_type not in HF_CLASSES:
        raise ModelError(
            f"{path}: model_type is {show(model_type)}, which tpimpi does not compute; it computes {known}"
        )
    architectures = values.get("architectures")
    if architectures and architectures != [HF_CLASSES[model_type]]:
        raise ModelError(
            f"{path}: architectures is {show(architectures)}; for model_type '{model_type}' tpimpi computes only "
            f"['{HF_CLASSES[model_type]}']"
        )
    return model_type


def _refuse_unknown_hf_keys(values: Mapping[str, Any], known: frozenset[str], path: Path | str) -> None:
    for key, value in values.items():
        if key in known or key in _HARMLESS_KEYS or key.startswith("_") or is_off(value):
            continue
        raise ModelError(
            f"{path}: key {show(key)} is {show(value)}, which tpimpi does not know and which may change the "
            f"mathematics; remove the key if the model does not need it, else the model cannot be run"
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
            raise ModelError(f"{path}: {name} is {show(inside)}; a JSON object or null is needed")
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
            f"{path}: {prefix}rope_type is {show(kind)}, which tpimpi does not compute; it computes "
            f"{', '.join(_ROPE_KEYS)}"
        )
    for key, value in values.items():
        if key not in _ROPE_KEYS[kind] and not is_off(value):
            raise ModelError(
                f"{path}: key {show(prefix + key)} is {show(value)}, which tpimpi does not know for rope_type "
                f"'{kind}' and which may change the mathematics; remove it if the model does not need it"
            )
    partial = values.get("partial_rotary_factor", 1.0)
    if isinstance(partial, bool) or partial != 1:
        raise ModelError(f"{path}: partial_rotary_factor is {show(partial)}; tpimpi computes only 1 (the whole head)")
    keys = Keys({prefix + key: value for key, value in values.items()}, path, prefix)
    theta = keys.number("rope_theta", default=ROPE_THETA)
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


def _hf_windows(keys: Keys, model_type: str, layers: int) -> tuple[int, ...]:
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
            raise ModelError(f"{path}: max_window_layers is {show(first)}; a whole number, 0 or more, is needed")
        return tuple(window if layer >= first else 0 for layer in range(layers))
    if not isinstance(types, list) or len(types) != layers:
        found = f"{len(types)} entries" if isinstance(types, list) else show(types)
        raise ModelError(f"{path}: layer_types has {found}; a list of {layers} (num_hidden_layers) is needed")
    for layer, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"{path}: layer_types[{layer}] is {show(kind)}, which tpimpi does not compute; "
                f"'full_attention' or 'sliding_attention' is needed"
            )
        if kind == "sliding_attention" and not window:
            raise ModelError(
                f"{path}: layer_types[{layer}] is 'sliding_attention', but there is no window "
                f"(use_sliding_window is {show(values.get('use_sliding_window'))}, sliding_window is "
                f"{show(values.get('sliding_window'))}); a window, or 'full_attention', is needed"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)
