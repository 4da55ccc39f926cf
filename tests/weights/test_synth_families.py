"""Random weights of every family of models: as files that its own readers take, and as a file that is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.synth_cases import Cli, made, write_config
from tests.support.tiny_models import SMALL, TINY
from tpimpi.errors import InputError
from tpimpi.models.shapes import load_shape
from tpimpi.weights.make import wanted_formats
from tpimpi.weights.sources import export, open_source
from tpimpi.weights.sources.synthetic import SyntheticSource

KINDS = (
    *("gemma2", "gemma3", "phi3", "phi3-long", "granite", "granite4", "smollm3", "glm", "glm-edge", "glm4"),
    *("exaone4", "cohere2", "olmo2", "olmo3", "ministral3", "qwen3-yarn"),
    *("qwen3-moe-all", "mixtral", "gpt-oss", "olmoe", "granite-moe", "glm4-moe"),
)


def source_of(folder: Path, kind: str, fmt: str, **more: Any) -> SyntheticSource:
    folder.mkdir()
    model_type, changes = TINY[kind]
    values = {**SMALL, **changes, "model_type": model_type, **more}
    if kind == "granite4":
        values["shared_intermediate_size"] = 96
    if kind == "qwen3-yarn":
        del values["rope_parameters"]["attention_factor"]
    if model_type == "glm4_moe":
        values["num_nextn_predict_layers"] = 0  # synth makes up no such layers
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return made(path, fmt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow_but("phi3", "gemma3", "glm", "gpt-oss")
def test_files_hold_the_sources_numbers_and_transformers_takes_the_folder(tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    source = source_of(tmp_path / kind, kind, "q8_0")
    export.write_hf(source, tmp_path / "hf", lambda done, total: None)
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    with open_source(tmp_path / "hf") as hf, open_source(tmp_path / "model.gguf") as file:
        assert hf.config == source.config
        # GGUF calls a tensor of a dense Granite 4 what it calls a Granite 3's.
        spelled = {name: name.replace("shared_mlp.output_linear", "mlp.down_proj") for name in source.tensors()}
        assert hf.tensors().keys() == source.tensors().keys() and file.tensors().keys() == set(spelled.values())
        for name in source.tensors():
            np.testing.assert_array_equal(hf.read(name), source.read(name), err_msg=name)
            np.testing.assert_array_equal(file.read_blocks(spelled[name]), source.read_blocks(name), err_msg=name)
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_a_matrix_in_two_formats_is_two_in_a_gguf_file(tmp_path: Path) -> None:
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8}
    source = source_of(tmp_path / "phi3", "phi3", "q4_k_m", **wide)
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    with open_source(tmp_path / "model.gguf") as file:
        found = {file.tensors()[f"layers.{layer}.self_attn.v_proj.weight"].format for layer in range(8)}
        assert found == {"q4_k", "q6_k"}
        for name in source.tensors():
            np.testing.assert_array_equal(file.read_blocks(name), source.read_blocks(name), err_msg=name)


def test_mixes_of_mixtures() -> None:
    """Of eight experts as llama-quant.cpp has them for Mixtral-8x7B, in which attention has more bits."""
    mixtral = wanted_formats("q4_k_m", load_shape("mixtral-8x7b").config)
    assert {(here.q, here.k, here.v, here.o) for here in mixtral.layers} == {("q4_k", "q8_0", "q8_0", "q5_k")}
    assert {here.expert_gate for here in mixtral.layers} == {"q4_k"}
    more = [layer for layer, here in enumerate(mixtral.layers) if here.expert_down == "q6_k"]
    assert more == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31] and mixtral.head == "q6_k"
    qwen3 = wanted_formats("q4_k_m", load_shape("qwen3-30b-a3b").config)
    assert {(here.q, here.k, here.o) for here in qwen3.layers} == {("q4_k", "q4_k", "q4_k")}
    gpt_oss = wanted_formats("mxfp4_moe", load_shape("gpt-oss-20b").config)
    assert {(*here[:4], *here[7:]) for here in gpt_oss.layers} == {(*["bf16"] * 4, *["mxfp4"] * 3)}
    assert (gpt_oss.head, gpt_oss.embedding) == ("bf16", "bf16")
    with pytest.raises(InputError, match="mxfp4_moe, which is for experts, and this model has none"):
        wanted_formats("mxfp4_moe", load_shape("llama-2-7b").config)


def test_a_gguf_file_of_a_mixture_in_a_mix(tmp_path: Path) -> None:
    source = source_of(tmp_path / "gpt-oss", "gpt-oss", "mxfp4_moe")
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.1.ffn_down_exps.weight"] == "MXFP4" and types["blk.1.ffn_gate_inp.weight"] == "F32"
    assert types["blk.1.attn_q.weight"] == types["output.weight"] == "BF16"
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}  # the fastest dimension first
    assert shapes["blk.1.ffn_down_exps.weight"] == [64, 64, 8] and shapes["blk.1.ffn_up_exps.bias"] == [64, 8]
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_MXFP4_MOE
    with open_source(tmp_path / "model.gguf") as file:
        for name in source.tensors():
            np.testing.assert_array_equal(file.read_blocks(name), source.read_blocks(name), err_msg=name)


def test_what_gguf_has_no_word_for_is_refused(tmp_path: Path) -> None:
    scaled = source_of(tmp_path / "scaled", "gemma2-scale", "q8_0", attn_logit_softcapping=50.0)
    with pytest.raises(InputError, match="a GGUF file of a gemma2 cannot say this shape's attention_scale; write it"):
        export.write_gguf(scaled, tmp_path / "model.gguf", lambda done, total: None)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_gguf_file_without_a_tokenizer_is_run_as_slices_are(tpimpi: Cli, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "shape"))
    synth = ("synth", "--shape", config, "--quiet", "--out")
    model, slices = tmp_path / "model.gguf", tmp_path / "slices"
    assert tpimpi(*synth, str(model), "--as", "gguf").code == 0
    assert tpimpi(*synth, str(slices), "--ranks", "1").code == 0
    arguments = ("--raw", "--max-tokens", "5", "--quiet", "--prompt", "1 2 3")
    from_file, from_slices = (
        tpimpi(option, str(path), *arguments) for option, path in (("--model", model), ("--slices", slices))
    )
    assert from_file.code == from_slices.code == 0, from_file.err
    assert from_file.out == from_slices.out and len(from_file.out.split()) == 5
    sliced = tmp_path / "sliced"
    made = tpimpi("slice", "--model", str(model), "--ranks", "1", "--out", str(sliced), "--quiet")
    assert made.code == 0, made.err
    assert tpimpi("--slices", str(sliced), *arguments).out == from_file.out
    refused = tpimpi("--model", str(model), "--prompt", "1 2 3")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "the GGUF file has no tokenizer, so a prompt is token ids; give --raw, and ids such as" in refused.err
