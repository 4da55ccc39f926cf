"""config.json and GGUF metadata: read as transformers reads them, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.rope_oracle import check_angles_and_windows
from tests.support.tiny_models import LLAMA3_ROPE, SMALL, TINY
from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf
from tpimpi.models.layer_spec import RopeScaling

PATH = Path("some") / "config.json"


def transformers_config(kind: str, **overrides: Any) -> Any:
    from transformers import AutoConfig

    model_type, changes = TINY[kind]
    return AutoConfig.for_model(model_type, **{**SMALL, **changes, **overrides})


def saved(kind: str, **overrides: Any) -> dict[str, Any]:
    """config.json as transformers writes it."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = transformers_config(kind, **overrides)
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    return values


def refusal(values: Any) -> str:
    with pytest.raises(ModelError) as caught:
        config_from_hf(values, PATH)
    message = str(caught.value)
    assert message.startswith(str(PATH)) and "\n" not in message
    return message


@pytest.mark.parametrize("kind", TINY)
def test_sizes_and_rope_are_those_of_transformers(kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = config_from_hf(saved(kind), PATH)
    theirs = transformers_config(kind)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in AutoModelForCausalLM.from_config(theirs).named_parameters()
        }
    attention = "model.layers.0.self_attn"
    assert config.architecture == theirs.model_type
    assert (config.vocab, config.hidden) == shapes["model.embed_tokens.weight"]
    down = "shared_mlp.output_linear" if config.architecture == "granitemoehybrid" else "mlp.down_proj"
    dense = [i for i in range(config.layers) if f"model.layers.{i}.{down}.weight" in shapes]
    assert dense == [i for i in range(config.layers) if config.router(i) is None]
    assert {shapes[f"model.layers.{i}.{down}.weight"] for i in dense} <= {(config.hidden, config.intermediate)}
    assert (config.hidden, config.heads * config.head_dim) == shapes[f"{attention}.o_proj.weight"]
    if f"{attention}.qkv_proj.weight" in shapes:
        rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        assert shapes[f"{attention}.qkv_proj.weight"] == (rows, config.hidden)
    else:
        assert config.kv_heads * config.head_dim == shapes[f"{attention}.k_proj.weight"][0]
    assert config.layers == theirs.num_hidden_layers and config.heads == theirs.num_attention_heads
    assert config.tied_head == ("lm_head.weight" not in shapes)
    assert config.qkv_bias == (f"{attention}.q_proj.bias" in shapes)
    assert config.o_bias == (f"{attention}.o_proj.bias" in shapes)
    assert config.mlp_bias == any(name.endswith("mlp.down_proj.bias") for name in shapes)
    assert config.qk_norm == (f"{attention}.q_norm.weight" in shapes)
    assert config.norm_eps == getattr(theirs, "rms_norm_eps", getattr(theirs, "layer_norm_eps", None))
    assert config.context == theirs.max_position_embeddings
    check_angles_and_windows(config, theirs)


@pytest.mark.parametrize("kind", ["mistral", "mistral-window", "qwen2", "qwen2-window", "llama"])
def test_windows_are_the_positions_that_transformers_masks_leave(kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    theirs = transformers_config(kind)
    model = AutoModelForCausalLM.from_config(theirs, attn_implementation="eager")
    with torch.no_grad():
        attentions = model(torch.arange(20)[None], output_attentions=True).attentions
    seen = tuple(int((layer[0, 0, -1] > 0).sum()) for layer in attentions)  # by the last of 20 queries
    windows = config_from_hf(saved(kind), PATH).attention_windows
    assert tuple(window or 20 for window in windows) == seen


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_defaults_of_missing_keys_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    model_type = TINY[kind][0]
    sizes = {"hidden_size": 4096, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 32}
    config = config_from_hf({"model_type": model_type, "vocab_size": 160, **sizes}, PATH)
    theirs = AutoConfig.for_model(model_type, vocab_size=160, **sizes)
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", 128)
    assert config.context == theirs.max_position_embeddings
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tied_head == theirs.tie_word_embeddings
    assert config.attention_windows == ((theirs.sliding_window if model_type == "mistral" else 0) or 0,) * 30


def test_missing_max_window_layers_is_transformers_default() -> None:
    values = saved("qwen2-window", num_hidden_layers=30)
    del values["max_window_layers"], values["layer_types"]
    theirs = transformers_config("qwen2", num_hidden_layers=30, use_sliding_window=True, sliding_window=6)
    expected = tuple(6 if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert config_from_hf(values, PATH).attention_windows == expected
    assert 0 < sum(map(bool, expected)) < 30


def test_old_rope_layout() -> None:
    values = saved("llama")
    del values["rope_parameters"]
    values["rope_theta"] = 123.0
    assert config_from_hf(values, PATH).rope_theta == 123.0
    for key in ("type", "rope_type"):
        values["rope_scaling"] = {key: "linear", "factor": 2.0}
        assert config_from_hf(values, PATH).rope_scaling == RopeScaling("linear", factor=2.0)
    values["rope_scaling"] = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}
    config = config_from_hf(values, PATH)
    assert config.rope_theta == 123.0
    assert config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)


