"""Mistral (Jiang et al. 2023, arXiv 2310.06825): a Llama with one attention window in every layer. In GGUF it is a llama.

Mistral Small 3 is a Mistral without a window. Ministral (8B, 2024) says in layer_types which layers have it.
"""

from __future__ import annotations

from tpimpi.models.architectures.base import (
    Architecture,
    gguf_same_window,
    hf_layer_types,
    hf_window,
)
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys

_WINDOW = 4096  # positions; what transformers takes where config.json has none


def mistral_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    """The window of every layer."""
    return (hf_window(keys, _WINDOW),) * layers


def _ministral_windows(keys: Keys, layers: int) -> tuple[int, ...]:
    window, types = hf_window(keys, _WINDOW), hf_layer_types(keys, layers)
    if types is None:
        return (window,) * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in types)


MISTRAL = Architecture(
    name="mistral",
    hf_class="MistralForCausalLM",
    gguf_name="llama",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset({"sliding_window"}),
    hf_defaults={"max_position_embeddings": 131072, "num_key_value_heads": 8},
    hf_windows=mistral_windows,
    gguf_interleaves_qk=True,
    gguf_windows=gguf_same_window,
)

MINISTRAL = Architecture(
    name="ministral",
    hf_class="MinistralForCausalLM",
    gguf_name="llama",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset({"sliding_window", "layer_types"}),
    hf_defaults=MISTRAL.hf_defaults,
    hf_windows=_ministral_windows,
    gguf_interleaves_qk=True,
    gguf_windows=gguf_same_window,
)
