"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): a Llama with a norm over each query and key head, and Qwen2's windows."""

from __future__ import annotations

from tpimpi.models.architectures.base import ATTENTION, ATTENTION_NORM, MLP, MLP_NORM, QK_NORM, Architecture
from tpimpi.models.architectures.qwen2 import QWEN_WINDOW_KEYS, qwen_windows

QWEN3 = Architecture(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    gguf_name="qwen3",
    layer_tensors=(ATTENTION_NORM, *ATTENTION, *MLP, *QK_NORM, MLP_NORM),
    hf_keys=QWEN_WINDOW_KEYS | {"attention_bias"},
    hf_defaults={"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    hf_windows=qwen_windows,
)
