"""Granite 3's mixtures of experts (IBM), such as granite-3.1-3b-a800m: a Granite with experts in every layer."""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import ATTENTION, ATTENTION_NORM, MLP_NORM, Architecture, FusedSpec, TensorSpec
from tpimpi.models.architectures.experts import (
    EXPERT_COUNT_KEYS,
    GGUF_STACKED_EXPERTS,
    expert_tensors,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.architectures.granite import (
    GRANITE_GGUF_KEYS,
    GRANITE_MULTIPLIERS,
    granite_gguf_fields,
    granite_hf_fields,
)
from tpimpi.models.keys import Keys

_WHERE = "block_sparse_moe"


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {**granite_hf_fields(keys, layers), **hf_experts(keys, 8, normalized=True)}


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    fields = {**granite_gguf_fields(keys, layers), **gguf_experts(keys, "feed_forward_length", normalized=True)}
    return {**fields, "unrotated_layers": ()}  # the key that says so of a Granite is not read of a granitemoe


GRANITE_MOE = Architecture(
    name="granitemoe",
    hf_class="GraniteMoeForCausalLM",
    gguf_name="granitemoe",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION),
        TensorSpec("router", f"{_WHERE}.router.layer", "ffn_gate_inp", ("experts", "hidden"), layers="experts"),
        *(*expert_tensors(f"{_WHERE}.experts"), MLP_NORM),
    ),
    fused=(
        FusedSpec(f"{_WHERE}.input_linear", None, ("expert_gate", "expert_up")),
        FusedSpec(f"{_WHERE}.output_linear", None, ("expert_down",)),
        *GGUF_STACKED_EXPERTS,
    ),
    hf_keys=frozenset({"attention_bias", *EXPERT_COUNT_KEYS, "num_experts_per_tok"})
    | {"output_router_logits", "router_aux_loss_coef"}
    | GRANITE_MULTIPLIERS,
    hf_defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
    },
    hf_fields=_hf_fields,
    gguf_keys=GRANITE_GGUF_KEYS,
    gguf_interleaves_qk=True,
    gguf_fields=_gguf_fields,
)
