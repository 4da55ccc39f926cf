"""OLMoE (Muennighoff et al. 2024, arXiv 2409.02060): experts in every layer, whose weights stay as the softmax has them;
queries and keys are normed over all heads."""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import ATTENTION, ATTENTION_NORM, MLP_NORM, Architecture
from tpimpi.models.architectures.experts import (
    EXPERT_COUNT_KEYS,
    EXPERTS,
    GGUF_STACKED_EXPERTS,
    ROUTER,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.architectures.olmo import QK_NORM_OVER_ALL
from tpimpi.models.keys import Keys


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {
        "qk_norm_over_all": True,
        **hf_experts(keys, 64, normalized=keys.flag("norm_topk_prob")),
    }


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {"qk_norm_over_all": True, **gguf_experts(keys, "feed_forward_length", normalized=False)}


OLMOE = Architecture(
    name="olmoe",
    hf_class="OlmoeForCausalLM",
    gguf_name="olmoe",
    layer_tensors=(ATTENTION_NORM, *ATTENTION, ROUTER, *EXPERTS, *QK_NORM_OVER_ALL, MLP_NORM),
    fused=GGUF_STACKED_EXPERTS,
    # A clip_qkv that is not null is refused.
    hf_keys=frozenset(
        {"attention_bias", *EXPERT_COUNT_KEYS, "num_experts_per_tok", "norm_topk_prob"}
        | {"output_router_logits", "router_aux_loss_coef"}
    ),
    hf_defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
    },
    hf_fields=_hf_fields,
    gguf_fields=_gguf_fields,
)
