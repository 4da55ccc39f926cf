"""Llama 1 to 3 (Touvron et al. 2023, arXiv 2302.13971), and what is published as a Llama: SmolLM2, Yi, TinyLlama."""

from __future__ import annotations

from tpimpi.models.architectures.base import (
    ATTENTION,
    ATTENTION_NORM,
    MLP,
    MLP_NORM,
    Architecture,
    gguf_same_window,
)

LLAMA_LAYER = (ATTENTION_NORM, *ATTENTION, *MLP, MLP_NORM)

LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    gguf_name="llama",
    layer_tensors=LLAMA_LAYER,
    hf_keys=frozenset({"attention_bias", "mlp_bias"}),
    gguf_interleaves_qk=True,
    gguf_windows=gguf_same_window,
)
