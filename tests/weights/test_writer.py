"""Slicing keeps what it promises: memory, formats, and that it needs neither MPI nor torch."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import gguf
import h5py
import numpy as np
import pytest

from tests.support.formats import EVERY_QUANTIZED
from tests.support.slices import joined
from tests.support.tiny_models import write_tiny_hf
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import decode, encode
from tpimpi.compute.formats.quantize import quantize
from tpimpi.errors import InputError, ModelError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.weights.make import choose_formats, requantized, slice_model
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

LARGE = (
    "embed_tokens.weight",
    "lm_head.weight",
    *(f"layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
)


@pytest.mark.parametrize("fmt", ["f32", "q4_1"])
@pytest.mark.slow_but("f32")
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path, fmt: str) -> None:
    model = write_tiny_hf(
        tmp_path / "model", "llama", vocab_size=200_000, intermediate_size=150_016, num_hidden_layers=1
    )
    (model / "tokenizer.json").write_text("{}")
    with open_source(model) as source:
        assert min(np.prod(source.tensors()[name].shape) * 4 for name in LARGE) > 36e6
        plan, formats = make_partition(source.config, [1, 1]), choose_formats(source, fmt)
        tracemalloc.start()
        slice_model(source, plan, formats, tmp_path / "slices")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 32e6


def test_every_file_is_on_the_disk_before_the_first_gets_its_name(
    llama_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        done.append("on the disk")

    def named(path: Path, target: Path) -> Path:
        done.append("named")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", named)
    with open_source(llama_model) as source:
        slice_model(source, make_partition(source.config, [1, 1, 1]), choose_formats(source, "f32"), tmp_path)
    assert done == ["on the disk"] * 3 + ["named"] * 3


def test_progress_goes_up_to_all_there_is(llama_model: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    with open_source(llama_model) as source:
        slice_model(
            source,
            make_partition(source.config, [1, 2]),
            choose_formats(source, "bf16"),
            tmp_path,
            lambda done, total: steps.append((done, total)),
        )
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert steps[-1][0] == steps[-1][1]
    assert len({total for _, total in steps}) == 1


# Formats


@pytest.mark.parametrize(
    ("dtype", "wanted", "found"),
    [
        ("float32", "auto", "f32"),
        ("bfloat16", "auto", "bf16"),
        ("float16", "auto", "f16"),
        ("bfloat16", "f32", "f32"),
        ("float32", "bf16", "bf16"),
        ("float32", "q8_0", "q8_0"),
        ("bfloat16", "q4_0", "q4_0, head q8_0"),
        ("float32", "q4_1", "q4_1, head q8_0"),
    ],
)
def test_auto_keeps_the_precision_of_the_source(tmp_path: Path, dtype: str, wanted: str, found: str) -> None:
    path = write_tiny_hf(tmp_path / "model", "qwen2", dtype=dtype)
    with open_source(path) as source:
        chosen = choose_formats(source, wanted)
        assert chosen.describe() == found
        assert requantized(source, make_partition(source.config, [1]), chosen) == ""
        slice_model(source, make_partition(source.config, [1]), chosen, tmp_path)
        file = SliceFile(tmp_path / slice_name(0, 1))
        outer = found.rsplit(maxsplit=1)[-1]
        formats = {p.format for r in file.records if r.block.kind in ("attn", "mlp") for p in r.parts if p.is_matrix}
        head = {p.format for r in file.records_of("head") for p in r.parts}
        assert formats == {found.split(",", maxsplit=1)[0]}
        assert head == {file.header.formats.embedding} == {outer}
        embedding = decode(encode(source.read("embed_tokens.weight"), outer), outer, 64)
        np.testing.assert_array_equal(file.embedding_rows([5, 0, 159]), embedding[[5, 0, 159]])
        file.close()
        with pytest.raises(InputError, match=r"format is 'f64', must be auto, f32, bf16, f16, q8_0, .* or q5_k_m"):
            choose_formats(source, "f64")


def random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, seed: int) -> np.ndarray:
    """Rows of blocks as gguf quantizes normal numbers; where it cannot, any codes with a small scale."""
    dice = np.random.default_rng(seed)
    numbers = dice.standard_normal((rows, columns), dtype=np.float32) * 0.05
    try:
        return gguf.quants.quantize(numbers, kind)
    except NotImplementedError:
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = dice.integers(0, 256, (rows, columns // weights, size), np.uint8)
        form = FORMATS.get(kind.name.lower())
        for place in form.f16_offsets if form else (0,):
            blocks[:, :, place : place + 2] = np.frombuffer(np.float16(0.001).tobytes(), np.uint8)
        return blocks.reshape(rows, -1)


def write_gguf(
    path: Path, kind: str, *, head_dim: int = 32, kinds: dict[str, str] | None = None
) -> dict[str, np.ndarray]:
    """A GGUF file of qwen2 (whose rows are not permuted), matrices of `kind`, some of other `kinds`.

    Returns what gguf.quants reads from its matrices, by their names.
    """
    heads, hidden, columns = 256 // head_dim, 256, 512
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(columns)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", b"b"])
    shapes = {"token_embd": (160, hidden), "output": (160, hidden)}
    for layer in range(2):
        rows = {"attn_q": 256, "attn_k": 128, "attn_v": 128, "ffn_gate": columns, "ffn_up": columns}
        shapes |= {f"blk.{layer}.{name}": (count, hidden) for name, count in rows.items()}
        shapes |= {f"blk.{layer}.attn_output": (hidden, 256), f"blk.{layer}.ffn_down": (hidden, columns)}
    numbers = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        stored = gguf.GGMLQuantizationType[(kinds or {}).get(name, kind).upper()]
        blocks = random_blocks(stored, *shape, seed)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=stored)
        numbers[name] = gguf.quants.dequantize(blocks, stored)
    vectors = {"output_norm.weight": hidden}
    for layer in range(2):
        sizes = {"attn_norm.weight": hidden, "ffn_norm.weight": hidden, "attn_q.bias": 256}
        sizes |= {"attn_k.bias": 128, "attn_v.bias": 128}
        vectors |= {f"blk.{layer}.{name}": size for name, size in sizes.items()}
    for name, size in vectors.items():
        writer.add_tensor(name, np.ones(size, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


@pytest.mark.parametrize("kind", EVERY_QUANTIZED)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_blocks_are_taken_over_without_loss(tmp_path: Path, kind: str, ranks: int) -> None:
    expected = write_gguf(tmp_path / "m.gguf", kind, kinds={"token_embd": "q8_0", "blk.1.attn_v": "q8_0"})
    with open_source(tmp_path / "m.gguf") as source:
        plan, formats = make_partition(source.config, [1] * ranks), choose_formats(source, "auto")
        assert requantized(source, plan, formats) == ""
        slice_model(source, plan, formats, tmp_path, quantizer=refusing)
    found = joined(tmp_path, ranks)
    assert found.keys() == expected.keys()
    for name, numbers in expected.items():
        np.testing.assert_array_equal(found[name], numbers, err_msg=name)


def refusing(values: np.ndarray, fmt: str) -> np.ndarray:
    raise AssertionError("nothing should be quantized")


def test_blocks_of_the_wanted_format_are_taken_over_too(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "m.gguf", "q4_0", kinds={"output": "q8_0", "token_embd": "q8_0"})
    with open_source(tmp_path / "m.gguf") as source:
        formats = choose_formats(source, "q4_0")
        assert formats == choose_formats(source, "auto")
        slice_model(source, make_partition(source.config, [1]), formats, tmp_path, quantizer=refusing)
        with pytest.raises(AssertionError, match="nothing should be quantized"):
            formats = choose_formats(source, "q8_0")
            slice_model(source, make_partition(source.config, [1]), formats, tmp_path / "other", quantizer=refusing)
    np.testing.assert_array_equal(joined(tmp_path, 1)["blk.1.ffn_down"], expected["blk.1.ffn_down"])


def test_heads_that_are_cut_within_blocks_are_quantized_again(tmp_path: Path) -> None:
    expected = write_gguf(tmp_path / "m.gguf", "q4_0", head_dim=16)
    with open_source(tmp_path / "m.gguf") as source:
        formats = choose_formats(source, "auto")
        assert (
            requantized(source, make_partition(source.config, [1, 1]), formats) == ""
        )  # a cut between two pairs of heads
        plan = make_partition(source.config, [5, 3, 8])
        assert requantized(source, plan, formats) == (
            "o_proj is re-quantized in its own q4_0, as heads of 16 columns are cut within its blocks of 32"
        )
        slice_model(source, plan, formats, tmp_path)
    found = joined(tmp_path, 3)
    for name, numbers in expected.items():
        if name.endswith("attn_output"):
            np.testing.assert_array_equal(found[name][:, 128:], numbers[:, 128:])  # rank 2's columns are whole blocks
            again = decode(encode(numbers[:, 80:128], "q4_0"), "q4_0", 48)
            np.testing.assert_array_equal(found[name][:, 80:128], again)
        else:
            np.testing.assert_array_equal(found[name], numbers, err_msg=name)


def test_other_types_are_quantized_again_and_that_is_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    from tpimpi.cli import slicing

    kinds = {"output": "iq3_s", "token_embd": "q6_k", "blk.0.attn_v": "iq3_s", "blk.1.ffn_down": "q8_0"}
    expected = write_gguf(tmp_path / "m.gguf", "iq2_xs", kinds=kinds)
    monkeypatch.setattr(slicing, "load_tokenizer", lambda *_: None)
    with open_source(tmp_path / "m.gguf") as source:
        plan, formats = make_partition(source.config, [1, 1]), choose_formats(source, "auto")
        assert formats.describe() == "q4_k, v q5_k in 1 layer, down q8_0 in 1 layer, head q5_k, embedding q6_k"
        for quiet in (True, False):
            slicing.slice_source(source, plan, formats, tmp_path / "out", quiet=quiet)
            said = capsys.readouterr().err
            expected_words = "iq2_xs is re-quantized to q4_k (q, k, v, o, gate, up, down; 2.31 to 4.50 bits a weight)"
            assert (expected_words in said) is not quiet
            assert ("iq3_s to q5_k (v, head; 3.44 to 5.50 bits a weight)\n" in said) is not quiet
            assert said.count("re-quantized") == (0 if quiet else 1)
        assert requantized(source, plan, choose_formats(source, "f32")) == ""
    found = joined(tmp_path / "out", 2)
    np.testing.assert_array_equal(found["blk.1.ffn_down"], expected["blk.1.ffn_down"])
    for name, numbers in expected.items():
        kind = kinds.get(name, "iq2_xs")
        error = np.sqrt(np.mean(np.square(found[name] - numbers)) / np.mean(np.square(numbers)))
        assert error < {"iq2_xs": 0.12, "iq3_s": 0.06, "q8_0": 1e-9, "q6_k": 1e-9}[kind], name


@pytest.mark.parametrize(
    ("layers", "more"),
    [
        (22, [0, 1, 4, 7, 10, 13, 16, 19, 20, 21]),
        (32, [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]),
        (4, [2, 3]),
    ],
)
def test_mixes_have_more_bits_where_llama_cpp_has(layers: int, more: list[int]) -> None:
    """Worked out by hand from its rule: i < n/8, or i >= 7n/8, or (i - n/8) % 3 == 2, in whole numbers."""
    for mix, main in (("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")):
        formats = ModelFormats.of(mix, layers)
        assert (formats.head, formats.embedding) == ("q6_k", "q6_k")
        for layer, here in enumerate(formats.layers):
            wide = "q6_k" if layer in more else main
            assert here.present() == dict.fromkeys(("q", "k", "o", "gate", "up"), main) | {"v": wide, "down": wide}


def test_numbers_in_blocks_of_256_do_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "q8_0")
    assert path
    with open_source(tmp_path / "m.gguf") as source:
        formats = choose_formats(source, "q4_k")
        for ranks in (1, 3):
            slice_model(source, make_partition(source.config, [1] * ranks), formats, tmp_path / str(ranks))
    one, three = joined(tmp_path / "1", 1), joined(tmp_path / "3", 3)
    for name, numbers in one.items():
        np.testing.assert_array_equal(three[name], numbers, err_msg=name)


def test_numbers_that_blocks_cannot_hold_name_the_tensor(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = write_tiny_hf(tmp_path / "model", "llama")
    (path / "tokenizer.json").write_text("{}")
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][70, 3] = np.inf
    save_file(tensors, path / "model.safetensors")
    said = r"model: tensor layers\.1\.mlp\.up_proj\.weight holds numbers that are not finite; download it again"
    with open_source(path) as source, pytest.raises(ModelError, match=said):
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "q8_0"), tmp_path / "out")
    write_gguf(tmp_path / "m.gguf", "q4_1")
    with open_source(tmp_path / "m.gguf") as source:
        stored = source._stored["layers.0.mlp.down_proj.weight"]
        place = stored.offset + 7 * stored.row_bytes + 3 * 20
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[place : place + 2] = np.float16("inf").tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    said = r"m\.gguf: tensor layers\.0\.mlp\.down_proj\.weight holds scales that are not finite; download it again"
    with open_source(tmp_path / "m.gguf") as source, pytest.raises(ModelError, match=said):
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "auto"), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_another_quantizer_may_be_handed_in(llama_model: Path, tmp_path: Path) -> None:
    shapes: set[tuple[int, int]] = set()

    def noted(numbers: np.ndarray, fmt: str) -> np.ndarray:
        shapes.add(numbers.shape)
        assert numbers.dtype == np.float32 and numbers.flags.c_contiguous
        return quantize(numbers, fmt)

    with open_source(llama_model) as source:
        plan, formats = make_partition(source.config, [1, 1]), choose_formats(source, "q4_1")
        slice_model(source, plan, formats, tmp_path / "own")
        slice_model(source, plan, formats, tmp_path / "handed", quantizer=noted)
    assert len(shapes) > 2
    for rank in range(2):  # the checksums, as HDF5 notes times in a file
        own, handed = (h5py.File(tmp_path / folder / slice_name(rank, 2)) for folder in ("own", "handed"))
        np.testing.assert_array_equal(own["checksums"], handed["checksums"])
