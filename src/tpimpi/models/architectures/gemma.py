"""Gemma 2 and the text part of Gemma 3 (Gemma Team 2024, arXiv 2408.00118; 2025, arXiv 2503.19786).

Norms before and after each block, with weights that files of Hugging Face hold less 1; embeddings times
sqrt(hidden); GELU. Gemma 2: soft caps on scores and logits, and a window in every other layer. Gemma 3: norms over
queries and keys, and a window in five of six layers, which have a rope of their own.
"""

from __future__ import annotations

import math
from typing import Any

from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    GGUF_PATTERN,
    MLP,
    QK_NORM,
    Architecture,
    TensorSpec,
    gguf_periodic_windows,
    hf_windows_of_types,
)
from tpimpi.models.keys import Keys

POST_NORMS = (
    TensorSpec("attn_post_norm", "post_attention_layernorm", "post_attention_norm", ("hidden",)),
    TensorSpec("mlp_post_norm", "post_feedforward_layernorm", "post_ffw_norm", ("hidden",)),
)
_MLP_NORM = TensorSpec("mlp_norm", "pre_feedforward_layernorm", "ffn_norm", ("hidden",))
_GEMMA2_LAYER = (ATTENTION_NORM, *ATTENTION, *MLP, _MLP_NORM, *POST_NORMS)
_GEMMA3_LAYER = (ATTENTION_NORM, *ATTENTION, *MLP, *QK_NORM, _MLP_NORM, *POST_NORMS)
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}
_KEYS = frozenset(
    {"hidden_activation", "attention_bias", "query_pre_attn_scalar", "sliding_window", "layer_types"}
    | {"final_logit_softcapping", "cache_implementation"}
)
_LAYERS_OF_27B = {
    "gemma2": 46,
    "gemma3": 62,
}  # the models whose scores are scaled by hidden / heads; GGUF does not say so


def _common(hidden: int) -> dict[str, Any]:
    return {"post_norms": True, "embedding_scale": math.sqrt(hidden)}


def _softcap(keys: Keys, key: str) -> float:
    """A soft cap, 0 where there is none."""
    return 0.0 if keys.values.get(keys.prefix + key) is None else keys.number(key)


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {
        **_common(keys.integer("hidden_size")),
        "attention_scale": keys.number("query_pre_attn_scalar") ** -0.5,
        "logit_softcap": _softcap(keys, "final_logit_softcapping"),
    }


def _gemma2_hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {**_hf_fields(keys, layers), "attention_softcap": _softcap(keys, "attn_logit_softcapping")}


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    by_width = layers == _LAYERS_OF_27B[keys.prefix.removesuffix(".")]
    return {
        **_common(hidden),
        "activation": "gelu_tanh",
        "attention_scale": (hidden // heads if by_width else keys.integer("attention.key_length")) ** -0.5,
        "logit_softcap": _softcap(keys, "final_logit_softcapping"),
    }


def _gemma2_gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    caps = {"attention_softcap": ("attn_logit_softcapping", 50.0), "logit_softcap": ("final_logit_softcapping", 30.0)}
    return {
        **_gguf_fields(keys, layers),
        **{field: keys.number(key, default=default) for field, (key, default) in caps.items()},
    }


def _gemma3_gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {**_gguf_fields(keys, layers), "local_rope_theta": keys.number("rope.freq_base_swa", default=10000.0)}


GEMMA2 = Architecture(
    name="gemma2",
    hf_class="Gemma2ForCausalLM",
    gguf_name="gemma2",
    layer_tensors=_GEMMA2_LAYER,
    hf_keys=_KEYS | {"attn_logit_softcapping"},
    hf_defaults={
        **_DEFAULTS,
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    hf_activation_key="hidden_activation",
    hf_windows=hf_windows_of_types(4096, 2),
    hf_fields=_gemma2_hf_fields,
    hf_norm_offset=1.0,
    gguf_keys=frozenset({"attn_logit_softcapping", "final_logit_softcapping", GGUF_PATTERN}),
    gguf_windows=gguf_periodic_windows(2, 4096),
    gguf_fields=_gemma2_gguf_fields,
)

GEMMA3 = Architecture(
    name="gemma3_text",
    hf_class="Gemma3ForCausalLM",
    gguf_name="gemma3",
    layer_tensors=_GEMMA3_LAYER,
    hf_keys=_KEYS | {"rope_local_base_freq", "sliding_window_pattern"},
    hf_defaults={
        **_DEFAULTS,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
    },
    hf_activation_key="hidden_activation",
    hf_rope_by_layer=True,
    hf_windows=hf_windows_of_types(4096, 6, "sliding_window_pattern"),
    hf_fields=_hf_fields,
    hf_norm_offset=1.0,
    gguf_keys=frozenset({"final_logit_softcapping", "rope.freq_base_swa", GGUF_PATTERN}),
    gguf_windows=gguf_periodic_windows(6),
    gguf_fields=_gemma3_gguf_fields,
)
