"""Mistral (Jiang et al. 2023, arXiv 2310.06825): a Llama with one attention window in every layer. In GGUF it is a llama."""

from __future__ import annotations

from tpimpi.models.architectures.base import Architecture
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys

_WINDOW = 4096  # positions; what transformers takes where config.json has none


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    if keys.values.get("sliding_window", 0) is None:
        return (0,) * layers
    return (keys.integer("sliding_window", default=_WINDOW),) * layers


MISTRAL = Architecture(
    name="mistral",
    hf_class="MistralForCausalLM",
    gguf_name="llama",
    layer=LLAMA_LAYER,
    hf_keys=frozenset({"sliding_window"}),
    hf_context=131072,
    hf_kv_heads=8,
    hf_windows=_windows,
    gguf_interleaves_qk=True,
    gguf_has_windows=True,
)
