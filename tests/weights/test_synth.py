"""Random weights: the published shapes, the same numbers in every form, and runs without a tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from tests.support.formats import EVERY_FORMAT
from tests.support.launch import Result
from tests.support.ranks import Ranks
from tests.support.slices import joined
from tests.support.synth_cases import KINDS, Cli, made, write_config
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.bf16 import to_bf16
from tpimpi.engine.overlap import DENSE_CHUNK
from tpimpi.models.config import ModelConfig
from tpimpi.models.layer_spec import Rope
from tpimpi.models.layers.rope import rope_frequencies
from tpimpi.models.shapes import SHAPES, load_shape
from tpimpi.models.tensors import expected_tensors
from tpimpi.weights.make import slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import export, open_source
from tpimpi.weights.sources.synthetic import SIGMA, SyntheticSource, quantize_exactly

# What the publishers, or the model's page, give as the number of parameters.
PARAMETERS = {
    "tinyllama-1.1b": 1_100_048_384,
    "open-llama-3b": 3_426_473_600,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "yi-34b": 34_388_917_248,
    "qwen2.5-72b": 72_706_203_648,
    "llama-3.2-1b": 1_235_814_400,
    "qwen3-4b": 4_022_468_096,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
    "gemma-3-4b": 3_880_263_168,  # of the text model
    "gemma-3-12b": 11_766_034_176,
    "phi-4-mini": 3_836_021_760,
    "granite-3.3-8b": 8_170_864_640,
    "smollm3-3b": 3_075_098_624,
    "glm-4-9b": 9_400_279_040,
    "olmo-2-7b": 7_298_617_344,
    "mistral-small-24b": 23_572_403_200,
    "gpt-oss-20b": 20_914_757_184,  # of mixtures as transformers counts them, on the meta device
    "gpt-oss-120b": 116_829_156_672,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    "glm-4.5-air": 106_852_251_264,  # with 45 biases of 128, which are no parameters there
}


def _rope(config: ModelConfig) -> Rope:
    rope = config.layer(0).rope
    assert rope is not None
    return rope


def numbers_of(source: SyntheticSource) -> dict[str, np.ndarray]:
    return {name: source.read(name) for name in source.tensors()}


# Shapes


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_number_of_parameters(name: str) -> None:
    config = load_shape(name).config
    assert sum(int(np.prod(size)) for size in expected_tensors(config).values()) == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_what_transformers_reads_in_them(name: str) -> None:
    from transformers import AutoConfig

    shape = load_shape(name)
    theirs = AutoConfig.for_model(**shape.values)
    ours = shape.config
    assert (ours.hidden, ours.layers, ours.heads, ours.kv_heads) == (
        *(theirs.hidden_size, theirs.num_hidden_layers, theirs.num_attention_heads, theirs.num_key_value_heads),
    )
    assert (ours.context, ours.vocab) == (theirs.max_position_embeddings, theirs.vocab_size)
    rope = theirs.rope_parameters
    assert rope.get("full_attention", rope)["rope_theta"] == ours.rope_theta


def test_a_number_of_layers_can_be_asked_for(tmp_path: Path) -> None:
    shape = load_shape("llama-2-70b", layers=2)
    assert (shape.name, shape.config.layers, shape.config.hidden) == ("llama-2-70b-2-layers", 2, 8192)
    types = ["full_attention", "full_attention", "sliding_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 7, "layer_types": types}
    path = write_config(tmp_path / "named", "qwen2", **windows)
    assert load_shape(str(path), layers=4).config.attention_windows == (0, 0, 7, 0)
    assert load_shape(str(path.parent)).name == "named"


# The numbers


def test_a_seed_gives_these_numbers_for_ever(tmp_path: Path) -> None:
    """The digest was taken when the numbers were settled; slices of one set may be made on many machines."""
    digest = hashlib.sha256()
    for fmt in ("f32", "bf16", "q8_0", "q4_0", "q4_1"):
        source = made(write_config(tmp_path, "llama-bias"), fmt, seed=7)
        for name in source.tensors():
            digest.update(source.read_blocks(name).tobytes())
    assert digest.hexdigest() == "3bc692cf4d29f49e59aeb89329b6b03186d39068b8f0d3c3abcd505fd376af7b"


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@pytest.mark.slow_but("bf16", "q4_1")
def test_numbers_are_about_gaussian_and_bf16(tmp_path: Path, fmt: str) -> None:
    config = write_config(tmp_path, "llama-bias", intermediate_size=4096, vocab_size=20_000)
    for name, values in numbers_of(made(config, fmt)).items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(to_bf16(values).astype(np.uint32) << 16, values.view(np.uint32), err_msg=name)
        if name.endswith("norm.weight"):
            assert 0.5 <= values.min() < 0.9
            assert 1.1 < values.max() <= 1.5
        elif values.ndim > 1:
            error = SIGMA / values.size**0.5
            # The pool's own mean is not quite 0; numbers of iq4 and q2_k lie otherwise below 0 than above it.
            assert abs(values.mean()) < 5 * error + (4e-4 if fmt in ("iq4_nl", "iq4_xs", "q2_k") else 2e-5), name
            few = fmt == "mxfp4"  # its greatest number is 2.3 standard deviations
            spread = {"mxfp4": 0.1, "q2_k": 0.1, "q3_k": 0.03}.get(
                fmt, 0.02
            )  # steps as wide as a part of the deviation
            assert values.std() == pytest.approx(SIGMA, rel=spread), name
            fourth = np.mean(((values - values.mean()) / values.std()) ** 4)  # 3 for a Gaussian
            assert (2 if few else 2.6) < fourth < 3.1, (name, fourth)
        else:
            assert values.std() == pytest.approx(SIGMA, rel=0.25), name


def test_rows_and_tensors_differ_and_are_not_related(tmp_path: Path) -> None:
    source = made(write_config(tmp_path, vocab_size=60_000), "q8_0")
    table = source.read_blocks("embed_tokens.weight")
    assert len(np.unique(table, axis=0)) == 60_000
    few = source.read("embed_tokens.weight")[:1500].astype(np.float64)
    cosines = np.corrcoef(few)[np.triu_indices(1500, 1)]
    assert abs(cosines).max() < 0.5  # 1 / sqrt(256) is one standard deviation; rows at one place would have 1
    layers = [source.read(f"layers.{layer}.mlp.up_proj.weight").reshape(-1) for layer in (0, 1)]
    assert abs(np.corrcoef(*layers)[0, 1]) < 0.02


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@pytest.mark.slow_but("q4_0", "q4_k")
def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path, fmt: str) -> None:
    config = write_config(tmp_path, "qwen2", hidden_size=264, head_dim=24)  # 264 is no multiple of 32
    whole, other, different = made(config, fmt), made(config, fmt), made(config, fmt, seed=1)
    for name, info in reversed(list(whole.tensors().items())):
        blocks, numbers = whole.read_blocks(name), whole.read(name)
        assert blocks.shape[0] == info.shape[0]
        for rows in (slice(5, 6), slice(3, 20), slice(-4, None), slice(8, 8)):
            np.testing.assert_array_equal(other.read_blocks(name, rows), blocks[rows], err_msg=name)
            np.testing.assert_array_equal(other.read(name, rows), numbers[rows], err_msg=name)
        assert not np.array_equal(different.read_blocks(name, slice(0, 5)), blocks[:5]), name
    assert whole.fingerprint() == other.fingerprint() != different.fingerprint()
    with pytest.raises(ValueError, match="step is 2"):
        whole.read_blocks("norm.weight", slice(0, 8, 2))
    with pytest.raises(KeyError):
        whole.read("layers.3.mlp.up_proj.weight")


@pytest.mark.parametrize("fmt", ["q8_0", "q4_0", "q4_1"])
def test_blocks_are_ggufs(tmp_path: Path, fmt: str) -> None:
    source = made(write_config(tmp_path), fmt)
    name = "layers.1.mlp.down_proj.weight"
    blocks, kind = source.read_blocks(name), gguf.GGMLQuantizationType[fmt.upper()]
    numbers = dequantize(blocks, kind)
    np.testing.assert_array_equal(source.read(name), numbers)
    np.testing.assert_array_equal(quantize_exactly(numbers, fmt), blocks)


# The same weights in every form


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@pytest.mark.parametrize("ranks", [1, 3])
def test_slices_hold_the_sources_numbers(tmp_path: Path, fmt: str, ranks: int) -> None:
    """Also where heads of 24 columns are cut within blocks, and rows are no whole blocks."""
    config = write_config(tmp_path, hidden_size=200, head_dim=24, intermediate_size=100)
    source = made(config, fmt)
    plan = make_partition(source.config, [2, 1, 1][:ranks])
    slice_model(source, plan, source.formats, tmp_path / "slices", quantizer=quantize_exactly)
    found, expected = joined(tmp_path / "slices", ranks), numbers_of(source)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    stems = {name: name if name == "lm_head.weight" else f"model.{name}" for name in expected if "norm" not in name}
    assert {names.get_name(stem.removesuffix(".weight")) for stem in stems.values()} == found.keys()
    for name, stem in stems.items():
        stored = names.get_name(stem.removesuffix(".weight"))
        np.testing.assert_array_equal(found[str(stored)], expected[name], err_msg=name)


@pytest.mark.parametrize("fmt", EVERY_FORMAT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_and_the_gguf_file_hold_the_same_numbers(
    tmp_path: Path, kind: str, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MAX_FILE_BYTES", 300_000)
    # Rows of a GGUF file are whole blocks.
    large = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64}
    large |= {"num_key_value_heads": 2}
    source = made(write_config(tmp_path / "shape", kind, **(large if FORMATS[fmt].block_weights == 256 else {})), fmt)
    export.write_hf(source, tmp_path / "hf", lambda done, total: None)
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    expected = numbers_of(source)

    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert {file.name for file in (tmp_path / "hf").iterdir()} == {
        *("config.json", "model.safetensors.index.json"),
        *index["weight_map"].values(),
    }
    with open_source(tmp_path / "hf") as hf, open_source(tmp_path / "model.gguf") as file:
        assert hf.config == source.config
        assert hf.tensors().keys() == file.tensors().keys() == source.tensors().keys()
        for name, info in source.tensors().items():
            assert hf.tensors()[name].format == "bf16"
            assert (file.tensors()[name].format, file.tensors()[name].shape) == (info.format, info.shape)
            np.testing.assert_array_equal(hf.read(name), expected[name], err_msg=name)
            np.testing.assert_array_equal(file.read_blocks(name), source.read_blocks(name), err_msg=name)
        assert file.config.vocab == 160
        theirs, ours = (rope_frequencies(_rope(config), 160) for config in (file.config, source.config))
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_transformers_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(export, "MAX_FILE_BYTES", 300_000)
    source = made(write_config(tmp_path / "shape", "qwen2"), "q4_1")
    export.write_hf(source, tmp_path / "hf", lambda done, total: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    found = {name.removeprefix("model."): value.float().numpy() for name, value in model.state_dict().items()}
    expected = numbers_of(source)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_gguf_rows_of_q_and_k_are_interleaved(tmp_path: Path) -> None:
    """The oracle is the permutation of llama.cpp's converter; gguf's own reader reads the file."""
    source = made(write_config(tmp_path / os.fsdecode(b"Llama-3.1-\xff")), "f32")
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.name"].contents() == "Llama-3.1-?-random"
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, heads in (("q", 8), ("k", 2)):
        weights = source.read(f"layers.2.self_attn.{name}_proj.weight")
        permuted = weights.reshape(heads, 2, weights.shape[0] // heads // 2, 256).swapaxes(1, 2).reshape(weights.shape)
        assert not np.array_equal(permuted, weights)
        np.testing.assert_array_equal(tensors[f"blk.2.attn_{name}.weight"], permuted)
    np.testing.assert_array_equal(tensors["blk.2.attn_v.weight"], source.read("layers.2.self_attn.v_proj.weight"))


@pytest.mark.parametrize("kind", ["llama-3.1", "llama-bias", "qwen2"])
@pytest.mark.slow
def test_runs_give_the_tokens_of_transformers(tpimpi: Cli, on_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape = str(write_config(tmp_path / "shape", kind, vocab_size=5000, max_position_embeddings=256))
    synth = ("synth", "--shape", shape, "--format", "f32", "--seed", "3", "--quiet")
    assert tpimpi(*synth, "--as", "hf", "--out", str(tmp_path / "hf")) == Result(0, "", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    dice = np.random.default_rng(0)
    prompts = [dice.integers(0, 5000, length).tolist() for length in range(1, 33)]
    # Two of more positions than are computed at once: a seam at the last token, and one in the middle.
    prompts += [dice.integers(0, 5000, length).tolist() for length in (DENSE_CHUNK + 1, DENSE_CHUNK + 60)]
    answers = []
    for prompt in prompts:
        with torch.no_grad():
            ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=2, eos_token_id=None)
        answers.append(ids[0, len(prompt) :].tolist())
    assert len({tuple(answer) for answer in answers}) > 24, "answers that are alike would show little"
    for ranks in (1, 2):
        result = tpimpi(*synth, "--ranks", str(ranks), "--out", str(tmp_path / "slices"))
        assert result == Result(0, "", "")
        arguments = ("--slices", str(tmp_path / "slices"), "--raw", "--ignore-eos", "--quiet", "--max-tokens", "2")
        lines = "".join(" ".join(map(str, prompt)) + "\n" for prompt in prompts)
        result = on_ranks(ranks, "-m", "tpimpi", *arguments, stdin=lines)
        assert (result.code, result.err) == (0, "")
        assert [list(map(int, line.split())) for line in result.out.splitlines()] == answers
