"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv 2404.14219; 2412.08905): a Llama whose files hold Q, K and V as one matrix, and
gate and up as one; the small ones rotate part of a head (Phi-4-mini), and stretch contexts by short and long factors."""

from __future__ import annotations

from tpimpi.models.architectures.base import FUSED_GATE_UP, Architecture, FusedSpec, gguf_same_window, hf_window
from tpimpi.models.architectures.llama import LLAMA_LAYER
from tpimpi.models.keys import Keys


def _windows(keys: Keys, layers: int) -> tuple[int, ...]:
    return (hf_window(keys, None),) * layers


PHI3 = Architecture(
    name="phi3",
    hf_class="Phi3ForCausalLM",
    gguf_name="phi3",
    layer_tensors=LLAMA_LAYER,
    fused=(FusedSpec("self_attn.qkv_proj", "attn_qkv", ("q", "k", "v")), FUSED_GATE_UP),
    # auto_map says where the code of the model is, which transformers has; it reads neither of the last two.
    hf_keys=frozenset(
        {"auto_map", "original_max_position_embeddings", "sliding_window", "full_attn_mod", "interpolate_factor"}
    ),
    hf_defaults={
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    partial_rotary=True,
    hf_rope_names={"su": "longrope", "yarn": "longrope"},
    hf_windows=_windows,
    gguf_windows=gguf_same_window,
)
