"""The published config.json of each family's best-known model: every key accounted for, and meant as transformers means it.

A wrong default is what tiny random models do not show. WHOLE were compared, key by key, with copies of the published files
that stand in public repositories (of granite-4.0-3b-vision revision bf108f36960fb4df79bf035e506c592f4ee3c2d3; of the others
as of the transformers_version that they name). Of the rest only the sizes, and the keys that the mathematics depends on,
could be compared with what public repositories quote of them; the other keys are as the models' pages had them. Of
gpt-oss-20b a copy without its quantization_config was found, which gpt-oss-120b was compared with in all but its sizes.
"""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from tests.support.launch import ROOT
from tests.support.rope_oracle import check_angles_and_windows
from tpimpi.errors import ModelError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf, hf_mtp_layers, is_multimodal
from tpimpi.models.tensors import expected_tensors

WHOLE = (
    *("meta-llama/Llama-3.1-8B-Instruct", "Qwen/Qwen3-4B", "google/gemma-3-270m", "google/gemma-3-12b-it"),
    *("microsoft/Phi-3-mini-4k-instruct", "microsoft/Phi-4-mini-instruct", "ibm-granite/granite-3.3-8b-instruct"),
    *("ibm-granite/granite-4.0-3b-vision, its text model", "HuggingFaceTB/SmolLM3-3B-Base", "THUDM/glm-edge-1.5b-chat"),
    *("allenai/OLMo-2-1124-7B-Instruct", "mistralai/Ministral-8B-Instruct-2410", "zai-org/GLM-4.5-Air"),
)
PUBLISHED: dict[str, dict[str, Any]] = json.loads((ROOT / "tests/support/published_configs.json").read_text())


def _theirs(values: dict[str, Any]) -> Any:
    """transformers' config of the text model."""
    from transformers import AutoConfig

    values = copy.deepcopy({key: value for key, value in values.items() if key != "auto_map"})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return config.get_text_config()


def _ours(name: str) -> ModelConfig:
    return config_from_hf(PUBLISHED[name], name)


def test_every_family_has_one_here() -> None:
    of = {_ours(name).architecture for name in PUBLISHED}
    # Whose own classes no published model of its makers names: it is published as a Mistral.
    assert of == set(ARCHITECTURES) - {"ministral"} and set(WHOLE) <= set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_is_accounted_for(name: str) -> None:
    values = PUBLISHED[name]
    config, theirs = _ours(name), _theirs(values)
    assert config.hidden == theirs.hidden_size and config.intermediate == getattr(
        theirs, "shared_intermediate_size", theirs.intermediate_size
    )
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


def test_mixtures() -> None:
    """Facts of the models' own code; of the numbers of parameters their pages' (experts are most of them)."""
    small, large = _ours("openai/gpt-oss-20b"), _ours("openai/gpt-oss-120b")
    assert (small.experts, large.experts, large.experts_per_token) == (32, 128, 4)
    assert large.activation == "clamped_silu" and large.activation_limit == 7.0 and large.attention_sinks
    assert large.qkv_bias and large.o_bias and large.expert_bias and large.router_bias == "logits"
    assert large.router_normalized and large.layer(0).attention.window == 128 and large.layer(1).attention.window == 0
    assert large.rope_scaling is not None and not large.rope_scaling.truncate and large.head_dim == 64
    assert large.rope_scaling.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    air = _ours("zai-org/GLM-4.5-Air")
    assert air.router_scoring == "sigmoid" and air.router_bias == "choice" and air.router_scale == 1.0
    assert air.dense_layers == (0,) and air.shared_intermediate == 1408 and air.rotary_dims == 64
    assert air.qkv_bias and not air.o_bias and not air.qk_norm and air.layers == 46
    assert hf_mtp_layers(PUBLISHED["zai-org/GLM-4.5-Air"], "x") == 1
    olmoe = _ours("allenai/OLMoE-1B-7B-0924")
    assert olmoe.qk_norm_over_all and olmoe.pre_norms and not olmoe.router_normalized
    granite = _ours("ibm-granite/granite-3.1-3b-a800m-instruct")
    assert granite.logit_scale == pytest.approx(1 / 6) and granite.experts == 40 and granite.router_normalized
    assert _ours("Qwen/Qwen3-30B-A3B").router_normalized and _ours("mistralai/Mixtral-8x7B-v0.1").router_normalized
    counts = {name: sum(map(math.prod, expected_tensors(_ours(name)).values())) for name in BILLIONS}
    assert {name: round(count / 1e9, 1) for name, count in counts.items()} == BILLIONS


