"""Read a ModelConfig from a Hugging Face config.json.

Meaning and defaults of its keys are those of transformers' models; what differs between families is in their
`Architecture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures import ARCHITECTURES, Architecture
from tpimpi.models.config import ROPE_THETA, ModelConfig, RopeScaling, checked
from tpimpi.models.keys import MAX_LAYERS, Keys, even_split, is_off, show, words
from tpimpi.models.refused_checkpoints import refuse_quantized, refuse_rope_contradictions

_NORM_EPS = 1e-6  # what transformers takes where config.json has none
_SILU = ("silu", "swish")  # one function, under both of the names that transformers has for it

_COMMON_KEYS = words(
    """
    model_type architectures vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_theta
    rope_scaling rope_parameters partial_rotary_factor quantization_config
    """
)
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
    family = _hf_family(values, path)
    refuse_quantized(values, path)
    refuse_rope_contradictions(values, path)
    _refuse_unknown_hf_keys(values, _COMMON_KEYS | family.hf_keys, path)
    activation = values.get("hidden_act", "silu")
    if activation not in _SILU:
        raise ModelError(f"{path}: hidden_act is {show(activation)}; tpimpi computes only 'silu'")

    layers = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    if values.get("num_key_value_heads", 0) is None:
        kv_heads = heads
    else:
        kv_heads = keys.integer("num_key_value_heads", default=family.hf_kv_heads or heads)
    if family.hf_head_dim is not None:
        head_dim = keys.integer("head_dim", default=family.hf_head_dim)
    elif values.get("head_dim") is None:
        head_dim = even_split(hidden, heads, path, ("hidden_size", "num_attention_heads", "head_dim"))
    else:
        head_dim = keys.integer("head_dim")
    context = keys.integer("max_position_embeddings", default=family.hf_context)
    rope_theta, rope_scaling = _hf_rope(values, context, path)
    attention_bias = keys.flag("attention_bias")
    return checked(
        ModelConfig(
            architecture=family.name,
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
            attention_windows=family.hf_windows(keys, layers),
            tied_head=keys.flag("tie_word_embeddings"),
            qkv_bias=family.always_qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=keys.flag("mlp_bias"),
            qk_norm=family.qk_norm,
        ),
        path,
    )


def _hf_family(values: Mapping[str, Any], path: Path | str) -> Architecture:
    model_type = values.get("model_type")
    known = ", ".join(ARCHITECTURES)
    if model_type is None:
        raise ModelError(f"{path}: key 'model_type' is missing; tpimpi computes {known}")
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise ModelError(
            f"{path}: model_type is {show(model_type)}, which tpimpi does not compute; it computes {known}"
        )
    family = ARCHITECTURES[model_type]
    architectures = values.get("architectures")
    if architectures and architectures != [family.hf_class]:
        raise ModelError(
            f"{path}: architectures is {show(architectures)}; for model_type '{model_type}' tpimpi computes only "
            f"['{family.hf_class}']"
        )
    return family


def _refuse_unknown_hf_keys(values: Mapping[str, Any], known: frozenset[str], path: Path | str) -> None:
    for key, value in values.items():
        if key in known or key in _HARMLESS_KEYS or key.startswith("_") or is_off(value) or _is_zero(value):
            continue
        if key == "layer_types" and _all_full(value) and not values.get("sliding_window"):
            continue
        raise ModelError(
            f"{path}: key {show(key)} is {show(value)}, which tpimpi does not know and which may change the "
            f"mathematics; remove the key if the model does not need it, else the model cannot be run"
        )


def _is_zero(value: Any) -> bool:
    """Whether this is the number 0, which switches off whatever it is the size or the strength of."""
    return isinstance(value, int | float) and value == 0


def _all_full(types: Any) -> bool:
    """Whether this list of layers' kinds of attention says no more than that every layer sees all positions."""
    return isinstance(types, list) and all(kind == "full_attention" for kind in types)


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
