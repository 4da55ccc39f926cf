"""The published config.json of each family's best-known model: every key accounted for, and meant as transformers means it.

A wrong default is what tiny random models do not show. The values are those of the models' pages.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.support.rope_oracle import check_angles_and_windows
from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf, is_multimodal

FULL, SLIDING = "full_attention", "sliding_attention"


def every(period: int, layers: int) -> list[str]:
    """layer_types where every so manieth layer is full."""
    return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


_COMMON = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "transformers_version": "4.55.0"}

PUBLISHED: dict[str, dict[str, Any]] = {
    "google/gemma-3-270m": {
        **_COMMON,
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": every(6, 18),
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "torch_dtype": "bfloat16",
        "use_bidirectional_attention": False,
        "vocab_size": 262144,
    },
    "google/gemma-3-4b-it": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 255999,
        "eoi_token_index": 256000,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 256,
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 896,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
            "vision_use_head": False,
        },
    },
    "google/gemma-2-2b": {
        **_COMMON,
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "float32",
        "vocab_size": 256000,
    },
    "microsoft/Phi-3-mini-4k-instruct": {
        **_COMMON,
        "_name_or_path": "Phi-3-mini-4k-instruct",
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "attention_bias": False,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "microsoft/Phi-4-mini-instruct": {
        **_COMMON,
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config",
            "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
            "AutoTokenizer": "Xenova/gpt-4o",
        },
        "attention_bias": False,
        "bos_token_id": 199999,
        "embd_pdrop": 0.0,
        "eos_token_id": 199999,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "phi3",
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 199999,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1 + number / 4 for number in range(48)],  # of 48 numbers the two ends are the model's kind
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 200064,
    },
    "ibm-granite/granite-3.3-2b-instruct": {
        **_COMMON,
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_multiplier": 0.015625,
        "bos_token_id": 0,
        "embedding_multiplier": 12.0,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "logits_scaling": 8.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": 49159,
    },
    "HuggingFaceTB/SmolLM3-3B": {
        **_COMMON,
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": 128012,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": [FULL] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "model_type": "smollm3",
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pad_token_id": 128004,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "THUDM/GLM-4-9B-0414": {
        **_COMMON,
        "architectures": ["Glm4ForCausalLM"],
        "attention_bias": True,
        "eos_token_id": [151329, 151336, 151338],
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 13696,
        "max_position_embeddings": 32768,
        "model_type": "glm4",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 2,
        "pad_token_id": 151329,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151552,
    },
    "allenai/OLMo-2-1124-7B": {
        **_COMMON,
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 4096,
        "model_type": "olmo2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 100352,
    },
    "allenai/Olmo-3-7B-Instruct": {
        **_COMMON,
        "architectures": ["Olmo3ForCausalLM"],
        "attention_bias": False,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": every(4, 32),
        "max_position_embeddings": 65536,
        "model_type": "olmo3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 100278,
    },
    "LGAI-EXAONE/EXAONE-4.0-32B": {
        **_COMMON,
        "architectures": ["Exaone4ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 361,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 27392,
        "layer_types": every(4, 64),
        "max_position_embeddings": 131072,
        "model_type": "exaone4",
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 102400,
    },
    "CohereForAI/c4ai-command-r7b-12-2024": {
        **_COMMON,
        "architectures": ["Cohere2ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 5,
        "cache_implementation": "hybrid",
        "eos_token_id": 255001,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layer_norm_eps": 1e-05,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "max_position_embeddings": 8192,
        "model_type": "cohere2",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first",
        "pad_token_id": 0,
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "torch_dtype": "bfloat16",
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "vocab_size": 256000,
    },
    "mistralai/Mistral-Small-24B-Instruct-2501": {
        **_COMMON,
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 131072,
    },
    "mistralai/Ministral-3-3B-Instruct-2512": {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_token_index": 10,
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "attention_dropout": 0.0,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 3072,
            "initializer_range": 0.02,
            "intermediate_size": 9216,
            "max_position_embeddings": 262144,
            "model_type": "ministral3",
            "num_attention_heads": 32,
            "num_hidden_layers": 26,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 16.0,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 16384,
                "rope_theta": 1000000.0,
                "rope_type": "yarn",
                "type": "yarn",
            },
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "vocab_size": 131072,
        },
        "transformers_version": "5.0.0.dev0",
        "vision_config": {"hidden_size": 1024, "model_type": "pixtral", "num_hidden_layers": 24},
        "vision_feature_layer": -1,
    },
    "Qwen/Qwen2.5-7B-Instruct with YaRN, as its page says": {
        **_COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
}


def _theirs(values: dict[str, Any]) -> Any:
    """transformers' config of the text model."""
    import copy

    from transformers import AutoConfig

    values = copy.deepcopy({key: value for key, value in values.items() if key != "auto_map"})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return config.get_text_config()


