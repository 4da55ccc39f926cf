"""GGUF metadata read as a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_gguf import config_from_gguf
from tpimpi.models.layer_spec import RopeScaling

SHAPES = {"token_embd.weight": (160, 64), "output.weight": (160, 64), "blk.0.attn_q.weight": (64, 64)}


def metadata(arch: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {
        "general.architecture": arch,
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return {**values, **{key if "." in key else f"{arch}.{key}": value for key, value in changes.items()}}


def gguf_refusal(values: dict[str, Any], **extra: Any) -> str:
    with pytest.raises(ModelError) as caught:
        config_from_gguf(values, "x.gguf", SHAPES, **extra)
    message = str(caught.value)
    assert message.startswith("x.gguf") and "\n" not in message
    return message


def test_gguf_sizes_and_defaults() -> None:
    config = config_from_gguf(metadata(), "x.gguf", SHAPES)
    assert config == ModelConfig(
        architecture="llama",
        hidden=64,
        intermediate=96,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=160,
        context=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        attention_windows=(0, 0),
        tied_head=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
    )


def test_gguf_variants_come_from_the_tensors() -> None:
    tied = {name: shape for name, shape in SHAPES.items() if name != "output.weight"}
    assert config_from_gguf(metadata(), "x.gguf", tied).tied_head
    biased = {**SHAPES, "blk.0.attn_k.bias": (32,), "blk.0.attn_output.bias": (64,), "blk.0.ffn_up.bias": (96,)}
    config = config_from_gguf(metadata(), "x.gguf", biased)
    assert config.qkv_bias and config.o_bias and config.mlp_bias
    assert config_from_gguf(metadata("qwen2"), "x.gguf", SHAPES).qkv_bias
    qwen3 = config_from_gguf(
        metadata("qwen3", **{"qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32}), "x.gguf", SHAPES
    )
    assert qwen3.qk_norm and qwen3.head_dim == 32 and not qwen3.qkv_bias


def test_gguf_rope_and_window() -> None:
    scaled = metadata(**{"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert config_from_gguf(scaled, "x.gguf", SHAPES).rope_scaling == RopeScaling("linear", factor=4.0)
    factors = [1.0, 1.0, 2.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    config = config_from_gguf(metadata(), "x.gguf", SHAPES, {"factors": factors})
    assert config.rope_scaling == RopeScaling("factors", factors=tuple(factors))
    both = config_from_gguf(scaled, "x.gguf", SHAPES, {"factors": factors}).rope_scaling
    assert both == RopeScaling("factors", factors=tuple(4 * factor for factor in factors))
    assert config_from_gguf(metadata(**{"llama.attention.sliding_window": 7}), "x.gguf", SHAPES).attention_windows == (
        7,
        7,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"general.architecture": "gptneox"}, ["general.architecture", "'gptneox'", "llama, mistral3, qwen2, qwen3"]),
        ({"general.architecture": None}, ["general.architecture is None"]),
        ({"general.type": "adapter"}, ["general.type is 'adapter'"]),
        ({"expert_count": 8}, ["'llama.expert_used_count' is missing"]),
        ({"expert_count": 8, "expert_used_count": 9}, ["a position uses 9 experts of 8", "1 to 8 are needed"]),
        ({"expert_count": 8, "expert_used_count": [2, 3]}, ["llama.expert_used_count is [2, 3]"]),
        ({"llama.attention.causal": False}, ["llama.attention.causal is False"]),
        ({"llama.attention.scale": 0.5}, ["'llama.attention.scale' is 0.5"]),
        ({"logit_scale": 2.0}, ["'llama.logit_scale' is 2.0"]),
        ({"llama.rope.scaling.type": "dynamic"}, ["llama.rope.scaling.type is 'dynamic'"]),
        ({"llama.rope.scaling.type": "longrope"}, ["rope_factors_short.weight is missing"]),
        ({"llama.rope.scaling.factor": -1.0}, ["llama.rope.scaling.factor is -1.0"]),
        ({"llama.rope.scaling.factor": float("nan")}, ["llama.rope.scaling.factor is nan"]),
        ({"llama.rope.dimension_count": 8}, ["llama.rope.dimension_count is 8", "16"]),
        ({"llama.attention.value_length": 32}, ["llama.attention.value_length is 32", "16"]),
        ({"llama.attention.head_count_kv": 3}, ["4 query heads", "3 key/value heads"]),
        ({"block_count": 10**9}, ["llama.block_count is 1000000000"]),
        ({"embedding_length": 66}, ["llama.embedding_length is 66", "llama.attention.head_count"]),
        ({"embedding_length": "64"}, ["llama.embedding_length is '64'"]),
        ({"llama.attention.key_length": 15, "llama.attention.value_length": 15}, ["15"]),
    ],
)
def test_gguf_refused_by_name(change: dict[str, Any], words: list[str]) -> None:
    message = gguf_refusal(metadata(**change))
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "key", ["block_count", "context_length", "embedding_length", "attention.layer_norm_rms_epsilon"]
)
def test_gguf_missing_key_is_named(key: str) -> None:
    values = metadata()
    del values[f"llama.{key}"]
    assert f"'llama.{key}' is missing" in gguf_refusal(values)


def test_gguf_zero_keys_are_harmless() -> None:
    values = metadata(**{"expert_count": 0, "llama.attention.max_alibi_bias": 0.0, "use_parallel_residual": False})
    assert config_from_gguf(values, "x.gguf", SHAPES) == config_from_gguf(metadata(), "x.gguf", SHAPES)


def test_gguf_rope_factors_are_checked() -> None:
    assert "has 3 numbers; 8" in gguf_refusal(metadata(), rope_factors={"factors": [1.0] * 3})
    assert "holds 0.0" in gguf_refusal(metadata(), rope_factors={"factors": [0.0] * 8})


def test_gguf_window_without_layers_is_refused() -> None:
    assert "sliding_window is 7" in gguf_refusal(metadata("qwen2", **{"qwen2.attention.sliding_window": 7}))


def test_gguf_sizes_given_layer_by_layer() -> None:
    alike = {
        "llama.attention.head_count_kv": [2, 2],
        "feed_forward_length": [96, 96],
        "llama.attention.head_count": [4, 4],
    }
    assert config_from_gguf(metadata(**alike), "x.gguf", SHAPES) == config_from_gguf(metadata(), "x.gguf", SHAPES)
    message = gguf_refusal(metadata(feed_forward_length=[96, 64]))
    assert "llama.feed_forward_length is [96, 64]" in message and "all of one size" in message
    assert "llama.feed_forward_length has 3 numbers" in gguf_refusal(metadata(feed_forward_length=[96] * 3))
    assert "llama.attention.head_count_kv has 0" in gguf_refusal(metadata(**{"llama.attention.head_count_kv": []}))
