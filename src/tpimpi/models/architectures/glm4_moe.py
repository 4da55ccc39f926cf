"""GLM-4.5 and GLM-4.5-Air (GLM Team 2025, arXiv 2508.06471): the first layers are dense, the others have experts chosen by
sigmoids with a bias that only chooses, and one that every position uses. Half of each head is rotated.

Files also hold layers that predict further tokens, behind the last: they are left out.
"""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import ATTENTION, ATTENTION_NORM, QK_NORM, Architecture, TensorSpec
from tpimpi.models.architectures.experts import (
    DENSE_MLP,
    EXPERT_COUNT_KEYS,
    EXPERTS,
    GGUF_STACKED_EXPERTS,
    ROUTER,
    gguf_experts,
    hf_experts,
)
from tpimpi.models.keys import MAX_LAYERS, Keys, is_off, show

_GGUF_SIGMOID = 2  # of expert_gating_func
_SHARED = "mlp.shared_experts"
_ONE_GROUP = 1  # of experts: the choice is among all
_FIELDS: dict[str, Any] = {"router_scoring": "sigmoid", "router_bias": "choice"}


def _number_or_0(keys: Keys, key: str, default: int) -> int:
    """A whole number that may be 0."""
    value = keys.values.get(keys.prefix + key, default)
    return 0 if is_off(value) or value == 0 else keys.integer(key, default=default, high=MAX_LAYERS)


def _refuse_groups(keys: Keys, names: tuple[str, ...]) -> None:
    for name in names:
        if (groups := keys.values.get(keys.prefix + name, _ONE_GROUP)) not in (0, _ONE_GROUP):
            raise ModelError(
                f"{keys.path}: {keys.prefix}{name} is {show(groups)}; tpimpi computes only {_ONE_GROUP} (all "
                f"experts at once)"
            )


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    _refuse_groups(keys, ("n_group", "topk_group"))
    columns = keys.integer("moe_intermediate_size")
    return {
        **_FIELDS,
        **hf_experts(keys, 128, "moe_intermediate_size", normalized=keys.flag("norm_topk_prob", default=True)),
        "qk_norm": keys.flag("use_qk_norm"),
        "shared_intermediate": columns * _number_or_0(keys, "n_shared_experts", 1),
        "dense_layers": tuple(range(min(layers, _number_or_0(keys, "first_k_dense_replace", 1)))),
        "router_scale": keys.number("routed_scaling_factor", default=1.0),
    }


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    _refuse_groups(keys, ("expert_group_count", "expert_group_used_count"))
    gating = keys.values.get(f"{keys.prefix}expert_gating_func", _GGUF_SIGMOID)
    if gating not in (0, _GGUF_SIGMOID):  # llama.cpp takes 0 for none, and so for sigmoid
        raise ModelError(
            f"{keys.path}: {keys.prefix}expert_gating_func is {show(gating)}; tpimpi computes only {_GGUF_SIGMOID} "
            f"(sigmoid) in a {keys.prefix[:-1]}"
        )
    scale = keys.values.get(f"{keys.prefix}expert_weights_scale")
    fields = gguf_experts(keys, normalized=keys.flag("expert_weights_norm"))
    return {
        **_FIELDS,
        **fields,
        "shared_intermediate": fields["expert_intermediate"] * _number_or_0(keys, "expert_shared_count", 0),
        "dense_layers": tuple(range(min(layers, _number_or_0(keys, "leading_dense_block_count", 0)))),
        "router_scale": keys.number("expert_weights_scale") if scale else 1.0,
    }


GLM4_MOE = Architecture(
    name="glm4_moe",
    hf_class="Glm4MoeForCausalLM",
    gguf_name="glm4moe",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION, *DENSE_MLP),
        TensorSpec("gate", f"{_SHARED}.gate_proj", "ffn_gate_shexp", ("mlp", "hidden"), layers="shared"),
        TensorSpec("up", f"{_SHARED}.up_proj", "ffn_up_shexp", ("mlp", "hidden"), layers="shared"),
        TensorSpec("down", f"{_SHARED}.down_proj", "ffn_down_shexp", ("hidden", "mlp"), layers="shared"),
        ROUTER,
        TensorSpec(
            "router_bias",
            "mlp.gate.e_score_correction_bias",
            "exp_probs_b.bias",
            ("experts",),
            layers="experts",
            bare_name=True,
        ),
        *(*EXPERTS, *QK_NORM),
        TensorSpec("mlp_norm", "post_attention_layernorm", "post_attention_norm", ("hidden",)),
    ),
    fused=GGUF_STACKED_EXPERTS,
    hf_keys=frozenset(
        {"attention_bias", "moe_intermediate_size", *EXPERT_COUNT_KEYS, "num_experts_per_tok", "n_shared_experts"}
        | {"routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace", "norm_topk_prob", "use_qk_norm"}
        | {"num_nextn_predict_layers", "num_mtp_layers", "output_router_logits", "router_aux_loss_coef"}
    ),
    hf_defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
    },
    hf_o_bias=False,
    partial_rotary=True,
    optional_qk_norm=True,
    hf_fields=_hf_fields,
    hf_mtp_keys=("num_nextn_predict_layers", "num_mtp_layers"),
    hf_mtp_layers=1,
    gguf_keys=frozenset(
        {"expert_feed_forward_length", "expert_shared_count", "expert_weights_scale", "expert_weights_norm"}
        | {"expert_gating_func", "leading_dense_block_count", "expert_group_count", "expert_group_used_count"}
    ),
    gguf_fields=_gguf_fields,
    gguf_mtp_key="nextn_predict_layers",
)
