"""Ministral 3 (Mistral AI 2025), and Mistral Small 3.1 in GGUF: a Mistral whose queries grow with their position."""

from __future__ import annotations

from tpimpi.models.architectures.base import Architecture, gguf_same_window, hf_window
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    return (hf_window(keys, None),) * layers


MINISTRAL3 = Architecture(
    name="ministral3",
    hf_class="Ministral3ForCausalLM",
    gguf_name="mistral3",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset({"sliding_window"}),
    hf_defaults={
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
    },
    hf_query_growth=True,
    hf_windows=_windows,
    gguf_keys=frozenset({"attention.temperature_scale"}),
    gguf_interleaves_qk=True,
    gguf_windows=gguf_same_window,
)