BILLIONS = {
    "openai/gpt-oss-20b": 20.9,
    "openai/gpt-oss-120b": 116.8,
    "Qwen/Qwen3-30B-A3B": 30.5,
    "mistralai/Mixtral-8x7B-v0.1": 46.7,
    "allenai/OLMoE-1B-7B-0924": 6.9,
    "ibm-granite/granite-3.1-3b-a800m-instruct": 3.3,
}


def test_what_no_shape_shows() -> None:
    """Facts of the models' own code."""
    gemma3, gemma2 = _ours("google/gemma-3-270m"), _ours("google/gemma-2-2b")
    assert gemma3.embedding_scale == math.sqrt(640) and gemma2.embedding_scale == math.sqrt(2304)
    assert gemma3.activation == gemma2.activation == "gelu_tanh"
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert gemma3.layer(0).attention.window == 512 and gemma3.layer(5).attention.window == 0
    assert gemma3.layer(0).rope.theta == 1e4 and gemma3.layer(5).rope.theta == 1e6  # type: ignore[union-attr]
    four = _ours("google/gemma-3-4b-it")
    assert four.layer(5).rope.scaling.factor == 8 and four.layer(0).rope.scaling is None  # type: ignore[union-attr]
    assert is_multimodal(PUBLISHED["google/gemma-3-4b-it"]) and four.attention_scale == 256**-0.5
    granite = _ours("ibm-granite/granite-3.3-8b-instruct")
    assert (granite.embedding_scale, granite.attention_scale) == (12.0, 0.0078125)
    assert (granite.residual_scale, granite.logit_scale) == (0.22, 0.0625)
    granite4 = _ours("ibm-granite/granite-4.0-3b-vision, its text model")
    assert granite4.layer(0).rope is not None and granite4.attention_scale == 0.015625 and granite4.logit_scale == 0.1
    smollm3 = _ours("HuggingFaceTB/SmolLM3-3B")
    assert smollm3.unrotated_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35) and smollm3.tied_head
    assert _ours("HuggingFaceTB/SmolLM3-3B-Base").unrotated_layers == smollm3.unrotated_layers
    glm, edge = _ours("THUDM/glm-4-9b-chat-hf"), _ours("THUDM/glm-edge-1.5b-chat")
    assert glm.rotary_dims == 64 and glm.qkv_bias and not glm.o_bias and glm.pre_norms and not glm.post_norms
    assert edge.layer(0).rope.dims == 128 and not edge.qkv_bias  # type: ignore[union-attr]
    glm4 = _ours("THUDM/GLM-4-9B-0414")
    assert glm4.rotary_dims == 64 and glm4.qkv_bias and not glm4.o_bias and glm4.post_norms and glm4.pre_norms
    olmo = _ours("allenai/Olmo-3-7B-Instruct")
    assert olmo.qk_norm_over_all and not olmo.pre_norms and olmo.post_norms and olmo.layer(0).attention.window == 4096
    assert olmo.layer(0).rope.scaling is None and olmo.layer(3).rope.scaling.kind == "yarn"  # type: ignore[union-attr]
    exaone = _ours("LGAI-EXAONE/EXAONE-4.0-32B")
    assert not exaone.pre_norms and exaone.layer(3).rope is None and exaone.layer(2).attention.window == 4096
    cohere = _ours("CohereLabs/c4ai-command-r7b-12-2024")
    assert cohere.parallel_blocks and cohere.norm == "layer" and cohere.logit_scale == 0.25
    assert cohere.layer(3).rope is None and cohere.layer(3).attention.window == 0
    phi = _ours("microsoft/Phi-4-mini-instruct")
    assert phi.rotary_dims == 96 and phi.rope_scaling is not None
    assert phi.rope_scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    ministral = _ours("mistralai/Ministral-3-3B-Instruct-2512")
    assert ministral.rope_scaling is not None and ministral.rope_scaling.query_growth == 0.1
    assert ministral.rope_scaling.attention_factor == 1.0
