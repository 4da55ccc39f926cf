"""Hugging Face directories as people have them: mixed dtypes, quantized ones, names too long or too short, odd folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.support.sources_cases import F32, edit_tensors, refusal, state_dict, write_tiny_gguf
from tests.support.tiny_models import write_tiny_hf
from tpimpi.models.tensors import expected_tensors
from tpimpi.weights.make import choose_formats, make_header
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.mark.parametrize(
    ("tensor", "name"),
    [
        ("q_proj.qweight", "GPTQ or AWQ"),
        ("q_proj.weight_scale_inv", "FP8, E4M3"),
        ("q_proj.weight_packed", "compressed-tensors"),
        ("q_proj.weight.absmax", "bitsandbytes"),
        ("q_proj.q_weight", "EXL2"),
        ("q_proj.scales", "MLX"),
    ],
)
def test_tensors_of_quantized_checkpoints_are_refused_by_name(tensor: str, name: str, llama: Path) -> None:
    """Older ones keep their method in a file of its own (quantize_config.json), beside a config.json that says nothing."""
    edit_tensors(llama, lambda tensors: tensors.update({f"model.layers.0.self_attn.{tensor}": np.zeros(4, np.int32)}))
    message = refusal(llama)
    assert tensor in message and name in message and "a GGUF file of it" in message


def test_mixed_dtypes_read_as_transformers_loads(llama: Path) -> None:
    """Norms in f32 beside matrices in bf16 and f16, as trainers save them: each keeps its own."""
    import torch
    from safetensors.torch import load_file, save_file

    kinds = {"mlp.up_proj": torch.bfloat16, "embed_tokens": torch.float16, "input_layernorm": torch.float16}
    tensors = load_file(llama / "model.safetensors")
    for name in tensors:
        tensors[name] = tensors[name].to(next((kind for part, kind in kinds.items() if part in name), torch.float32))
    save_file(tensors, llama / "model.safetensors", {"format": "pt"})
    with open_source(llama) as source:
        for name, info in source.tensors().items():
            stored = tensors[name if name == "lm_head.weight" else f"model.{name}"]
            assert info.format == {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[stored.dtype]
            np.testing.assert_array_equal(source.read(name), stored.float().numpy())


def test_a_tied_model_with_its_head_alone_reads_as_transformers_loads(tmp_path: Path) -> None:
    tied = write_tiny_hf(tmp_path / "tied", "llama-tied")
    whole = state_dict(tied)
    edit_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    theirs = state_dict(tied)
    np.testing.assert_array_equal(theirs["embed_tokens.weight"], whole["embed_tokens.weight"])
    with open_source(tied) as source:
        assert set(source.tensors()) == set(expected_tensors(source.config))
        np.testing.assert_array_equal(source.read("embed_tokens.weight"), theirs["embed_tokens.weight"])


def test_names_with_a_prefix_too_many_are_told(llama: Path) -> None:
    def wrapped(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[f"model.language_model.{name}"] = tensors.pop(name)

    edit_tensors(llama, wrapped)
    message = refusal(llama)
    assert "model.language_model." in message and "with a prefix too many" in message and "save_pretrained" in message


def test_a_model_is_called_as_its_folder_or_file(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Llama-3.1-8B-Instruct", "x.gguf.d", ".hidden"):
        llama = llama.rename(llama.with_name(name))
        with open_source(llama) as source:
            assert source.name == name
            header = make_header(source, make_partition(source.config, [1]), 0, choose_formats(source, "auto"))
            assert header.model == name
    monkeypatch.chdir(llama)
    with open_source(".") as source:
        assert source.name == ".hidden"
    (llama / "config.json").unlink()
    for name, shown in (("Qwen3-0.6B.Q4_K_M.gguf", "Qwen3-0.6B.Q4_K_M"), ("M.GGUF", "M")):
        with open_source(write_tiny_gguf(llama / name)) as source:
            assert source.name == shown
        with open_source(llama) as source:  # which finds M.GGUF too
            assert source.path.name == name
        (llama / name).unlink()


def test_a_window_in_a_llama_gguf_is_mistrals(tmp_path: Path) -> None:
    """Mistral's files are of architecture llama: what they hold is what transformers computes, the window included."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    directory = write_tiny_hf(tmp_path / "hf", "mistral-window", num_hidden_layers=2, rope_parameters=rope)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {
        str(names.get_name(name, try_suffixes=(".weight",))): values
        for name, values in load_file(directory / "model.safetensors").items()
    }
    path = write_tiny_gguf(
        tmp_path / "m.gguf", tensors=tensors, kind=F32, edit=lambda writer: writer.add_sliding_window(7)
    )
    with open_source(path) as file, open_source(directory) as theirs:
        assert np.float32(theirs.config.norm_eps) == np.float32(file.config.norm_eps)
        same = replace(file.config, architecture="mistral", norm_eps=theirs.config.norm_eps)  # GGUF has it as f32
        assert same == theirs.config and theirs.config.attention_windows == (7, 7)
        for name in theirs.tensors():
            np.testing.assert_array_equal(file.read(name), theirs.read(name))