def test_smollm2_and_harmless_keys_are_read() -> None:
    extras = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "_name_or_path": "x",
        "torch_dtype": "bfloat16",
        "pretraining_tp": 1,
        "unsloth_version": "1",
        "rope_scaling": None,
        "foo": None,
        "bar": [],
    }
    assert config_from_hf({**saved("smollm"), **extras}, PATH) == config_from_hf(saved("smollm"), PATH)


def test_to_dict_and_back() -> None:
    for kind in TINY:
        config = config_from_hf(saved(kind), PATH)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("llama", {"model_type": "gpt_neox"}, ["model_type", "'gpt_neox'", "llama, mistral"]),
        ("llama", {"model_type": ["llama"]}, ["model_type", "['llama']"]),
        ("llama", {"architectures": ["MixtralForCausalLM"]}, ["architectures", "MixtralForCausalLM"]),
        ("llama", {"architectures": "LlamaForCausalLM"}, ["architectures"]),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ("llama", {"foo": 3}, ["'foo' is 3", "may change the mathematics"]),
        ("llama", {"rope_interleaved": True}, ["'rope_interleaved' is True"]),
        ("llama", {"sliding_window": 5}, ["'sliding_window' is 5"]),
        ("mistral", {"attention_bias": True}, ["'attention_bias' is True"]),
        ("llama", {"num_local_experts": 8}, ["'num_local_experts' is 8"]),
        ("llama", {"auto_map": {"AutoModel": "x.Y"}}, ["'auto_map'"]),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantization_config", "'awq'"]),
        ("llama", {"quantization_config": "gptq"}, ["quantization_config", "'gptq'"]),
        ("llama", {"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "silu"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, ["0.25"]),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, ["'rope_parameters.factor' is missing"]),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "llama_4_scaling_beta": 0.1}},
            ["beta' is 0.1"],
        ),
        ("llama", {"rope_parameters": {"type": "dynamic", "factor": 4.0}}, ["rope_type is 'dynamic'"]),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ["'rope_parameters.short_factor' is missing"]),
        ("phi3-long", {"partial_rotary_factor": 2}, ["partial_rotary_factor is 2"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["'attn_logit_softcapping' is 50.0"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["'use_bidirectional_attention' is True"]),
        ("gemma3", {"hidden_activation": "gelu"}, ["hidden_activation is 'gelu'", "gelu_pytorch_tanh"]),
        ("gemma3", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar is 0"]),
        ("gemma3", {"layer_types": ["full_attention"]}, ["layer_types has 1 entries", "5"]),
        ("gemma3", {"sliding_window": None}, ["layer_types[0] is 'sliding_attention'", "no window"]),
        ("granite", {"residual_multiplier": -1}, ["residual_multiplier is -1"]),
        ("smollm3", {"no_rope_layers": [1, 2]}, ["no_rope_layers is [1, 2]", "4"]),
        ("exaone4", {"layer_types": None, "sliding_window_pattern": "LLX"}, ["sliding_window_pattern is 'LLX'"]),
        ("cohere2", {"use_qk_norm": True}, ["'use_qk_norm' is True"]),
        ("llama", {"rope_parameters": {"rope_type": {}}}, ["rope_type is {}"]),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, ["'rope_parameters.factor' is missing"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 0}}, ["rope_parameters.factor is 0"]),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2, "x": 1}}, ["'rope_parameters.x' is 1"]),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["full_attention"]),
        ("llama", {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, ["high_freq_factor is 1"]),
        ("llama", {"rope_parameters": "linear"}, ["rope_parameters is 'linear'"]),
        ("llama-3.1", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, ["rope_scaling and rope_parameters"]),
        ("llama", {"rope_parameters": None, "rope_theta": float("nan")}, ["rope_theta is nan"]),
        ("llama", {"rms_norm_eps": float("inf")}, ["rms_norm_eps is inf"]),
        ("llama", {"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ("llama", {"hidden_size": "64"}, ["hidden_size is '64'"]),
        ("llama", {"hidden_size": True}, ["hidden_size is True"]),
        ("llama", {"hidden_size": 64.0}, ["hidden_size is 64.0"]),
        ("llama", {"hidden_size": float("nan")}, ["hidden_size is nan"]),
        ("llama", {"vocab_size": 0}, ["vocab_size is 0"]),
        ("llama", {"num_hidden_layers": -1}, ["num_hidden_layers is -1"]),
        ("llama", {"num_hidden_layers": 10**12}, ["num_hidden_layers is 1000000000000"]),
        ("llama", {"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ("llama", {"head_dim": 15}, ["head size is 15"]),
        ("llama", {"head_dim": None, "num_attention_heads": 5}, ["hidden_size is 64", "is 5", "head_dim"]),
        ("llama", {"attention_bias": "yes"}, ["attention_bias is 'yes'"]),
        ("llama", {"tie_word_embeddings": 1}, ["tie_word_embeddings is 1"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window is 0"]),
        ("qwen2-window", {"layer_types": ["full_attention"]}, ["layer_types has 1 entries", "3"]),
        ("qwen2-window", {"layer_types": ["chunked_attention"] * 3}, ["layer_types[0]", "'chunked_attention'"]),
        ("qwen2-window", {"layer_types": 3}, ["layer_types has 3"]),
        ("qwen2-window", {"use_sliding_window": False}, ["layer_types[1] is 'sliding_attention'", "no window"]),
        ("qwen2-window", {"layer_types": None, "max_window_layers": "1"}, ["max_window_layers is '1'"]),
        ("qwen3", {"head_dim": None}, ["head_dim is None"]),
    ],
)
def test_refused_by_name(kind: str, change: dict[str, Any], words: list[str]) -> None:
    values = saved(kind)
    config_from_hf(values, PATH)  # good without the change
    message = refusal({**values, **change})
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "key",
    ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"],
)
def test_missing_key_is_named(key: str) -> None:
    values = saved("llama")
    del values[key]
    message = refusal(values)
    assert f"'{key}' is missing" in message


@pytest.mark.parametrize("values", [None, [], "x", 3, {}])
def test_no_object_is_refused(values: Any) -> None:
    refusal(values)


def test_every_key_with_every_wrong_type_is_never_a_traceback() -> None:
    wrong = [None, True, -1, 0, 1.5, float("nan"), 10**400, "x", [], [1], {}, {"a": 1}, [[["x"]]], "two\nlines"]
    for kind in (
        "llama-3.1",
        "mistral-window",
        "qwen2-window",
        "gemma3",
        "phi3-long",
        "ministral3",
        "exaone4",
        "smollm3",
    ):
        values = saved(kind)
        for key in [*values, "rope_theta", "rope_scaling", "attention_bias", "\n"]:
            for value in wrong:
                try:
                    config_from_hf({**values, key: value}, PATH)
                except ModelError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"layer_types": ["full_attention"] * 3}),
        ("mistral", {"layer_types": ["full_attention"] * 2}),
        ("llama", {"num_local_experts": 0, "final_logit_softcapping": 0.0}),
    ],
)
def test_what_says_the_same_in_other_words_changes_nothing(kind: str, change: dict[str, Any]) -> None:
    values = saved(kind)
    assert config_from_hf({**values, **change}, PATH) == config_from_hf(values, PATH)


