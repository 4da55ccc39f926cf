"""GLM-4 (GLM Team 2024, arXiv 2406.12793): half of each head is rotated, neighbours paired; gate and up are one matrix.

GLM is the GLM-4-9B of 2024 and GLM-Edge, whose GGUF files, of architecture chatglm, may hold Q, K and V as one matrix.
GLM4 is GLM-4-0414, which has norms after its blocks too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    FUSED_GATE_UP,
    MLP,
    MLP_NORM,
    Architecture,
    FusedSpec,
    TensorSpec,
)
from tpimpi.models.keys import Keys

_POST_NORMS = (
    TensorSpec("attn_post_norm", "post_self_attn_layernorm", "post_attention_norm", ("hidden",)),
    TensorSpec("mlp_post_norm", "post_mlp_layernorm", "post_ffw_norm", ("hidden",)),
)
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def _post_norms(keys: Keys, layers: int) -> dict[str, Any]:
    return {"post_norms": True}


GLM = Architecture(
    name="glm",
    hf_class="GlmForCausalLM",
    gguf_name="chatglm",
    layer_tensors=(ATTENTION_NORM, *ATTENTION, *MLP, MLP_NORM),
    fused=(FUSED_GATE_UP, FusedSpec(None, "attn_qkv", ("q", "k", "v"))),
    hf_keys=frozenset({"attention_bias"}),
    hf_defaults=_DEFAULTS,
    hf_o_bias=False,
    partial_rotary=True,
    hf_interleaves_qk=True,
    gguf_interleaves_qk=True,
)

GLM4 = replace(
    GLM,
    name="glm4",
    hf_class="Glm4ForCausalLM",
    gguf_name="glm4",
    layer_tensors=(*GLM.layer_tensors, *_POST_NORMS),
    fused=(FUSED_GATE_UP,),
    hf_fields=_post_norms,
    gguf_fields=_post_norms,
)
