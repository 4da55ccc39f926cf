"""Qwen3's mixtures of experts, such as Qwen3-30B-A3B (Yang et al. 2025, arXiv 2505.09388)."""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import ATTENTION, ATTENTION_NORM, MLP_NORM, QK_NORM, Architecture
from tpimpi.models.architectures.experts import (
    DENSE_MLP,
    EXPERT_COUNT_KEYS,
    EXPERTS,
    GGUF_STACKED_EXPERTS,
    ROUTER,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.architectures.qwen2 import QWEN_WINDOW_KEYS, qwen_windows
from tpimpi.models.keys import Keys, show


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    step = keys.integer("decoder_sparse_step", default=1)
    dense = keys.values.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int and 0 <= layer < layers for layer in dense):
        raise ModelError(f"{keys.path}: mlp_only_layers is {show(dense)}; a list of layers below {layers} is needed")
    return {
        **hf_experts(keys, 128, "moe_intermediate_size", normalized=keys.flag("norm_topk_prob")),
        "dense_layers": tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step),
    }


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return gguf_experts(keys, normalized=True)


QWEN3_MOE = Architecture(
    name="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    gguf_name="qwen3moe",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION, *DENSE_MLP),
        *(ROUTER, *EXPERTS, *QK_NORM, MLP_NORM),
    ),
    fused=GGUF_STACKED_EXPERTS,
    hf_keys=QWEN_WINDOW_KEYS
    | {"attention_bias", *EXPERT_COUNT_KEYS, "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
    | {"decoder_sparse_step", "mlp_only_layers", "output_router_logits", "router_aux_loss_coef"},
    hf_defaults={
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    hf_fields=_hf_fields,
    hf_windows=qwen_windows,
    gguf_keys=frozenset({"expert_feed_forward_length"}),
    gguf_fields=_gguf_fields,
)
