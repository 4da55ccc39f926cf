"""Known models' shapes, for weights made up by `synth`: what config_hf reads of their published config.json files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpimpi.errors import InputError, ModelError, shorten_path
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf
from tpimpi.models.keys import MAX_LAYERS

_LLAMA_3_1_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_MAX_CONFIG_BYTES = 1 << 20  # of a config.json


def _shape(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int, **more: Any
) -> dict[str, Any]:
    """A config.json: a Llama unless `more` says otherwise."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        **more,
    }


def _llama_3_1(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    more = {"rope_theta": 500000.0, "rope_scaling": _LLAMA_3_1_ROPE}
    return _shape(hidden, intermediate, layers, heads, 8, 128256, 131072, **more)


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return _shape(
        *(2880, 2880, layers, 64, 8, 201088, 131072),
        architectures=["GptOssForCausalLM"],
        model_type="gpt_oss",
        attention_bias=True,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        layer_types=["sliding_attention", "full_attention"] * (layers // 2),
        sliding_window=128,
        swiglu_limit=7.0,
        rope_theta=150000.0,
        rope_scaling={
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    )


def _gemma_3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    family = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    }
    return _shape(hidden, intermediate, layers, heads, kv_heads, **{**family, **more})


_SMALL_GEMMA_3 = {"vocab": 262144, "context": 32768, "sliding_window": 512}
_LARGE_GEMMA_3 = {
    "vocab": 262208,
    "context": 131072,
    "sliding_window": 1024,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
# Of Phi-4-mini's frequencies, in contexts beyond 4096 positions.
_PHI_4_MINI_FACTORS = (
    *(1.0, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898),
    *(2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424),
    *(6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252),
    *(16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6),
    *(32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77),
)

SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama-1.1b": _shape(2048, 5632, 22, 32, 4, 32000, 2048),
    "open-llama-3b": _shape(3200, 8640, 26, 32, 32, 32000, 2048),
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama-2-70b": _shape(8192, 28672, 80, 64, 8, 32000, 4096),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3-70b": _shape(8192, 28672, 80, 64, 8, 128256, 8192, rope_theta=500000.0),
    "llama-3.1-8b": _llama_3_1(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama_3_1(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama_3_1(16384, 53248, 126, 128),
    "yi-34b": _shape(7168, 20480, 60, 56, 8, 64000, 4096, rope_theta=5000000.0),
    "qwen2.5-72b": _shape(
        *(8192, 29568, 80, 64, 8, 152064, 131072),
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        rope_theta=1000000.0,
    ),
    "llama-3.2-1b": _shape(
        *(2048, 8192, 16, 32, 8, 128256, 131072),
        head_dim=64,
        rope_theta=500000.0,
        rope_scaling={**_LLAMA_3_1_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "qwen3-4b": _shape(
        *(2560, 9728, 36, 32, 8, 151936, 40960),
        architectures=["Qwen3ForCausalLM"],
        model_type="qwen3",
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
        tie_word_embeddings=True,
    ),
    "gemma-3-270m": _gemma_3(640, 2048, 18, 4, 1, **_SMALL_GEMMA_3),
    "gemma-3-1b": _gemma_3(1152, 6912, 26, 4, 1, **_SMALL_GEMMA_3),
    "gemma-3-4b": _gemma_3(2560, 10240, 34, 8, 4, **_LARGE_GEMMA_3),
    "gemma-3-12b": _gemma_3(3840, 15360, 48, 16, 8, **_LARGE_GEMMA_3),
    "phi-4-mini": _shape(
        *(3072, 8192, 32, 24, 8, 200064, 131072),
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        sliding_window=262144,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [*_PHI_4_MINI_FACTORS]},
        tie_word_embeddings=True,
        pad_token_id=199999,
    ),
    "granite-3.3-8b": _shape(
        *(4096, 12800, 40, 32, 8, 49159, 131072),
        architectures=["GraniteForCausalLM"],
        model_type="granite",
        rope_theta=10000000.0,
        embedding_multiplier=12.0,
        attention_multiplier=0.0078125,
        residual_multiplier=0.22,
        logits_scaling=16.0,
        tie_word_embeddings=True,
    ),
    "smollm3-3b": _shape(
        *(2048, 11008, 36, 16, 4, 128256, 65536),
        architectures=["SmolLM3ForCausalLM"],
        model_type="smollm3",
        no_rope_layer_interval=4,
        rms_norm_eps=1e-6,
        rope_theta=5000000.0,
        tie_word_embeddings=True,
    ),
    "glm-4-9b": _shape(
        *(4096, 13696, 40, 32, 2, 151552, 32768),
        architectures=["Glm4ForCausalLM"],
        model_type="glm4",
        attention_bias=True,
        head_dim=128,
        partial_rotary_factor=0.5,
    ),
    "olmo-2-7b": _shape(
        *(4096, 11008, 32, 32, 32, 100352, 4096),
        architectures=["Olmo2ForCausalLM"],
        model_type="olmo2",
        rms_norm_eps=1e-6,
        rope_theta=500000.0,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "qwen3-30b-a3b": _shape(
        *(2048, 6144, 48, 32, 4, 151936, 40960),
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        head_dim=128,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "mixtral-8x7b": _shape(
        *(4096, 14336, 32, 32, 8, 32000, 32768),
        architectures=["MixtralForCausalLM"],
        model_type="mixtral",
        num_local_experts=8,
        num_experts_per_tok=2,
        rope_theta=1000000.0,
    ),
    "glm-4.5-air": _shape(
        *(4096, 10944, 46, 96, 8, 151552, 131072),
        architectures=["Glm4MoeForCausalLM"],
        model_type="glm4_moe",
        attention_bias=True,
        head_dim=128,
        partial_rotary_factor=0.5,
        moe_intermediate_size=1408,
        n_routed_experts=128,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=1,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,  # as published 1; no such layer is made up
        rope_theta=1000000.0,
    ),
    "mistral-small-24b": _shape(
        *(5120, 32768, 40, 32, 8, 131072, 32768),
        architectures=["MistralForCausalLM"],
        model_type="mistral",
        head_dim=128,
        rope_theta=100000000.0,
        sliding_window=None,
    ),
}


@dataclass(frozen=True)
class Shape:
    """A model without its weights: its name, its config.json as it is read, and what that means."""

    name: str
    values: dict[str, Any]
    config: ModelConfig


def load_shape(wanted: str, layers: int | None = None) -> Shape:
    """The shape that `--shape` names: one of SHAPES, or a config.json, or a folder that holds one.

    It has `layers` layers in place of its own, its layer_types repeated; None: as published. Raises InputError for a name
    that is not known or a bad `layers`, ModelError for a file that cannot be read, or a model that cannot be computed.
    """
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        raise InputError(f"--layers is {layers}, must be 1 to {MAX_LAYERS}")
    if wanted in SHAPES:
        name, values, where = wanted, dict(SHAPES[wanted]), f"shape {wanted}"
    else:
        path = _config_path(wanted)
        name, values, where = path.resolve().parent.name or "model", _read(path), str(path)
    if layers is not None:
        config_from_hf(values, where)  # so that what is wrong is said of the file, not of our change to it
        values["num_hidden_layers"] = layers
        if isinstance(values.get("layer_types"), list):
            values["layer_types"] = [
                values["layer_types"][layer % len(values["layer_types"])] for layer in range(layers)
            ]
        name = f"{name}-{layers}-layer{'s' if layers > 1 else ''}"
    return Shape(name, values, config_from_hf(values, where))


def _config_path(wanted: str) -> Path:
    try:
        path = Path(wanted).expanduser()
        if path.is_dir():
            path /= "config.json"
        if path.is_file():
            return path
    except (OSError, ValueError, RuntimeError):  # no path at all: too long, a NUL, an unknown home
        pass
    raise InputError(
        f"--shape is {shorten_path(wanted)!r}, must be one of {', '.join(SHAPES)}, or the path of a config.json (or of "
        "its folder)"
    )


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; let your user read it") from error
    if len(data) > _MAX_CONFIG_BYTES:
        raise ModelError(f"{path}: is longer than {_MAX_CONFIG_BYTES >> 20} MiB; give a model's config.json")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); give a model's config.json") from error
