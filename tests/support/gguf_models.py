"""A Hugging Face folder written as a GGUF file, as llama.cpp's converter does: the names are those of the gguf package, the
keys and what is done to the tensors are the facts of convert_hf_to_gguf.py, family by family.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

from tests.support.sources_cases import permute

# model_type of config.json -> general.architecture
ARCHITECTURES = {
    **{
        name: name
        for name in ("llama", "qwen2", "qwen3", "gemma2", "phi3", "granite", "smollm3", "glm4", "exaone4", "cohere2")
    },
    # Files of a Ministral 8B are converted as those of a Mistral: MinistralForCausalLM itself has no converter.
    "mistral": "llama",
    "ministral3": "mistral3",
    "glm": "chatglm",
    "granitemoehybrid": "granite",  # where no layer is a Mamba's
    "gemma3_text": "gemma3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
    "gpt_oss": "gpt-oss",
    "olmoe": "olmoe",
    "granitemoe": "granitemoe",
    "glm4_moe": "glm4moe",
}
_PERMUTED = ("llama", "granite", "granitemoe", "smollm3", "mistral3")  # rows of Q and K
_NORMS_PLUS_1 = ("gemma2", "gemma3")


def write_gguf_of(folder: Path, path: Path, *, fused: bool = False) -> Path:
    """Write the model in `folder`, one safetensors file in f32, as `path`; returns it.

    `fused`: Q, K and V of a GLM are one matrix with one bias, as in files that were converted from THUDM/glm-4-9b.
    """
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, arch)
    _metadata(writer, arch, config)
    number = next(number for number, word in gguf.MODEL_ARCH_NAMES.items() if word == arch)
    names = gguf.get_tensor_name_map(number, _blocks(config))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    tensors = _stacked(_as_converted(load_file(folder / "model.safetensors")))
    for name, values in (_fused(tensors) if fused else tensors).items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if arch == "glm4moe" and name.endswith("shared_head.norm.weight"):
            stored = f"blk.{config['num_hidden_layers']}.nextn.shared_head_norm.weight"
        assert stored is not None, name
        rows = values
        if arch in _PERMUTED and (".q_proj." in name or ".k_proj." in name):
            rows = permute(values, heads if ".q_proj." in name else kv_heads)
        if arch in _NORMS_PLUS_1 and name.endswith("norm.weight"):
            rows = values + np.float32(1)
        writer.add_tensor(stored, np.ascontiguousarray(rows), raw_dtype=gguf.GGMLQuantizationType.F32)
    for stored, factors in _rope_tensors(config).items():
        writer.add_tensor(stored, factors, raw_dtype=gguf.GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_converted(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The matrices by the names and as the parts that the converter makes of them: of a Granite 4 and of Granite's and
    gpt-oss's stacks of experts."""
    made = {}
    for name, values in tensors.items():
        stem, _, part = name.rpartition(".")
        if name.endswith(("shared_mlp.input_linear.weight", "block_sparse_moe.input_linear.weight")):
            where = "mlp" if "shared" in name else "mlp.experts"
            for own, rows in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
                made[f"{stem.rpartition('.')[0].rpartition('.')[0]}.{where}.{own}_proj.weight"] = rows
        elif name.endswith(("shared_mlp.output_linear.weight", "block_sparse_moe.output_linear.weight")):
            where = "mlp" if "shared" in name else "mlp.experts"
            made[f"{stem.rpartition('.')[0].rpartition('.')[0]}.{where}.down_proj.weight"] = values
        elif part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):  # of gpt-oss
            kind = "bias" if part.endswith("_bias") else "weight"
            rows = values if kind == "bias" else values.swapaxes(1, 2)
            parts = {"gate": rows[:, ::2], "up": rows[:, 1::2]} if part.startswith("gate") else {"down": rows}
            made |= {f"{stem}.{own}_proj.{kind}": numbers for own, numbers in parts.items()}
        elif part == "sinks":
            made[f"{name}.weight"] = values
        else:
            made[name.replace("e_score_correction_bias", "e_score_correction.bias")] = values
    return made


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Experts that are one by one as one tensor."""
    made, stacks = {}, {}
    for name, values in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight", name)
        if match:
            part = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.get(match[3], match[3])
            stacks.setdefault(f"{match[1]}mlp.experts.{part}.weight", {})[int(match[2])] = values
        else:
            made[name] = values
    return {**made, **{name: np.stack([stack[e] for e in sorted(stack)]) for name, stack in stacks.items()}}


def _blocks(config: dict[str, Any]) -> int:
    """The layers of a file: of a GLM-4.5 also those that predict further tokens."""
    return config["num_hidden_layers"] + (
        config["num_nextn_predict_layers"] if config["model_type"] == "glm4_moe" else 0
    )


def _fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Q, K and V as one matrix."""
    made = {name: values for name, values in tensors.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in (name for name in tensors if ".q_proj." in name):
        parts = [tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        made[name.replace(".q_proj.", ".qkv_proj.")] = np.concatenate(parts)
    return made


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rope of full attention."""
    rope = config.get("rope_parameters") or {}
    return rope.get("full_attention", rope)


def _head_dim(config: dict[str, Any]) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _metadata(writer: gguf.GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    rope, head_dim = _rope(config), _head_dim(config)
    writer.add_block_count(_blocks(config))
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config.get("shared_intermediate_size", config["intermediate_size"]))
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if arch == "cohere2":
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch not in ("phi3", "chatglm"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    _scaling(writer, config, rope)
    _of_family(writer, arch, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([str(number).encode() for number in range(config["vocab_size"])])


def _scaling(writer: gguf.GGUFWriter, config: dict[str, Any], rope: dict[str, Any]) -> None:
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    elif kind == "longrope":
        original = rope["original_max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(original)
        longer = config["max_position_embeddings"] / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(longer) / math.log(original)))
    if "llama_4_scaling_beta" in rope:
        writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
        writer.add_attn_temperature_scale(rope["llama_4_scaling_beta"])


def _of_family(writer: gguf.GGUFWriter, arch: str, config: dict[str, Any]) -> None:
    if arch in ("gemma2", "gemma3", "cohere2", "phi3") and config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
    if arch in ("gemma3", "cohere2", "exaone4", "olmo2") and "sliding_attention" in config.get("layer_types", []):
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    if arch == "gemma3":
        writer.add_float32("gemma3.rope.freq_base_swa", config["rope_parameters"]["sliding_attention"]["rope_theta"])
    if arch in ("granite", "granitemoe"):
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config["model_type"] == "granitemoehybrid":  # keys of the layers that it has none of, too
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        writer.add_ssm_conv_kernel(config["mamba_d_conv"])
        writer.add_ssm_state_size(config["mamba_d_state"])
        writer.add_ssm_group_count(config["mamba_n_groups"])
        writer.add_ssm_inner_size(config["mamba_expand"] * config["hidden_size"])
        writer.add_ssm_time_step_rank(config["mamba_n_heads"])
        writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")
    _experts(writer, config)
    if arch == "cohere2":
        writer.add_logit_scale(config["logit_scale"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _experts(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    model_type = config["model_type"]
    counts = [config[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)]
    if not counts:
        return
    writer.add_expert_count(counts[0])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if model_type in ("qwen3_moe", "glm4_moe"):
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if model_type == "gpt_oss":
        writer.add_sliding_window(config["sliding_window"])
        writer.add_expert_feed_forward_length(config["intermediate_size"])
    if model_type == "glm4_moe":
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_nextn_predict_layers(config["num_nextn_predict_layers"])


def _rope_tensors(config: dict[str, Any]) -> dict[str, np.ndarray]:
    rope = _rope(config)
    if rope["rope_type"] == "longrope":
        return {
            f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
            for length in ("long", "short")
        }
    return {}
