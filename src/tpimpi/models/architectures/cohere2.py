"""Command R7B (Cohere 2024): attention and feed-forward read one LayerNorm and are added together; logits are scaled.

Three of four layers have a window and a rope in which neighbours are paired, the fourth has neither.
"""

from __future__ import annotations

from typing import Any

from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    GGUF_PATTERN,
    MLP,
    Architecture,
    gguf_periodic_windows,
    hf_windows_of_types,
)
from tpimpi.models.keys import Keys

_hf_windows = hf_windows_of_types(4096, 4, "sliding_window_pattern")
_gguf_windows = gguf_periodic_windows(4)


def _fields(windows: tuple[int, ...], logit_scale: float) -> dict[str, Any]:
    return {
        "norm": "layer",
        "parallel_blocks": True,
        "logit_scale": logit_scale,
        "unrotated_layers": tuple(layer for layer, window in enumerate(windows) if not window),
    }


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return _fields(_hf_windows(keys, layers), keys.number("logit_scale", default=0.0625))


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return _fields(_gguf_windows(keys, layers), keys.number("logit_scale"))


COHERE2 = Architecture(
    name="cohere2",
    hf_class="Cohere2ForCausalLM",
    gguf_name="cohere2",
    layer_tensors=(ATTENTION_NORM, *ATTENTION, *MLP),
    # Of the keys that every published file has, and that say what transformers does in any case.
    hf_keys=frozenset(
        {"attention_bias", "sliding_window", "sliding_window_pattern", "layer_types", "logit_scale", "layer_norm_eps"}
        | {
            "position_embedding_type",
            "rotary_pct",
            "order_of_interleaved_layers",
            "use_embedding_sharing",
            "use_gated_activation",
        }
        | {"use_parallel_block", "use_parallel_embedding", "layer_switch", "cache_implementation"}
    ),
    hf_defaults={
        "vocab_size": 256000,
        "hidden_size": 8192,
        "intermediate_size": 22528,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    hf_norm_eps_key="layer_norm_eps",
    hf_windows=_hf_windows,
    hf_fields=_hf_fields,
    hf_interleaves_qk=True,
    gguf_keys=frozenset({"logit_scale", "attention.layer_norm_epsilon", GGUF_PATTERN}),
    gguf_norm_eps_key="attention.layer_norm_epsilon",
    gguf_interleaves_qk=True,
    gguf_windows=_gguf_windows,
    gguf_fields=_gguf_fields,
)
