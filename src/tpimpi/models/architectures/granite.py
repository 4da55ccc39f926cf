"""Granite 3 and 4, dense (IBM): a Llama with multipliers of embeddings, scores, residuals and logits.

Granite 4 is published as a hybrid (GraniteMoeHybrid); the dense ones have attention in every layer and no experts. In GGUF
those are of architecture granite, as Granite 3.
"""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    MLP,
    MLP_NORM,
    Architecture,
    FusedSpec,
    TensorSpec,
)
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys, show


def granite_hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    """Granite's factors, as fields of ModelConfig, from config.json."""
    return {
        "embedding_scale": keys.number("embedding_multiplier", default=1.0),
        "attention_scale": keys.number("attention_multiplier", default=1.0),
        "residual_scale": keys.number("residual_multiplier", default=1.0),
        "logit_scale": 1 / keys.number("logits_scaling", default=1.0),
    }


def granite_gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    """The same, and which layers have no rope, from GGUF's metadata."""

    def or_1(key: str) -> float:
        """llama.cpp takes no factor where there is none, or 0."""
        return keys.number(key) if keys.values.get(keys.prefix + key) else 1.0

    scale = keys.values.get(f"{keys.prefix}attention.scale")
    rotated = keys.flag(
        "rope.scaling.finetuned", default=True
    )  # llama.cpp: of a Granite this key says whether there is a rope
    return {
        "unrotated_layers": () if rotated else tuple(range(layers)),
        "embedding_scale": or_1("embedding_scale"),
        "attention_scale": keys.number("attention.scale") if scale else 0.0,
        "residual_scale": or_1("residual_scale"),
        "logit_scale": 1 / keys.number("logit_scale"),
    }


def _hybrid_hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    """As a Granite; ModelError for a model with experts, or with other layers than attention."""
    path = keys.path
    if (experts := keys.values.get("num_local_experts", _EXPERTS)) != 0:
        raise ModelError(
            f"{path}: num_local_experts is {show(experts)}: a mixture of experts, which tpimpi does not compute; 0 is needed"
        )
    types = keys.values.get("layer_types")
    if not isinstance(types, list) or len(types) != layers:
        raise ModelError(
            f"{path}: layer_types is {show(types)}; 'attention' for each of {layers} layers (num_hidden_layers) is needed"
        )
    for layer, kind in enumerate(types):
        if kind not in ("attention", "full_attention"):
            raise ModelError(
                f"{path}: layer_types[{layer}] is {show(kind)}, which tpimpi does not compute; 'attention' is needed"
            )
    if (norm := keys.values.get("normalization_function", "rmsnorm")) != "rmsnorm":
        raise ModelError(f"{path}: normalization_function is {show(norm)}; tpimpi computes only 'rmsnorm'")
    rotated = keys.values.get("position_embedding_type") == "rope"
    return {**granite_hf_fields(keys, layers), "unrotated_layers": () if rotated else tuple(range(layers))}


_EXPERTS = 8  # what transformers takes where config.json says nothing
GRANITE_MULTIPLIERS = frozenset(
    {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}
)
GRANITE_GGUF_KEYS = frozenset({"embedding_scale", "attention.scale", "residual_scale", "logit_scale"})
# Of the layers that a dense model has none of.
_HYBRID_KEYS = frozenset(
    {f"mamba_{name}" for name in ("n_heads", "n_groups", "d_state", "d_head", "d_conv", "expand", "chunk_size")}
    | {
        "mamba_conv_bias",
        "mamba_proj_bias",
        "time_step_limit",
        "num_experts_per_tok",
        "router_aux_loss_coef",
        "init_method",
    }
)

GRANITE = Architecture(
    name="granite",
    hf_class="GraniteForCausalLM",
    gguf_name="granite",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset({"attention_bias", "mlp_bias"}) | GRANITE_MULTIPLIERS,
    hf_fields=granite_hf_fields,
    # The keys of a hybrid's other layers stand in files of dense models too, which have no tensors of such layers.
    gguf_keys=GRANITE_GGUF_KEYS
    | frozenset(
        {"expert_shared_feed_forward_length"}
        | {f"ssm.{name}" for name in ("conv_kernel", "state_size", "group_count", "inner_size", "time_step_rank")}
    ),
    gguf_interleaves_qk=True,
    gguf_fields=granite_gguf_fields,
)

GRANITE_HYBRID = Architecture(
    name="granitemoehybrid",
    hf_class="GraniteMoeHybridForCausalLM",
    gguf_name="granite",
    layer_tensors=(
        *(ATTENTION_NORM, *ATTENTION, *MLP[:2]),
        TensorSpec("down", "shared_mlp.output_linear", "ffn_down", ("hidden", "mlp")),
        MLP_NORM,
    ),
    fused=(FusedSpec("shared_mlp.input_linear", None, ("gate", "up")),),
    hf_keys=frozenset({"attention_bias", "shared_intermediate_size", "num_local_experts", "layer_types"})
    | {"position_embedding_type", "normalization_function"}
    | GRANITE_MULTIPLIERS
    | _HYBRID_KEYS,
    hf_defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "shared_intermediate_size": 1024,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    hf_intermediate_key="shared_intermediate_size",
    hf_fields=_hybrid_hf_fields,
    gguf_keys=GRANITE.gguf_keys,
    gguf_interleaves_qk=True,
    gguf_fields=granite_gguf_fields,
)
