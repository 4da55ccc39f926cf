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
from tpimpi.models.config import ModelConfig, checked
from tpimpi.models.keys import MAX_LAYERS, Keys, even_split, is_off, show, words
from tpimpi.models.layer_spec import Activation
from tpimpi.models.refused_checkpoints import refuse_quantized, refuse_rope_contradictions
from tpimpi.models.rope_hf import read_hf_rope

# What transformers takes where config.json has none, and the family no default of its own.
_NORM_EPS = 1e-6
_CONTEXT = 2048

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

# Models that also see images: the class in config.json, and what the text part is where it does not say so itself.
_MULTIMODAL = {"gemma3": "Gemma3ForConditionalGeneration", "mistral3": "Mistral3ForConditionalGeneration"}
_MULTIMODAL_TEXT = {"gemma3": "gemma3_text", "mistral3": "mistral"}
_MULTIMODAL_KEYS = words(
    """
    model_type architectures text_config vision_config tie_word_embeddings quantization_config mm_tokens_per_image
    boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id image_token_id projector_hidden_act
    vision_feature_layer multimodal_projector_bias spatial_merge_size
    """
)

# By the names of transformers' ACT2FN.
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


def config_from_hf(values: Any, path: Path | str) -> ModelConfig:
    """The config of a Hugging Face model: `values` is its parsed config.json, `path` names that file in messages.

    Raises ModelError, one line, for whatever is missing, malformed, or not known to leave the mathematics alone.
    """
    if not isinstance(values, dict):
        raise ModelError(f"{path}: holds {show(values)} where a JSON object is needed; it is no model's config.json")
    if is_multimodal(values):
        values = _text_part(values, path)
    family = _hf_family(values, path)
    refuse_quantized(values, path, family.hf_quantization)
    refuse_rope_contradictions(values, path)
    _refuse_unknown_hf_keys(values, _COMMON_KEYS | family.hf_keys, path)
    values = {**family.hf_defaults, **values}
    keys = Keys(values, path)
    layers = keys.integer("num_hidden_layers", high=MAX_LAYERS)
    hidden = keys.integer("hidden_size")
    heads = keys.integer("num_attention_heads")
    kv_heads = heads if values.get("num_key_value_heads", heads) is None else keys.integer("num_key_value_heads", heads)
    if "head_dim" in family.hf_defaults:
        head_dim = keys.integer("head_dim")
    elif values.get("head_dim") is None:
        head_dim = even_split(hidden, heads, path, ("hidden_size", "num_attention_heads", "head_dim"))
    else:
        head_dim = keys.integer("head_dim")
    context = keys.integer("max_position_embeddings", default=_CONTEXT)
    rope = read_hf_rope(values, family, context, head_dim, path)
    rotary = int(head_dim * rope.partial)
    attention_bias = keys.flag("attention_bias")
    fields: dict[str, Any] = {
        "architecture": family.name,
        "hidden": hidden,
        "intermediate": keys.integer(family.hf_intermediate_key),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab": keys.integer("vocab_size"),
        "context": context,
        "norm_eps": keys.number(family.hf_norm_eps_key, default=_NORM_EPS),
        "rope_theta": rope.theta,
        "rope_scaling": rope.scaling,
        "attention_windows": family.hf_windows(keys, layers),
        "tied_head": keys.flag("tie_word_embeddings"),
        "qkv_bias": family.always_qkv_bias or attention_bias,
        "o_bias": attention_bias and family.hf_o_bias,
        "mlp_bias": keys.flag("mlp_bias"),
        "qk_norm": family.qk_norm,
        "rotary_dims": rotary if rotary != head_dim else 0,
        "local_rope_theta": rope.local_theta,
        "activation": _activation(values, family.hf_activation_key, path),
    }
    return checked(ModelConfig(**{**fields, **family.hf_fields(keys, layers)}), path)


def hf_mtp_layers(values: Mapping[str, Any], path: Path | str) -> int:
    """How many layers its files may have behind the model's own, which predict further tokens and are not computed.

    `values` is a config.json that `config_from_hf` has read.
    """
    family = ARCHITECTURES.get(str(values.get("model_type")))
    if family is None:
        return 0
    for key in family.hf_mtp_keys:
        if not is_off(found := values.get(key)) and not _is_zero(found):
            return Keys(values, path).integer(key, high=MAX_LAYERS)
        if key in values:
            return 0
    return family.hf_mtp_layers


def is_multimodal(values: Mapping[str, Any]) -> bool:
    """Whether this is the config.json of a model of which tpimpi computes the text part alone."""
    model_type = values.get("model_type")
    return isinstance(model_type, str) and model_type in _MULTIMODAL


def _text_part(values: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """What a multimodal config.json says of its text model, as that model's own config.json would."""
    model_type = str(values["model_type"])
    text = values.get("text_config")
    if not isinstance(text, dict):
        raise ModelError(f"{path}: text_config is {show(text)}; the text model's object is needed")
    architectures = values.get("architectures")
    if architectures and architectures != [_MULTIMODAL[model_type]]:
        raise ModelError(
            f"{path}: architectures is {show(architectures)}; for model_type '{model_type}' tpimpi computes only the text "
            f"part of ['{_MULTIMODAL[model_type]}']"
        )
    _refuse_unknown_hf_keys(values, _MULTIMODAL_KEYS, path)
    outer = {key: values[key] for key in ("tie_word_embeddings", "quantization_config") if values.get(key) is not None}
    inner = {key: value for key, value in text.items() if key != "architectures"}
    return {"model_type": _MULTIMODAL_TEXT[model_type], **inner, **outer}


def _activation(values: Mapping[str, Any], key: str, path: Path | str) -> Activation:
    name = values.get(key, "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise ModelError(f"{path}: {key} is {show(name)}; tpimpi computes only {', '.join(map(repr, _ACTIVATIONS))}")
    return _ACTIVATIONS[name]


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
