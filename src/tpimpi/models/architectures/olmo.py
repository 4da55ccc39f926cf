"""OLMo 2 and 3 (Allen AI 2024, arXiv 2501.00656; 2025): norms after the blocks only, and over all heads of Q and of K.

OLMo 3 has a window in three of four layers, whose rope is not scaled. In GGUF it is an olmo2.
"""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import (
    ATTENTION,
    GGUF_PATTERN,
    MLP,
    Architecture,
    TensorSpec,
    gguf_periodic_windows,
    gguf_window,
    hf_windows_of_types,
)
from tpimpi.models.architectures.gemma import POST_NORMS
from tpimpi.models.keys import Keys

QK_NORM_OVER_ALL = (
    TensorSpec("q_norm", "self_attn.q_norm", "attn_q_norm", ("queries",)),
    TensorSpec("k_norm", "self_attn.k_norm", "attn_k_norm", ("keys",)),
)
_LAYER = (*ATTENTION, *MLP, *QK_NORM_OVER_ALL, *POST_NORMS)
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-5,
}


def _fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {"pre_norms": False, "post_norms": True, "qk_norm_over_all": True}


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    local = 0.0
    if gguf_window(keys):
        local = keys.number("rope.freq_base_swa", default=keys.number("rope.freq_base", default=10000.0))
    return {**_fields(keys, layers), "local_rope_theta": local}


OLMO2 = Architecture(
    name="olmo2",
    hf_class="Olmo2ForCausalLM",
    gguf_name="olmo2",
    layer_tensors=_LAYER,
    hf_keys=frozenset({"attention_bias"}),
    hf_defaults=_DEFAULTS,
    hf_fields=_fields,
    gguf_keys=frozenset({"rope.freq_base_swa", GGUF_PATTERN}),
    gguf_windows=gguf_periodic_windows(4),
    gguf_fields=_gguf_fields,
)

OLMO3 = Architecture(
    name="olmo3",
    hf_class="Olmo3ForCausalLM",
    gguf_name="olmo2",
    layer_tensors=_LAYER,
    hf_keys=frozenset({"attention_bias", "sliding_window", "layer_types"}),
    hf_defaults={**_DEFAULTS, "rope_theta": 500000.0},
    hf_rope_by_layer=True,
    hf_windows=hf_windows_of_types(4096, 4),
    hf_fields=_fields,
    gguf_keys=OLMO2.gguf_keys,
    gguf_windows=OLMO2.gguf_windows,
    gguf_fields=_gguf_fields,
)
