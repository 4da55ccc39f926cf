"""Tiny random models of every architecture, written the way transformers writes them.

Weights are drawn wide enough that logits differ by tenths, and norms and biases are random too: a norm that is
forgotten, or a bias that is added twice, must show in the numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
GROWTH = {"llama_4_scaling_beta": 0.3}  # the queries from position 32 on grow
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}  # low, so that they show

# kind -> (model_type, what differs from SMALL)
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4, "num_hidden_layers": 3}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    # 5 x 20 = 100 is neither the hidden size nor a multiple of 32; nor are 70 and 90.
    "llama-odd": (
        "llama",
        {
            "hidden_size": 70,
            "intermediate_size": 90,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 20,
        },
    ),
    "smollm": (
        "llama",
        {
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        },
    ),
    "yi": (
        "llama",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 7, "num_hidden_layers": 3}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 3},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "llama-yarn": ("llama", {"rope_parameters": YARN_ROPE}),
    "qwen3-yarn": ("qwen3", {"head_dim": 32, "rope_parameters": {**YARN_ROPE, "attention_factor": 1.25}}),
    "ministral": (
        "ministral",
        {"sliding_window": 7, "head_dim": 24, "num_hidden_layers": 3, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "ministral3": (
        "ministral3",
        {"head_dim": 24, "rope_parameters": {**YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.5, **GROWTH}},
    ),
    "gemma2": (
        "gemma2",
        {
            "tie_word_embeddings": True,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 3,
            "sliding_window": 7,
            **GEMMA_CAPS,
        },
    ),
    # A scale of scores that is not that of the heads' size, which GGUF cannot say.
    "gemma2-scale": (
        "gemma2",
        {"tie_word_embeddings": True, "head_dim": 24, "query_pre_attn_scalar": 40, "attn_logit_softcapping": None},
    ),
    # Layers 0, 1, 3 and 4 have the window; the global one a scaled rope.
    "gemma3": (
        "gemma3_text",
        {
            "tie_word_embeddings": True,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "num_hidden_layers": 5,
            "sliding_window": 7,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING],
            "rope_parameters": {
                FULL: {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
                SLIDING: {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "phi3": ("phi3", {"sliding_window": 9, "pad_token_id": 0}),
    "phi3-long": (
        "phi3",
        {
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 8.0],
            },
        },
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "attention_bias": True,
        },
    ),
    # Dense: attention in every layer, no experts; the feed-forward block is that of the "shared" expert.
    "granite4": (
        "granitemoehybrid",
        {
            "shared_intermediate_size": 80,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": [FULL, FULL],
            "position_embedding_type": "rope",
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "smollm3": (
        "smollm3",
        {"num_hidden_layers": 4, "pad_token_id": 0, "tie_word_embeddings": True},
    ),
    "glm": ("glm", {"head_dim": 16, "attention_bias": True, "pad_token_id": 0}),
    "glm-edge": ("glm", {"head_dim": 16, "attention_bias": False, "partial_rotary_factor": 1.0, "pad_token_id": 0}),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True, "pad_token_id": 0}),
    "exaone4": (
        "exaone4",
        {"head_dim": 24, "num_hidden_layers": 3, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]},
    ),
    "exaone4-full": ("exaone4", {"sliding_window": None, "layer_types": [FULL, FULL]}),
    "cohere2": (
        "cohere2",
        {
            "num_hidden_layers": 3,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "logit_scale": 0.5,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {"num_attention_heads": 8, "num_key_value_heads": 2, "pad_token_id": 0}),
    "olmo3": (
        "olmo3",
        {
            "num_hidden_layers": 3,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "pad_token_id": 0,
            "rope_parameters": {FULL: YARN_ROPE, SLIDING: {"rope_type": "default", "rope_theta": 500.0}},
        },
    ),
    "granite4-nope": (
        "granitemoehybrid",
        {
            "shared_intermediate_size": 80,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "layer_types": [FULL, FULL],
            "position_embedding_type": None,
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    # In GGUF all layers of a Qwen3-MoE have experts.
    "qwen3-moe-all": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "intermediate_size": 64,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 7,
            "rope_parameters": {**YARN_ROPE, "truncate": False},
        },
    ),
    # A limit that shows, which GGUF cannot say.
    "gpt-oss-limit": (
        "gpt_oss",
        {
            "head_dim": 16,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 7,
            "swiglu_limit": 1.5,
        },
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False, "pad_token_id": 0},
    ),
    "granite-moe": (
        "granitemoe",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 64,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    # Without norms of queries and keys; the weights of the chosen are not made to sum to 1.
    "glm4-moe-bare": (
        "glm4_moe",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_shared_experts": 1,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
    ),
    "mqa": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 1}),
}


def write_tiny_hf(
    directory: Path | str,
    kind: str,
    seed: int = 0,
    *,
    dtype: str = "float32",
    max_shard_size: str | int | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model of this kind as a Hugging Face directory (config.json, safetensors) and return it.

    `overrides` are config keys; `max_shard_size` in bytes (or "20KB") gives a sharded checkpoint with its index.
    The same kind, seed and overrides give the same numbers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = TINY[kind]
    config = AutoConfig.for_model(model_type, **{**SMALL, **changes, **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    # A Gemma holds its norms less 1.
                    parameter.uniform_(0.5, 1.5).sub_(1.0 if model_type.startswith("gemma") else 0.0)
                elif any(part in name for part in (".experts.", "mlp.gate.", "router.", "sinks")):
                    parameter.normal_(0.0, 0.3)  # so that a choice that is wrong shows
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.3)
                elif "embed_tokens" in name or "lm_head" in name:
                    # A wide tied embedding would make every token predict itself.
                    parameter.normal_(0.0, 0.1 if config.tie_word_embeddings else 0.3)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0.0, 0.3)
    model = model.to(getattr(torch, dtype))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sharding = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(directory, **sharding)
    return directory


def slice_tiny(folder: Path, kind: str, ranks: int) -> Path:
    """Slices of such a model in f32, equal for so many ranks, in `folder`/KIND; without a tokenizer."""
    path = write_tiny_hf(folder / "models" / kind, kind)
    (path / "tokenizer.json").write_text("{}")
    with open_source(path) as source:
        slice_model(source, make_partition(source.config, [1] * ranks), choose_formats(source, "f32"), folder / kind)
    return folder / kind
