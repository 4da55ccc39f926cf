"""Qwen2 and Qwen2.5 (Yang et al. 2024, arXiv 2407.10671): a Llama with biases on Q, K and V, and windows in some layers."""

from __future__ import annotations

from tpimpi.errors import ModelError
from tpimpi.models.architectures.base import Architecture, hf_layer_types
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys, show

QWEN_WINDOW_KEYS = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

# What transformers takes where config.json has no such key.
_WINDOW = 4096  # positions
_MAX_WINDOW_LAYERS = 28


def qwen_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """The windows of Qwen2 and Qwen3: in the layers that layer_types names, or from layer max_window_layers on."""
    values, path = keys.values, keys.path
    window = 0
    if keys.flag("use_sliding_window") and values.get("sliding_window", 0) is not None:
        window = keys.integer("sliding_window", default=_WINDOW)
    types = hf_layer_types(keys, layers)
    if types is None:
        first = values.get("max_window_layers", _MAX_WINDOW_LAYERS)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise ModelError(f"{path}: max_window_layers is {show(first)}; a whole number, 0 or more, is needed")
        return tuple(window if layer >= first else 0 for layer in range(layers))
    for layer, kind in enumerate(types):
        if kind == "sliding_attention" and not window:
            raise ModelError(
                f"{path}: layer_types[{layer}] is 'sliding_attention', but there is no window "
                f"(use_sliding_window is {show(values.get('use_sliding_window'))}, sliding_window is "
                f"{show(values.get('sliding_window'))}); a window, or 'full_attention', is needed"
            )
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


QWEN2 = Architecture(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    gguf_name="qwen2",
    layer_tensors=LLAMA_LAYER,
    always_qkv_bias=True,
    hf_keys=QWEN_WINDOW_KEYS,
    hf_defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32},
    hf_windows=qwen_windows,
)
