"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): a Mistral with experts in each layer. In GGUF a llama with expert_count."""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    MLP_NORM,
    Architecture,
    TensorSpec,
    gguf_same_window,
    hf_window,
)
from tpimpi.models.architectures.experts import (
    EXPERT_COUNT_KEYS,
    GGUF_STACKED_EXPERTS,
    expert_tensors,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.keys import Keys

_WHERE = "block_sparse_moe"


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    return (hf_window(keys, None),) * layers


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return hf_experts(keys, 8, normalized=True)


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return gguf_experts(keys, "feed_forward_length", normalized=True)


MIXTRAL = Architecture(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    gguf_name="llama",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION),
        TensorSpec("router", f"{_WHERE}.gate", "ffn_gate_inp", ("experts", "hidden"), layers="experts"),
        *(*expert_tensors(f"{_WHERE}.experts", ("w1", "w3", "w2")), MLP_NORM),
    ),
    fused=GGUF_STACKED_EXPERTS,
    hf_keys=frozenset(
        {"sliding_window", *EXPERT_COUNT_KEYS, "num_experts_per_tok"}
        | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}
    ),
    hf_defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
    },
    hf_fields=_hf_fields,
    hf_windows=_windows,
    gguf_interleaves_qk=True,
    gguf_windows=gguf_same_window,
    gguf_fields=_gguf_fields,
)