def test_full_attention_beside_a_window_is_refused() -> None:
    values = saved("mistral-window")
    assert "'layer_types'" in refusal({**values, "layer_types": ["full_attention"] * 3})
    assert "'layer_types'" in refusal({**saved("llama"), "layer_types": ["full_attention", "sliding_attention"]})


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"quantization_config": FP8}, ["FP8, E4M3", "128 x 128"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, ["GPTQ, 4 bits"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, ["AWQ, 4 bits"]),
        ({"quantization_config": NF4}, ["bitsandbytes, 4 bits"]),
        ({"quantization_config": PACKED}, ["compressed-tensors", "pack-quantized"]),
        ({"quantization_config": {"quant_method": "exl2", "bits": 4.25}}, ["EXL2, 4.25 bits"]),
        ({"quantization": {"group_size": 64, "bits": 4}}, ["MLX, 4 bits"]),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, ["MLX, 4 bits"]),
        ({"quantization_config": {"quant_method": "new\nest"}}, [r"'new\nest'"]),
        ({"quantization_config": {"quant_method": [1]}}, ["[1]"]),
    ],
)
def test_quantized_checkpoints_are_refused_by_name(change: dict[str, Any], names: list[str]) -> None:
    message = refusal({**saved("llama"), **change})
    for name in names:
        assert name in message
    assert message.endswith(
        "take the model's original safetensors (bf16 or f16), or a GGUF file of it (Q4_K_M or Q8_0, say)"
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 500000.0}, "rope_parameters.rope_theta is 10000.0 and rope_theta is 500000.0; remove"),
        (
            {
                "rope_parameters": None,
                "rope_theta": 1e6,
                "rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e4},
            },
            "1e6",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}, "rope_theta": 1e4}, "full_attention.rope_theta"),
    ],
)
def test_rope_parameters_that_contradict_the_older_keys(change: dict[str, Any], says: str) -> None:
    assert says.replace("1e6", "1000000.0") in refusal({**saved("llama"), **change})


def test_rope_parameters_that_repeat_the_older_keys() -> None:
    values = saved("llama")
    assert config_from_hf({**values, "rope_theta": values["rope_parameters"]["rope_theta"]}, PATH) == config_from_hf(
        values, PATH
    )
