"""SmolLM3 (Hugging Face 2025): a Llama in which every fourth layer has no positions."""

from __future__ import annotations

from typing import Any

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import Architecture, hf_layer_types
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys, show

_INTERVAL = 4


def _without_positions(layers: int, interval: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)


def _hf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    rotated = keys.values.get("no_rope_layers")  # 1 in layers that have a rope, whatever the name
    if rotated is None:
        interval = keys.integer("no_rope_layer_interval", default=_INTERVAL)
        return {"unrotated_layers": _without_positions(layers, interval)}
    if not isinstance(rotated, list) or len(rotated) != layers or any(flag not in (0, 1) for flag in rotated):
        raise ModelError(
            f"{keys.path}: no_rope_layers is {show(rotated)}; a list of {layers} numbers, 0 or 1, is needed"
        )
    return {"unrotated_layers": tuple(layer for layer, flag in enumerate(rotated) if not flag)}


def _gguf_fields(keys: Keys, layers: int) -> dict[str, Any]:
    return {"unrotated_layers": _without_positions(layers, _INTERVAL)}


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """transformers gives a window to the layers without positions; no published model has one."""
    if not keys.flag("use_sliding_window"):
        return (0,) * layers
    window, types = keys.integer("sliding_window"), hf_layer_types(keys, layers)
    unrotated = _hf_fields(keys, layers)["unrotated_layers"]
    if types is None:
        return tuple(window if layer in unrotated else 0 for layer in range(layers))
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


SMOLLM3 = Architecture(
    name="smollm3",
    hf_class="SmolLM3ForCausalLM",
    gguf_name="smollm3",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset(
        {"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", "layer_types"}
        | {"use_sliding_window", "sliding_window", "max_window_layers"}
    ),
    hf_defaults={
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    hf_windows=_windows,
    hf_fields=_hf_fields,
    gguf_interleaves_qk=True,
    gguf_fields=_gguf_fields,
)
