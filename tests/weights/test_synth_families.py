"""Random weights of every family of models: as files that its own readers take, and as a file that is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.synth_cases import Cli, made, write_config
from tests.support.tiny_models import SMALL, TINY
from tpimpi.errors import InputError
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
    refused = tpimpi("--model", str(model), "--prompt", "1 2 3")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    assert "the GGUF file has no tokenizer, so a prompt is token ids; give --raw, and ids such as" in refused.err
