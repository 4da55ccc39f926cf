"""What a GGUF file says of a model, from its config: the keys that config_gguf reads, and llama.cpp's converter writes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.errors import InputError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.architectures.of_gguf import gguf_family
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_gguf import config_from_gguf
from tpimpi.models.layer_spec import RopeScaling, yarn_attention_factor
from tpimpi.models.layers.rope import rope_frequencies


def add_metadata(writer: Any, config: ModelConfig) -> None:
    """Add what `config` says to a GGUFWriter, all but name, type and tokenizer.

    Raises InputError for a model that a GGUF file cannot describe: what is read from it would be another.
    """
    writer.add_vocab_size(config.vocab)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.rotary_dims or config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    _add_scaling(writer, config)
    _add_windows(writer, config)
    _add_of_family(writer, config)
    if config.experts:
        _add_experts(writer, config)


def rope_tensors(config: ModelConfig) -> dict[str, F32]:
    """The factors of frequencies that stand as tensors, f32 [rotated elements / 2], by their names there.

    Llama 3.1's rule is what each frequency is divided by; longrope has two lists.
    """
    scaling, dims = config.rope_scaling, config.rotary_dims or config.head_dim
    if scaling is None or scaling.kind not in ("llama3", "longrope", "factors"):
        return {}
    if scaling.kind == "longrope":
        lists = {"short": scaling.factors, "long": scaling.long_factors}
        return {f"rope_factors_{name}.weight": np.array(factors, np.float32) for name, factors in lists.items()}
    if scaling.kind == "factors":
        return {"rope_freqs.weight": np.array(scaling.factors, np.float32)}
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, dims, 2) / dims)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)}


def check_metadata(writer: Any, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError where a file with this metadata and tensors of these shapes would be read as another model."""
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    names = {"rope_freqs.weight": "factors", "rope_factors_short.weight": "short", "rope_factors_long.weight": "long"}
    factors = {names[name]: values.tolist() for name, values in rope_tensors(config).items()}
    read = config_from_gguf(metadata, "the GGUF file", shapes, factors)
    mine, theirs = _comparable(config), _comparable(read)
    other = [
        field.name
        for field in fields(ModelConfig)
        if not _alike(getattr(mine, field.name), getattr(theirs, field.name))
    ]
    if not other and not _same_rope(config, read):
        other = ["rope_scaling"]
    if other:
        raise InputError(
            f"a GGUF file of a {config.architecture} cannot say this shape's {', '.join(other)}; write it --as hf"
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of a field are the same, to the digits that a quotient keeps."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-12)
    return bool(one == other)


def _comparable(config: ModelConfig) -> ModelConfig:
    """`config` with what may be said in several ways in one: of families that share a name in GGUF that of the first, no
    windows that hold all positions, numbers of scores that are those of the heads' size."""
    windows = tuple(0 if window >= config.context else window for window in config.attention_windows)
    return replace(
        config,
        architecture=gguf_family(ARCHITECTURES[config.architecture].gguf_name, mixture=bool(config.experts)).name,
        attention_windows=windows,
        attention_scale=config.attention_scale or config.head_dim**-0.5,
        local_rope_theta=config.local_rope_theta if any(windows) else 0.0,
        rope_scaling=None,
    )


def _same_rope(one: ModelConfig, other: ModelConfig) -> bool:
    """Whether the positions of every layer are turned by the same angles, to the digits of f32."""
    for mine, theirs in ((one.layer(layer).rope, other.layer(layer).rope) for layer in range(one.layers)):
        if mine is None or theirs is None:
            continue
        factors = [1.0 if rope.scaling is None else rope.scaling.attention_factor for rope in (mine, theirs)]
        growth = [0.0 if rope.scaling is None else rope.scaling.query_growth for rope in (mine, theirs)]
        frequencies = [rope_frequencies(rope, one.context) for rope in (mine, theirs)]
        if growth[0] != growth[1] or not np.allclose(factors[0], factors[1], rtol=1e-6):
            return False
        if not np.allclose(frequencies[0], frequencies[1], rtol=1e-5):
            return False
    return True


def _add_scaling(writer: Any, config: ModelConfig) -> None:
    from gguf import RopeScalingType

    scaling = config.rope_scaling
    if scaling is None:
        return
    if scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling.kind == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling.factor)
        writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
        writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)
        usual = yarn_attention_factor(scaling.factor)
        more = usual / scaling.attention_factor - 1
        if ARCHITECTURES[config.architecture].hf_query_growth and more > 0:  # llama.cpp reads it of Ministral 3 alone
            writer.add_rope_scaling_yarn_log_mul(more / (usual - 1))
        if scaling.query_growth:
            writer.add_attn_temperature_scale(scaling.query_growth)
    elif scaling.kind == "longrope":
        _add_longrope(writer, scaling)


def _add_longrope(writer: Any, scaling: RopeScaling) -> None:
    writer.add_rope_scaling_orig_ctx_len(scaling.original_context)
    writer.add_rope_scaling_attn_factors(scaling.attention_factor)


def _add_windows(writer: Any, config: ModelConfig) -> None:
    windows = [0 if window >= config.context else window for window in config.attention_windows]
    if not any(windows):
        return
    writer.add_sliding_window(max(windows))
    if not all(windows):
        writer.add_sliding_window_pattern([window > 0 for window in windows])
    if config.local_rope_theta:
        arch = ARCHITECTURES[config.architecture].gguf_name
        writer.add_float32(f"{arch}.rope.freq_base_swa", config.local_rope_theta)


def _add_experts(writer: Any, config: ModelConfig) -> None:
    from gguf import ExpertGatingFuncType

    keys = ARCHITECTURES[config.architecture].gguf_keys
    writer.add_expert_count(config.experts)
    writer.add_expert_used_count(config.experts_per_token)
    if "expert_feed_forward_length" in keys:
        writer.add_expert_feed_forward_length(config.expert_intermediate)
    if "expert_shared_count" in keys:  # a family that says all of its router
        writer.add_expert_shared_count(config.shared_intermediate // config.expert_intermediate)
        writer.add_leading_dense_block_count(len(config.dense_layers))
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config.router_scale)
        writer.add_expert_weights_norm(config.router_normalized)


def _add_of_family(writer: Any, config: ModelConfig) -> None:
    keys = ARCHITECTURES[config.architecture].gguf_keys
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if "residual_scale" in keys:
        writer.add_attention_scale(config.attention_scale)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)
        writer.add_logit_scale(1 / config.logit_scale)
        writer.add_rope_scaling_finetuned(not config.unrotated_layers)
    elif "logit_scale" in keys:
        writer.add_logit_scale(config.logit_scale)
