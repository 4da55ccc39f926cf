"""gpt-oss 20b and 120b (OpenAI 2025, arXiv 2508.10925): experts in every layer, as mxfp4; biases everywhere; a sink in each
head's attention; a window in every other layer; SwiGLU with clamped inputs."""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    GGUF_PATTERN,
    Architecture,
    FusedSpec,
    TensorSpec,
    gguf_periodic_windows,
    hf_windows_of_types,
)
from tpimpi.models.architectures.experts import (
    EXPERT_COUNT_KEYS,
    EXPERTS,
    GGUF_STACKED_EXPERTS,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.keys import Keys, show

_WINDOW = 128  # positions
_WINDOW_PERIOD = 2  # layers
_SWIGLU_ALPHA = 1.702
_SWIGLU_LIMIT = 7.0
_EXPERTS_PER_TOKEN = 4
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
_FIELDS: dict[str, Any] = {
    "router_bias": "logits",
    "expert_bias": True,
    "activation": "clamped_silu",
    "attention_sinks": True,
}


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    alpha = keys.number("swiglu_alpha", default=_SWIGLU_ALPHA)
    if alpha != _SWIGLU_ALPHA:
        raise ModelError(f"{keys.path}: swiglu_alpha is {alpha:g}; tpimpi computes only {_SWIGLU_ALPHA:g}")
    chosen = keys.integer("num_experts_per_tok")
    if (other := keys.values.get("experts_per_token", chosen)) != chosen:
        raise ModelError(
            f"{keys.path}: num_experts_per_tok is {chosen} and experts_per_token is {show(other)}; remove the wrong one"
        )
    return {
        **hf_experts(keys, 128, normalized=True),
        **_FIELDS,
        "activation_limit": keys.number("swiglu_limit", default=_SWIGLU_LIMIT),
    }


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {**gguf_experts(keys, normalized=True), **_FIELDS, "activation_limit": _SWIGLU_LIMIT}


GPT_OSS = Architecture(
    name="gpt_oss",
    hf_class="GptOssForCausalLM",
    gguf_name="gpt-oss",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION),
        TensorSpec("sinks", "self_attn.sinks", "attn_sinks.weight", ("heads",), bare_name=True),
        TensorSpec(
            "router", "mlp.router", "ffn_gate_inp", ("experts", "hidden"), "router_logits_bias", layers="experts"
        ),
        *EXPERTS,
        TensorSpec("mlp_norm", "post_attention_layernorm", "post_attention_norm", ("hidden",)),
    ),
    fused=(
        FusedSpec(
            "mlp.experts.gate_up_proj",
            None,
            ("expert_gate", "expert_up"),
            interleaved=True,
            transposed=True,
            bare_name=True,
        ),
        FusedSpec("mlp.experts.down_proj", None, ("expert_down",), transposed=True, bare_name=True),
        *GGUF_STACKED_EXPERTS,
    ),
    hf_keys=frozenset(
        {"attention_bias", "sliding_window", "layer_types", *EXPERT_COUNT_KEYS, "num_experts_per_tok"}
        | {"experts_per_token", "initial_context_length", "swiglu_alpha", "swiglu_limit"}  # the second is of the rope
        | {"output_router_logits", "router_aux_loss_coef"}
    ),
    hf_defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "num_experts_per_tok": _EXPERTS_PER_TOKEN,
    },
    hf_default_rope=_YARN,
    hf_quantization="mxfp4",
    hf_windows=hf_windows_of_types(_WINDOW, _WINDOW_PERIOD),
    hf_fields=_hf_fields,
    gguf_keys=frozenset({"expert_feed_forward_length", GGUF_PATTERN}),
    gguf_windows=gguf_periodic_windows(_WINDOW_PERIOD),
    gguf_fields=_gguf_fields,
    gguf_yarn_truncate=False,  # no key says so; llama.cpp truncates all the same, which is another rope by a little
)
