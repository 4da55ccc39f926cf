"""Experts as files have them: stacks, pairs of blocks and scales, one by one; and what is missing or of another shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.gguf_models import write_gguf_of
from tests.support.mxfp4_pairs import Tensors, dequantized, edit_config, with_pairs
from tests.support.sources_cases import edit_tensors, refusal
from tests.support.tiny_models import write_tiny_hf
from tpimpi.models.config import ModelConfig
from tpimpi.weights.sources import decode, open_source
from tpimpi.weights.sources.weight_file import WeightFile

GGUF_KINDS = ("qwen3-moe-all", "mixtral", "gpt-oss", "olmoe", "granite-moe", "glm4-moe", "glm4-moe-bare")
EXPERTS = "model.layers.{}.mlp.experts"


def in_f32(config: ModelConfig) -> dict[str, Any]:
    """Its fields, numbers rounded to what GGUF holds."""
    values = dataclasses.asdict(config)
    values |= {f"rope {key}": value for key, value in (values.pop("rope_scaling") or {}).items()}
    return {key: np.float32(value) if isinstance(value, float) else value for key, value in values.items()}


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_a_gguf_file_has_the_numbers_of_the_folder(kind: str, tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / kind, kind)
    with open_source(folder) as source, open_source(write_gguf_of(folder, tmp_path / "m.gguf")) as stacked:
        assert in_f32(stacked.config) == in_f32(source.config)
        assert list(stacked.tensors()) == list(source.tensors())
        for name, info in source.tensors().items():
            assert stacked.tensors()[name].shape == info.shape
            np.testing.assert_array_equal(stacked.read(name), source.read(name), err_msg=name)


def test_an_old_gguf_file_of_a_mixtral_has_its_experts_one_by_one(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "mixtral")
    file = write_gguf_of(folder, tmp_path / "new.gguf")
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "llama")
    for key, field in reader.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if "_exps" in tensor.name:
            for expert, matrix in enumerate(tensor.data):
                writer.add_tensor(tensor.name.replace("_exps", f".{expert}"), np.ascontiguousarray(matrix))
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_source(file) as new, open_source(tmp_path / "old.gguf") as old:
        for name in new.tensors():
            np.testing.assert_array_equal(old.read(name), new.read(name), err_msg=name)


# mxfp4 as pairs of blocks and scales


def test_pairs_of_blocks_and_scales_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "gpt-oss")
    tensors = with_pairs(folder)
    with open_source(folder) as source:
        stacks = dict(dequantized(tensors))
        for layer in range(3):
            for part in ("gate_up_proj", "down_proj"):
                theirs = stacks[f"{EXPERTS.format(layer)}.{part}"]
                parts = {"down_proj": theirs}
                if part == "gate_up_proj":
                    parts = {"gate_proj": theirs[..., ::2], "up_proj": theirs[..., 1::2]}
                for own, stack in parts.items():
                    for expert in range(8):
                        name = f"layers.{layer}.mlp.experts.{expert}.{own}.weight"
                        assert source.tensors()[name].format == "mxfp4"
                        np.testing.assert_array_equal(source.read(name), stack[expert].T)
                        some = source.read_blocks(name, slice(5, 38))
                        np.testing.assert_array_equal(decode("mxfp4", some), stack[expert].T[5:38])
        assert source.tensors()["layers.0.self_attn.q_proj.weight"].format == "f32"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.pop(f"{EXPERTS.format(1)}.down_proj_scales"),
            ["down_proj_blocks holds bytes", "down_proj_scales"],
        ),
        (
            lambda t: t.pop(f"{EXPERTS.format(1)}.down_proj_blocks"),
            ["down_proj_scales holds bytes", "down_proj_blocks"],
        ),
        (
            lambda t: t.update({f"{EXPERTS.format(0)}.gate_up_proj_scales": np.zeros((8, 128, 3), np.uint8)}),
            ["gate_up_proj_blocks has shape [8, 128, 2, 16]", "[8, 128, 3]"],
        ),
        (
            lambda t: t.update({f"{EXPERTS.format(0)}.down_proj_bias": np.zeros((8, 63), np.float32)}),
            ["down_proj_bias has shape [8, 63]", "8 x 64 rows"],
        ),
        (lambda t: t.update({"model.norm.weight": np.zeros(64, np.uint8)}), ["norm.weight holds bytes"]),
    ],
)
def test_pairs_that_do_not_fit_are_refused(edit: Callable[[Tensors], None], words: list[str], tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "gpt-oss")
    with_pairs(folder, edit)
    message = refusal(folder)
    assert all(word in message for word in words), message


def test_mxfp4_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "mixtral")
    edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    assert "MXFP4" in refusal(folder)
    gpt_oss = write_tiny_hf(tmp_path / "g", "gpt-oss")
    edit_config(gpt_oss, quantization_config={"quant_method": "fp8"})
    assert "FP8" in refusal(gpt_oss)


def test_of_a_stack_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    plain = WeightFile.read
    monkeypatch.setattr(
        WeightFile, "read", lambda self, offset, count: counts.append(count) or plain(self, offset, count)
    )
    folders = {kind: write_tiny_hf(tmp_path / kind, kind) for kind in ("granite-moe", "gpt-oss")}
    with open_source(folders["granite-moe"]) as source:
        counts.clear()
        source.read("layers.1.block_sparse_moe.experts.3.up_proj.weight", slice(2, 5))
        assert counts == [3 * 64 * 4]
    with open_source(
        folders["gpt-oss"]
    ) as source:  # a transposed stack: of each of 64 columns 3 rows and those between
        counts.clear()
        source.read("layers.1.mlp.experts.3.up_proj.weight", slice(2, 5))
        assert counts == [5 * 4] * 64


# Layers that predict further tokens


def add_next_token_layers(folder: Path, *layers: int) -> None:
    """Layers as GLM-4.5 has them: those of layer 1 again, and tensors of their own."""
    dice = np.random.default_rng(1)

    def add(tensors: Tensors) -> None:
        for layer in layers:
            again = {
                name.replace("layers.1.", f"layers.{layer}."): v for name, v in tensors.items() if "layers.1." in name
            }
            tensors |= again
            own = {"eh_proj": (64, 128), "enorm": (64,), "hnorm": (64,), "shared_head.norm": (64,)}
            for name, shape in own.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = dice.normal(size=shape).astype(np.float32)

    edit_tensors(folder, add)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path) -> None:
    folder, bare = (write_tiny_hf(tmp_path / name, "glm4-moe") for name in ("m", "bare"))
    add_next_token_layers(folder, 3)
    file = write_gguf_of(folder, tmp_path / "m.gguf")
    with open_source(bare) as one, open_source(folder) as other, open_source(file) as stacked:
        assert one.config == other.config and in_f32(one.config) == in_f32(stacked.config) and one.config.layers == 3
        assert list(one.tensors()) == list(other.tensors()) == list(stacked.tensors())
        name = "layers.2.mlp.experts.7.down_proj.weight"
        np.testing.assert_array_equal(stacked.read(name), one.read(name))


def test_more_layers_than_are_said_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "glm4-moe")
    add_next_token_layers(folder, 3, 4)
    assert "layers.4." in refusal(folder)
    edit_config(folder, num_nextn_predict_layers=0)
    assert "layers.3." in refusal(folder)
    edit_config(folder, num_nextn_predict_layers=2)
    open_source(folder).close()


# What is missing, or of another shape


@pytest.mark.parametrize(
    ("kind", "edit", "words"),
    [
        (
            "mixtral",
            lambda t: t.pop("model.layers.1.block_sparse_moe.experts.5.w2.weight"),
            ["model.layers.1.block_sparse_moe.experts.5.w2.weight of shape [64, 96] is missing"],
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.1.block_sparse_moe.experts.5.w2.weight": np.zeros((64, 32), np.float32)}),
            ["experts.5.w2.weight has shape [64, 32]", "[64, 96]"],
        ),
        (
            "mixtral",
            lambda t: t.update({"model.layers.0.block_sparse_moe.gate.weight": np.zeros((7, 64), np.float32)}),
            ["block_sparse_moe.gate.weight has shape [7, 64]", "[6, 64]"],
        ),
        (
            "granite-moe",
            lambda t: t.update(
                {"model.layers.0.block_sparse_moe.input_linear.weight": np.zeros((7, 192, 64), np.float32)}
            ),
            ["input_linear.weight has shape [7, 192, 64]", "8 x 192 rows"],
        ),
        (
            "gpt-oss",
            lambda t: t.update({f"{EXPERTS.format(0)}.gate_up_proj": np.zeros((8, 64, 96), np.float32)}),
            ["gate_up_proj has shape [8, 64, 96]", "8 x 128 columns"],
        ),
        ("gpt-oss", lambda t: t.pop("model.layers.2.self_attn.sinks"), ["model.layers.2.self_attn.sinks", "missing"]),
        (
            "glm4-moe",
            lambda t: t.update({"model.layers.1.mlp.gate.e_score_correction_bias": np.zeros(7, np.float32)}),
            ["mlp.gate.e_score_correction_bias has shape [7]", "[8]"],
        ),
    ],
)
def test_experts_that_do_not_fit_are_refused(
    kind: str, edit: Callable[[Tensors], None], words: list[str], tmp_path: Path
) -> None:
    folder = write_tiny_hf(tmp_path / "m", kind)
    edit_tensors(folder, edit)
    message = refusal(folder)
    assert all(word in message for word in words), message


def test_a_stack_of_too_few_experts_is_refused(tmp_path: Path) -> None:
    folder = write_tiny_hf(tmp_path / "m", "qwen3-moe-all")
    edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if ".experts.3." in name])
    message = refusal(write_gguf_of(folder, tmp_path / "m.gguf"))
    assert "ffn_down_exps.weight has shape [3, 64, 64]" in message and "4 x 64 rows" in message