def _ours(name: str) -> ModelConfig:
    return config_from_hf(PUBLISHED[name], name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_accounted_for(name: str) -> None:
    values = PUBLISHED[name]
    config, theirs = _ours(name), _theirs(values)
    assert config.hidden == theirs.hidden_size and config.intermediate == theirs.intermediate_size
    assert config.heads == theirs.num_attention_heads and config.kv_heads == theirs.num_key_value_heads
    assert config.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert config.layers == theirs.num_hidden_layers and config.vocab == theirs.vocab_size
    assert config.context == theirs.max_position_embeddings
    assert config.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_eps", None))
    outer = values.get("tie_word_embeddings", theirs.tie_word_embeddings)
    assert config.tied_head == outer
    # And a key that nobody knows is refused, in the text part of a multimodal config too.
    inner = values.get("text_config")
    changed = {**values, "text_config": {**inner, "twist": 2}} if inner else {**values, "twist": 2}
    with pytest.raises(ModelError, match="'twist' is 2"):
        config_from_hf(changed, name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_angles_and_windows_are_those_of_transformers(name: str) -> None:
    check_angles_and_windows(_ours(name), _theirs(PUBLISHED[name]))


def test_what_no_shape_shows() -> None:
    """Facts of the models' own code."""
    gemma3, gemma2 = _ours("google/gemma-3-270m"), _ours("google/gemma-2-2b")
    assert gemma3.embedding_scale == math.sqrt(640) and gemma2.embedding_scale == math.sqrt(2304)
    assert gemma3.activation == gemma2.activation == "gelu_tanh"
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma3.layer(0).window == 512 and gemma3.layer(5).window == 0
    assert gemma3.layer(0).rope.theta == 1e4 and gemma3.layer(5).rope.theta == 1e6  # type: ignore[union-attr]
    four = _ours("google/gemma-3-4b-it")
    assert four.layer(5).rope.scaling.factor == 8 and four.layer(0).rope.scaling is None  # type: ignore[union-attr]
    assert is_multimodal(PUBLISHED["google/gemma-3-4b-it"]) and four.attention_scale == 256**-0.5
    granite = _ours("ibm-granite/granite-3.3-2b-instruct")
    assert (granite.embedding_scale, granite.attention_scale) == (12.0, 0.015625)
    assert (granite.residual_scale, granite.logit_scale) == (0.22, 0.125)
    smollm3 = _ours("HuggingFaceTB/SmolLM3-3B")
    assert smollm3.unrotated_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35) and smollm3.tied_head
    glm4 = _ours("THUDM/GLM-4-9B-0414")
    assert glm4.rotary_dims == 64 and glm4.qkv_bias and not glm4.o_bias and glm4.post_norms and glm4.pre_norms
    olmo = _ours("allenai/Olmo-3-7B-Instruct")
    assert olmo.qk_norm_over_all and not olmo.pre_norms and olmo.post_norms and olmo.layer(0).window == 4096
    assert olmo.layer(0).rope.scaling is None and olmo.layer(3).rope.scaling.kind == "yarn"  # type: ignore[union-attr]
    exaone = _ours("LGAI-EXAONE/EXAONE-4.0-32B")
    assert not exaone.pre_norms and exaone.layer(3).rope is None and exaone.layer(2).window == 4096
    cohere = _ours("CohereForAI/c4ai-command-r7b-12-2024")
    assert cohere.parallel_blocks and cohere.norm == "layer" and cohere.logit_scale == 0.25
    assert cohere.layer(3).rope is None and cohere.layer(3).window == 0
    phi = _ours("microsoft/Phi-4-mini-instruct")
    assert phi.rotary_dims == 96 and phi.rope_scaling is not None
    assert phi.rope_scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    ministral = _ours("mistralai/Ministral-3-3B-Instruct-2512")
    assert ministral.rope_scaling is not None and ministral.rope_scaling.query_growth == 0.1
    assert ministral.rope_scaling.attention_factor == 1.0
