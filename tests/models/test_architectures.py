"""The families of models: their tensors' names are those of the gguf package, and the registry finds them."""

from __future__ import annotations

import dataclasses

import gguf
import pytest

from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.architectures.of_gguf import GGUF_ARCHITECTURES, gguf_family
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import (
    expected_tensors,
    fused_tensors,
    hf_name,
    interleaved_heads,
    model_tensors,
    part_name,
)
from tpimpi.models.weight_formats import LayerFormats

CONFIG = ModelConfig(
    architecture="llama",
    hidden=12,
    intermediate=20,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    vocab=50,
    context=64,
    norm_eps=1e-5,
    rope_theta=10000.0,
    rope_scaling=None,
    attention_windows=(0, 0),
    tied_head=False,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=False,
)

PARTS = ("gate", "up", "down")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names_in_gguf_files_are_those_of_the_gguf_package(name: str) -> None:
    family = ARCHITECTURES[name]
    number = next(number for number, word in gguf.MODEL_ARCH_NAMES.items() if word == family.gguf_name)
    names = gguf.get_tensor_name_map(number, CONFIG.layers)
    config = dataclasses.replace(CONFIG, architecture=name, qk_norm=family.qk_norm)
    if family.mixture:
        config = dataclasses.replace(config, experts=2, expert_intermediate=8, shared_intermediate=8)
        if name == "glm4_moe":
            config = dataclasses.replace(config, dense_layers=(0,))
    fused = {piece.name.rpartition(".")[0] for pieces in fused_tensors(config, hf=True).values() for piece in pieces}
    tied = name in ("gemma2", "gemma3_text", "cohere2")  # in which the package knows no head
    for tensor in model_tensors(config).values():
        if tensor.name.rpartition(".")[0] in fused or (tied and tensor.part == "head"):
            continue
        # The converter itself renames those of a dense Granite 4, sinks and the bias of a choice, and stacks experts.
        hf_name = tensor.hf_name.replace("shared_mlp.output_linear", "mlp.down_proj")
        hf_name = hf_name.replace("sinks", "sinks.weight").replace("e_score_correction_bias", "e_score_correction.bias")
        stored = tensor.gguf_name
        if tensor.expert >= 0:
            part = tensor.part.replace("expert_", "")
            hf_name = f"model.layers.{tensor.layer}.mlp.experts.{part}_proj.{hf_name.rpartition('.')[2]}"
            stored = stored.replace(f"ffn_{part}.{tensor.expert}.", f"ffn_{part}_exps.")
        assert stored == names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
    # How transformers' Phi-3 calls what some GGUF files alone have.
    hf_of = {"attn_qkv": "self_attn.qkv_proj", **{f"ffn_{part}_exps": f"mlp.experts.{part}_proj" for part in PARTS}}
    for spec in family.fused:
        if spec.gguf is not None:
            assert f"blk.1.{spec.gguf}" == names.get_name(f"model.layers.1.{spec.hf or hf_of[spec.gguf]}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_has_the_matrices_that_formats_are_chosen_for(name: str) -> None:
    layer = ARCHITECTURES[name].layer_tensors
    parts = {spec.part: spec for spec in layer}
    # A part of several may be in dense layers one tensor, in those with experts another.
    assert len({(spec.part, spec.layers) for spec in layer}) == len(layer)
    experts = [part for part in LayerFormats._fields if part.startswith("expert_")] if "router" in parts else []
    found = [part for part, spec in parts.items() if len(spec.shape) == 2 and part != "router"]
    dense = LayerFormats._fields[
        : 7 if any(spec.layers in ("all", "dense") and spec.part == "up" for spec in layer) else 4
    ]
    assert sorted(found) == sorted([*dense, *experts])
    assert ("q_norm" in parts) == ARCHITECTURES[name].qk_norm
    with_norms = ("qwen3", "qwen3_moe", "gemma3_text", "exaone4", "olmo2", "olmo3", "olmoe", "glm4_moe")
    assert ARCHITECTURES[name].qk_norm == (name in with_norms)


def test_shapes_biases_and_a_tied_head() -> None:
    shapes = expected_tensors(CONFIG)
    assert shapes["layers.1.self_attn.q_proj.weight"] == (32, 12) and shapes["layers.1.self_attn.q_proj.bias"] == (32,)
    assert shapes["layers.0.self_attn.v_proj.weight"] == (16, 12) and shapes["layers.0.mlp.down_proj.bias"] == (12,)
    assert [*shapes][0 :: len(shapes) - 1] == ["embed_tokens.weight", "lm_head.weight"]
    bare = dataclasses.replace(CONFIG, tied_head=True, qkv_bias=False, o_bias=False, mlp_bias=False)
    assert set(shapes) - set(expected_tensors(bare)) == {"lm_head.weight", *(n for n in shapes if n.endswith(".bias"))}
    assert part_name(CONFIG, 1, "mlp_norm") == "layers.1.post_attention_layernorm.weight"
    assert hf_name("lm_head.weight") == "lm_head.weight" and hf_name("norm.weight") == "model.norm.weight"


def test_a_llama_with_experts_is_a_mixtral_in_gguf() -> None:
    assert gguf_family("llama", mixture=True).name == "mixtral" and gguf_family("llama", mixture=False).name == "llama"
    assert gguf_family("gpt-oss", mixture=False).name == "gpt_oss"
    # Of a dense family it is the dense one, which refuses the file.
    assert gguf_family("gemma2", mixture=True).name == "gemma2"


def test_a_mistral_is_a_llama_in_gguf() -> None:
    assert GGUF_ARCHITECTURES["llama"].name == "llama" and "mistral" not in GGUF_ARCHITECTURES
    mistral = dataclasses.replace(CONFIG, architecture="mistral")
    assert interleaved_heads(mistral, "q") == 4 and interleaved_heads(mistral, "k") == 2
    assert interleaved_heads(mistral, "v") == 0
    assert interleaved_heads(dataclasses.replace(CONFIG, architecture="qwen2"), "q") == 0
