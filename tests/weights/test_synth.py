"""Random weights: the published shapes, the same numbers in every form, and runs without a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from tests.support.launch import Result
from tests.support.ranks import Ranks
from tests.support.slices import joined
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.compute.formats.bf16 import to_bf16
from tpimpi.errors import InputError, ModelError, StorageError
from tpimpi.models.config import ModelConfig
from tpimpi.models.layers.rope import rope_frequencies
from tpimpi.models.shapes import SHAPES, load_shape
from tpimpi.models.tensors import expected_tensors
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.text.load import tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.weights.make import slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import export, open_source
from tpimpi.weights.sources.synthetic import SIGMA, SyntheticSource, quantize_exactly

Cli = Callable[..., Result]

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
}

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}
LLAMA_3_1 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3.1": {"rope_scaling": LLAMA_3_1},
    "llama-bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 64},
}


def write_config(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps({**SMALL, **KINDS[kind], **changes}))
    return path


def made(config: Path, fmt: str = "q4_0", seed: int = 0) -> SyntheticSource:
    shape = load_shape(str(config))
    return SyntheticSource(shape, ModelFormats.of(fmt, shape.config.layers), seed)


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
    assert theirs.rope_parameters["rope_theta"] == ours.rope_theta


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
    for fmt in WEIGHT_FORMATS:
        source = made(write_config(tmp_path, "llama-bias"), fmt, seed=7)
        for name in source.tensors():
            digest.update(source.read_blocks(name).tobytes())
    assert digest.hexdigest() == "3bc692cf4d29f49e59aeb89329b6b03186d39068b8f0d3c3abcd505fd376af7b"


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
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
            assert abs(values.mean()) < 5 * error + 2e-5, name  # the pool's own mean is not quite 0
            assert values.std() == pytest.approx(SIGMA, rel=0.02), name
            fourth = np.mean(((values - values.mean()) / values.std()) ** 4)  # 3 for a Gaussian
            assert 2.6 < fourth < 3.1, (name, fourth)
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


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
def test_rows_do_not_depend_on_how_they_are_asked_for(tmp_path: Path, fmt: str) -> None:
    config = write_config(tmp_path, "qwen2", hidden_size=264, head_dim=24)  # 264 is no multiple of 32
    whole, other = made(config, fmt), made(config, fmt)
    for name, info in reversed(list(whole.tensors().items())):
        blocks = whole.read_blocks(name)
        assert blocks.shape[0] == info.shape[0]
        for rows in (slice(5, 6), slice(3, 20), slice(-4, None), slice(8, 8)):
            np.testing.assert_array_equal(other.read_blocks(name, rows), blocks[rows], err_msg=name)
            np.testing.assert_array_equal(other.read(name, rows), whole.read(name)[rows], err_msg=name)
        assert not np.array_equal(made(config, fmt, seed=1).read_blocks(name), blocks), name
    assert whole.fingerprint() == other.fingerprint() != made(config, fmt, seed=1).fingerprint()
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


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
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


@pytest.mark.parametrize("fmt", WEIGHT_FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_and_the_gguf_file_hold_the_same_numbers(
    tmp_path: Path, kind: str, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "FILE_BYTES", 300_000)
    source = made(write_config(tmp_path / "shape", kind), fmt)
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
        theirs, ours = (rope_frequencies(config) for config in (file.config, source.config))
        np.testing.assert_allclose(theirs, ours, rtol=1e-6)


def test_transformers_reads_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(export, "FILE_BYTES", 300_000)
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
    source = made(write_config(tmp_path), "f32")
    export.write_gguf(source, tmp_path / "model.gguf", lambda done, total: None)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    for name, heads in (("q", 8), ("k", 2)):
        weights = source.read(f"layers.2.self_attn.{name}_proj.weight")
        permuted = weights.reshape(heads, 2, weights.shape[0] // heads // 2, 256).swapaxes(1, 2).reshape(weights.shape)
        assert not np.array_equal(permuted, weights)
        np.testing.assert_array_equal(tensors[f"blk.2.attn_{name}.weight"], permuted)
    np.testing.assert_array_equal(tensors["blk.2.attn_v.weight"], source.read("layers.2.self_attn.v_proj.weight"))


@pytest.mark.parametrize("kind", ["llama-3.1", "llama-bias", "qwen2"])
@pytest.mark.slow_but("qwen2")
def test_runs_give_the_tokens_of_transformers(tpimpi: Cli, on_ranks: Ranks, tmp_path: Path, kind: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shape = str(write_config(tmp_path / "shape", kind, vocab_size=5000))
    synth = ("synth", "--shape", shape, "--format", "f32", "--seed", "3", "--quiet")
    assert tpimpi(*synth, "--as", "hf", "--out", str(tmp_path / "hf")) == Result(0, "", "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    dice = np.random.default_rng(0)
    prompts = [dice.integers(0, 5000, length).tolist() for length in range(1, 33)]
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


# The command


def test_what_is_made_is_said_and_shown(tpimpi: Cli, tmp_path: Path) -> None:
    shape = str(write_config(tmp_path / "toy"))
    out = tmp_path / "slices"
    result = tpimpi("synth", "--shape", shape, "--layers", "1", "--ranks", "3", "--shares", "2,1,1", "--out", str(out))
    assert result.code == 0
    said = f"{out}: rank-0-of-3.h5 to rank-2-of-3.h5 (q4_0, head q8_0, shares 2,1,1)"
    assert result.err.splitlines()[-1] == said
    shown = tpimpi("inspect", str(out), "--verify")
    assert shown.code == 0, shown.err
    words = " ".join(shown.out.split())
    assert "toy-1-layer-rand" in words
    assert words.count("every byte") == 3
    assert words.count("tokenizer") == 1  # of rank 0, which would have one

    result = tpimpi("synth", "--shape", shape, "--as", "gguf", "--out", str(tmp_path / "new" / "model.gguf"))
    assert result.code == 0
    shown = tpimpi("inspect", str(tmp_path / "new" / "model.gguf"), "--verify")
    assert shown.code == 0, shown.err
    assert "21 q4_0" in shown.out
    assert "2 q8_0" in shown.out


def test_help_names_the_shapes(tpimpi: Cli) -> None:
    result = tpimpi("synth", "--help")
    assert (result.code, result.err) == (0, "")
    words = result.out.split()
    assert {f"{name}," for name in SHAPES} <= set(words)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--shape", "llama-9", "--ranks", "2"],
            "--shape is 'llama-9', must be one of tinyllama-1.1b, open-llama-3b, llama-2-7b, llama-2-13b, llama-2-70b",
        ),
        (["--ranks", "0"], "--ranks is 0, must be 1 to 4096"),
        ([], "--ranks is missing; say how many slices to make, or write the model --as hf or gguf"),
        (["--ranks", "2", "--shares", "1,2,3"], "--shares is '1,2,3', must be 2 numbers with commas between them"),
        (["--ranks", "2", "--format", "auto"], "--format is 'auto', must be one of f32, bf16, q8_0, q4_0, q4_1"),
        (["--ranks", "2", "--layers", "0"], "--layers is 0, must be 1 to 4096"),
        (["--as", "hf", "--ranks", "2"], "--ranks is for slices; leave it out with --as hf"),
        (["--as", "gguf", "--shares", "2,1"], "--shares is for slices; leave it out with --as gguf"),
        (["--as", "gguf"], "must be the name of a file that ends in .gguf"),
        (["--as", "tar"], "argument --as: invalid choice: 'tar'"),
    ],
)
def test_bad_input_is_said_in_one_line(tpimpi: Cli, tmp_path: Path, arguments: list[str], line: str) -> None:
    given = arguments if "--shape" in arguments else ["--shape", "llama-2-7b", *arguments]
    result = tpimpi("synth", *given, "--out", str(tmp_path / "out"))
    assert result.code == 2
    assert len(result.err.splitlines()) == 1
    assert line in result.err
    assert not (tmp_path / "out").exists()


def test_a_shape_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"--shape is .*, must be one of tinyllama-1.1b, .* or the path of a config\.json"
    ):
        load_shape(str(tmp_path))
    with pytest.raises(InputError, match=r"--shape is 'x\\x00y', must be one of"):
        load_shape("x\0y")
    path = write_config(tmp_path, model_type="gpt2")
    with pytest.raises(ModelError, match=r"config\.json: model_type is 'gpt2', which tpimpi does not compute"):
        load_shape(str(path))
    path.write_text("{")
    with pytest.raises(ModelError, match=r"config\.json: is no JSON .*; give a model's config\.json"):
        load_shape(str(path), layers=1)
    path.write_text(" " * 2**20 + "{}")
    with pytest.raises(ModelError, match="is longer than 1 MiB"):
        load_shape(str(path))


def config_of(**changes: Any) -> ModelConfig:
    from tpimpi.models.config_hf import config_from_hf

    return config_from_hf({**SMALL, **changes}, "config.json")


def test_what_a_gguf_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    odd = config_of(intermediate_size=100)
    with pytest.raises(InputError, match="rows of 100 numbers, q4_0 in a GGUF file needs a multiple of 32"):
        export.check_gguf(odd, "q4_0", path)
    export.check_gguf(odd, "bf16", path)
    windows = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    with pytest.raises(InputError, match="attention windows"):
        export.check_gguf(config_of(model_type="qwen2", **windows), "q4_0", path)
    export.check_gguf(config_of(model_type="mistral", sliding_window=9), "q4_0", path)
    path.mkdir()
    with pytest.raises(InputError, match="is no regular file; give another name"):
        export.check_gguf(config_of(), "q4_0", path)


def test_nobodys_weights_are_written_over(tmp_path: Path) -> None:
    source, out = made(write_config(tmp_path / "shape")), tmp_path / "hf"
    out.mkdir()
    export.write_hf(source, out, lambda done, total: None)
    export.write_hf(source, out, lambda done, total: None)  # our own
    config = out / "config.json"
    values = json.loads(config.read_text())
    del values["_tpimpi_synth"]
    for text in (json.dumps(values), "[]", "1", "{"):
        config.write_text(text)
        with pytest.raises(InputError, match=r"holds 'config\.json' and no config\.json that synth wrote"):
            export.write_hf(source, out, lambda done, total: None)
        assert config.read_text() == text
    config.unlink()
    with pytest.raises(InputError, match=r"holds 'model-00001-of-00001\.safetensors' and no config"):
        export.write_hf(source, out, lambda done, total: None)
    with pytest.raises(StorageError, match=r"cannot write .*: File name too long; choose another place with --out"):
        export.write_hf(source, tmp_path / ("x" * 300), lambda done, total: None)
    with pytest.raises(InputError, match="is no folder"):
        export.write_hf(source, tmp_path / "shape" / "config.json", lambda done, total: None)


@pytest.mark.parametrize("write", [export.write_hf, export.write_gguf])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made(write_config(tmp_path / "shape"))
    out = tmp_path / "out" / "model.gguf"
    write(source, out, lambda done, total: None)
    before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(source, out, stop)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before
    usage = export.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"disk full: the weights need 0\.00 GB, .* 0\.00 GB free"):
        write(source, out, lambda done, total: None)
    assert {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("write", [export.write_hf, export.write_gguf])
def test_progress_ends_at_all_there_is(tmp_path: Path, write: Any) -> None:
    steps: list[tuple[int, int]] = []
    write(made(write_config(tmp_path)), tmp_path / "new.gguf", lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert [done == total for done, total in steps] == [False] * (len(steps) - 1) + [True]


# Runs without a tokenizer


def test_token_ids_stand_in_for_a_tokenizer() -> None:
    ids = tokenizer_of_slices({}, 1000)
    assert isinstance(ids, TokenIds)
    assert ids.encode("1 15,29\n  999,, 0") == [1, 15, 29, 999, 0]
    assert ids.encode(" ") == []
    for word in ("1000", "-1", "+1", "1.5", "0x1", "1_0", "hello", "\u0661", "\u00b2", "9" * 5000):
        with pytest.raises(
            InputError, match="is no token id; these slices have no tokenizer, so give whole numbers below 1000"
        ):
            ids.encode(f"1 {word}")
    stream = ids.stream()
    assert [stream.push(7), stream.push(0), stream.push(999), stream.flush()] == ["7", " 0", " 999", ""]
    with pytest.raises(ModelError, match="no tokenizer beside the model"):
        tokenizer_of_slices({"config.json": b"{}"}, 1000)


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth")
    source = made(write_config(folder / "shape"))
    plan = make_partition(source.config, [1.0])
    with closing(source):
        slice_model(source, plan, source.formats, folder / "slices", quantizer=quantize_exactly)
    return folder / "slices"


def test_lines_of_ids_are_answered_with_ids(tpimpi: Cli, slices: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    arguments = ("--slices", str(slices), "--raw", "--max-tokens", "5", "--quiet", "--report", str(report))
    result = tpimpi(*arguments, stdin="1 2 3\nhello\n4,5\n")
    assert result.code == 2
    assert result.err.splitlines() == [
        "tpimpi: 'hello' is no token id; these slices have no tokenizer, so give whole numbers below 160 with blanks or "
        "commas between them"
    ]
    answers = json.loads(report.read_text())["answers"]
    assert len(answers) == 2
    assert result.out == "".join(answer["text"] + "\n" for answer in answers)
    for answer in answers:
        assert len(answer["text"].split()) == 5
        assert all(0 <= int(word) < 160 for word in answer["text"].split())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "these slices have no tokenizer (synth made them), so a prompt is token ids; give --raw, and ids such as"),
        (
            ["--raw", "--stop", "5"],
            "these slices have no tokenizer, so there is no text to stop before; leave --stop out",
        ),
    ],
)
def test_wishes_that_need_a_tokenizer_are_refused(tpimpi: Cli, slices: Path, arguments: list[str], line: str) -> None:
    result = tpimpi("--slices", str(slices), "--prompt", "1 2", *arguments)
    assert (result.code, result.out) == (2, "")
    assert line in result.err


def test_perplexity_of_ids(tpimpi: Cli, slices: Path, tmp_path: Path) -> None:
    text, report = tmp_path / "ids.txt", tmp_path / "report.json"
    text.write_text(" ".join(str(number * number % 160) for number in range(200)))
    result = tpimpi("perplexity", str(text), "--slices", str(slices), "--context", "50", "--report", str(report))
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert (found["text_tokens"], found["tokens_scored"], found["bos"]) == (200, 196, False)
    assert 100 < found["perplexity"] < 300  # the weights know nothing: about as many as there are tokens


def test_a_model_without_a_tokenizer_is_still_not_sliced(tpimpi: Cli, tmp_path: Path) -> None:
    config = str(write_config(tmp_path / "shape"))
    assert tpimpi("synth", "--shape", config, "--as", "hf", "--out", str(tmp_path / "hf")).code == 0
    result = tpimpi("slice", "--model", str(tmp_path / "hf"), "--ranks", "1", "--out", str(tmp_path / "slices"))
    assert result.code == 2
    assert "no tokenizer beside the model" in result.err
