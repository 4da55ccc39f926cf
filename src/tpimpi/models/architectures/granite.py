"""Granite 3 and 4, dense (IBM): a Llama with multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import Architecture
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {
        "embedding_scale": keys.number("embedding_multiplier", default=1.0),
        "attention_scale": keys.number("attention_multiplier", default=1.0),
        "residual_scale": keys.number("residual_multiplier", default=1.0),
        "logit_scale": 1 / keys.number("logits_scaling", default=1.0),
    }


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    def or_1(key: str) -> float:
        """llama.cpp takes no factor where there is none, or 0."""
        return keys.number(key) if keys.values.get(keys.prefix + key) else 1.0

    scale = keys.values.get(f"{keys.prefix}attention.scale")
    return {
        "embedding_scale": or_1("embedding_scale"),
        "attention_scale": keys.number("attention.scale") if scale else 0.0,
        "residual_scale": or_1("residual_scale"),
        "logit_scale": 1 / keys.number("logit_scale"),
    }


GRANITE = Architecture(
    name="granite",
    hf_class="GraniteForCausalLM",
    gguf_name="granite",
    layer=LLAMA_LAYER,
    hf_keys=frozenset(
        {"attention_bias", "mlp_bias"}
        | {"embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"}
    ),
    hf_fields=_hf_fields,
    gguf_keys=frozenset({"embedding_scale", "attention.scale", "residual_scale", "logit_scale"}),
    gguf_interleaves_qk=True,
    gguf_fields=_gguf_fields,
)
