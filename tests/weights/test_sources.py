"""Tensors as transformers and gguf have them; broken, foreign and incomplete models refused in one line."""

from __future__ import annotations

import json
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.sources_cases import (
    edit_tensors,
    fingerprint,
    refusal,
    state_dict,
    write_tiny_gguf,
)
from tests.support.tiny_models import TINY, write_tiny_hf
from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import expected_tensors
from tpimpi.weights.sources import TOKENIZER_FILES, open_source


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_safetensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Hugging Face directories


def as_computed(theirs: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors as layers use them: fused ones one by one, a Gemma's norms whole, rows of a pair half a head apart."""
    made = {}
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    for name, values in theirs.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", np.split(values, [queries, queries + keys]), strict=True):
                made[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif ".experts." in name:
            made |= experts_one_by_one(name, values, config)
        elif config.architecture in ("mixtral", "granitemoe") and ("mlp.gate." in name or ".router." in name):
            router = {"mixtral": "block_sparse_moe.gate", "granitemoe": "block_sparse_moe.router.layer"}
            made[f"{'.'.join(name.split('.')[:2])}.{router[config.architecture]}.weight"] = values
        elif "gate_up_proj" in name or "shared_mlp.input_linear" in name:
            for part, rows in zip(("gate", "up"), np.split(values, 2), strict=True):
                spelled = name.replace("gate_up_proj", f"{part}_proj")
                made[spelled.replace("shared_mlp.input_linear", f"mlp.{part}_proj")] = rows
        elif config.architecture in ("glm", "glm4", "cohere2") and (".q_proj." in name or ".k_proj." in name):
            heads = values.reshape(-1, config.head_dim, *values.shape[1:])
            rotated, rest = np.split(heads, [config.rotary_dims or config.head_dim], axis=1)
            made[name] = np.concatenate([rotated[:, ::2], rotated[:, 1::2], rest], axis=1).reshape(values.shape)
        elif config.architecture.startswith("gemma") and name.endswith("norm.weight"):
            made[name] = values + np.float32(1)
        else:
            made[name] = values
    return made


def experts_one_by_one(name: str, values: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
    """The matrices, or biases, of all experts, from the one tensor that transformers has of them."""
    layer, part = ".".join(name.split(".")[:2]), name.rpartition(".")[2]
    kind = "bias" if part.endswith("_bias") else "weight"
    if config.architecture == "gpt_oss":
        values = values if kind == "bias" else values.swapaxes(1, 2)
        halves = [values[:, ::2], values[:, 1::2]]
    else:
        halves = np.split(values, 2, axis=1) if part.startswith("gate") else []
    parts = (
        dict(zip(("gate_proj", "up_proj"), halves, strict=True)) if part.startswith("gate") else {"down_proj": values}
    )
    short = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if config.architecture == "mixtral" else {}
    where = "block_sparse_moe" if config.architecture in ("mixtral", "granitemoe") else "mlp"
    return {
        f"{layer}.{where}.experts.{expert}.{short.get(own, own)}.{kind}": stack[expert]
        for own, stack in parts.items()
        for expert in range(config.experts)
    }


@pytest.mark.parametrize("kind", TINY)
def test_every_architecture_reads_as_transformers_loads(kind: str, tmp_path: Path) -> None:
    directory = write_tiny_hf(tmp_path / kind, kind)
    theirs = state_dict(directory)
    with open_source(directory) as source:
        if source.config.tied_head:
            theirs.pop("lm_head.weight", None)
        theirs = as_computed(theirs, source.config)
        assert set(source.tensors()) == set(theirs)
        for name, info in source.tensors().items():
            assert info.shape == theirs[name].shape and info.name == name and info.format == "f32"
            numbers = source.read(name)
            assert numbers.dtype == np.float32
            np.testing.assert_array_equal(numbers, theirs[name])


@pytest.mark.parametrize(("dtype", "format"), [("bfloat16", "bf16"), ("float16", "f16")])
def test_half_precision_and_shards_read_as_transformers_loads(dtype: str, format: str, tmp_path: Path) -> None:
    import torch

    directory = write_tiny_hf(tmp_path / "m", "llama-bias", dtype=dtype, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    theirs = state_dict(directory)
    with open_source(directory) as source:
        for name, info in source.tensors().items():
            assert info.format == format
            np.testing.assert_array_equal(source.read(name), theirs[name])
            stored = torch.from_numpy(theirs[name]).to(getattr(torch, dtype)).view(torch.uint8).numpy()
            np.testing.assert_array_equal(source.read_blocks(name).reshape(-1), stored.reshape(-1))


def test_shards_without_an_index(tmp_path: Path) -> None:
    directory = write_tiny_hf(tmp_path / "m", "yi", max_shard_size="20KB")
    (directory / "model.safetensors.index.json").unlink()
    theirs = state_dict(write_tiny_hf(tmp_path / "whole", "yi"))
    with open_source(directory) as source:
        np.testing.assert_array_equal(source.read("layers.1.mlp.up_proj.weight"), theirs["layers.1.mlp.up_proj.weight"])


@pytest.mark.parametrize(
    "rows", [slice(0, 1), slice(3, 11), slice(None, 5), slice(60, None), slice(-2, None), slice(9, 4)]
)
def test_rows_are_the_rows_of_the_whole(rows: slice, pristine: Path) -> None:
    with open_source(pristine) as source:
        for name in ("layers.0.mlp.down_proj.weight", "norm.weight"):
            np.testing.assert_array_equal(source.read(name, rows), source.read(name)[rows])
            np.testing.assert_array_equal(source.read_blocks(name, rows), source.read_blocks(name)[rows])
        with pytest.raises(ValueError, match="step"):
            source.read("norm.weight", slice(0, 4, 2))
        with pytest.raises(KeyError):
            source.read("model.norm.weight")


def test_only_the_rows_asked_for_are_read(pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpimpi.weights.sources.weight_file import WeightFile

    counts: list[int] = []
    plain = WeightFile.read
    monkeypatch.setattr(
        WeightFile, "read", lambda self, offset, count: counts.append(count) or plain(self, offset, count)
    )
    with open_source(pristine) as source:
        counts.clear()
        source.read("embed_tokens.weight", slice(7, 9))
    assert counts == [2 * 64 * 4]


def test_assets_are_the_files_that_exist(llama: Path) -> None:
    (llama / "tokenizer.json").write_bytes(b"{}")
    (llama / "secret.txt").write_bytes(b"x")
    with open_source(llama) as source:
        assets = source.tokenizer_assets()
    assert set(assets) == {"tokenizer.json", "config.json", "generation_config.json"}
    assert assets["config.json"] == (llama / "config.json").read_bytes()


def test_fingerprint_is_of_content_alone(llama: Path, tmp_path: Path) -> None:
    first = fingerprint(llama)
    assert len(first) == 32 and int(first, 16) >= 0
    assert fingerprint(Path(shutil.copytree(llama, tmp_path / "copy"))) == first
    (llama / "model.safetensors").rename(llama / "weights.safetensors")
    assert fingerprint(llama) == first
    assert fingerprint(write_tiny_hf(tmp_path / "tuned", "llama", seed=1)) != first
    edit_config(llama, rms_norm_eps=1e-4)
    assert fingerprint(llama) != first


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_fingerprint_is_of_the_tokenizer_too(name: str, llama: Path) -> None:
    """Slices carry the tokenizer: slices with another one are other slices."""
    seen = {fingerprint(llama)}
    if name == "config.json":
        edit_config(llama, eos_token_id=7)  # which the ModelConfig does not hold
        assert fingerprint(llama) not in seen
        return
    for content in (None, b"", b"{}", b"{ }"):
        (llama / name).unlink(missing_ok=True)
        if content is not None:
            (llama / name).write_bytes(content)
        seen.add(fingerprint(llama))
    assert len(seen) == (5 if name == "generation_config.json" else 4)  # transformers wrote one
    (llama / "README.md").write_text("x")
    assert fingerprint(llama) in seen


def test_fingerprint_tells_one_asset_from_another(llama: Path) -> None:
    (llama / "tokenizer.json").write_bytes(b"x")
    first = fingerprint(llama)
    (llama / "tokenizer.json").rename(llama / "tokenizer.model")
    assert fingerprint(llama) != first


def test_harmless_extras_are_dropped(llama: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.int64)

    edit_tensors(llama, add)
    with open_source(llama) as source:
        assert set(source.tensors()) == set(expected_tensors(source.config))
    tied = write_tiny_hf(tmp_path / "tied", "llama-tied")
    edit_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    with open_source(tied) as source:
        assert "lm_head.weight" not in source.tensors()


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    # transformers does not tie such a model, whatever its config says.
    tied = write_tiny_hf(tmp_path / "tied", "llama-tied")
    edit_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] * 2}))
    assert "set tie_word_embeddings to false" in refusal(tied)


def test_importing_and_reading_never_imports_torch(pristine: Path, tmp_path: Path) -> None:
    paths = [str(pristine), str(write_tiny_gguf(tmp_path / "m.gguf"))]
    code = (
        "import sys; from tpimpi.weights.sources import open_source\n"
        "for path in sys.argv[1:]:\n"
        "    source = open_source(path); [source.read(name) for name in source.tensors()]\n"
        "    source.fingerprint(); source.tokenizer_assets(); source.close()\n"
        "assert not {'torch', 'transformers', 'mpi4py'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# Checkpoints that are broken


def test_config_that_is_no_json(llama: Path) -> None:
    for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        (llama / "config.json").write_bytes(text)
        assert str(llama / "config.json") in refusal(llama)


def test_other_weights_than_safetensors(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    assert "no safetensors file" in refusal(llama)
    write_tiny_gguf(llama / "m.gguf")
    assert "give --model the .gguf file itself" in refusal(llama)
    (llama / "pytorch_model.bin").write_bytes(b"x")
    assert "tpimpi reads no pickles" in refusal(llama)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_safetensors_cut_short(keep: int, llama: Path) -> None:
    path = llama / "model.safetensors"
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    message = refusal(llama)
    assert str(path) in message and f"{len(data)} bytes" in message and "download it again" in message


def test_hostile_safetensors_headers(llama: Path) -> None:
    path = llama / "model.safetensors"
    header, data = read_safetensors(path)
    name = "model.norm.weight"

    def entry(**changes: Any) -> dict[str, Any]:
        return {**header, name: {**header[name], **changes}}

    for bad in (
        entry(data_offsets=[0, 2**62]),
        entry(data_offsets=[8, 4]),
        entry(shape=[2**40]),
        entry(shape=[-1]),
        entry(shape="x"),
        entry(dtype="F99"),
        {**header, name: None},
    ):
        write_safetensors(path, bad, data)
        assert str(path) in refusal(llama)
    for raw in (
        struct.pack("<Q", 2**63) + data,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ):
        path.write_bytes(raw)
        assert str(path) in refusal(llama)


def test_safetensors_flipped_header_bytes_never_give_a_traceback(llama: Path) -> None:
    path = llama / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    dice = random.Random(1)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        data[dice.randrange(8 + length)] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            open_source(llama).close()
        except ModelError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float64, "F64"), (np.int32, "I32"), (np.uint8, "U8"), (np.int64, "I64")]
)
def test_other_dtypes_are_named(dtype: Any, name: str, llama: Path) -> None:
    edit_tensors(
        llama, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(dtype)})
    )
    message = refusal(llama)
    assert "model.norm.weight" in message and name in message and "F32, F16, BF16" in message


def test_fp8_is_named(llama: Path) -> None:
    header, data = read_safetensors(llama / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    header[name] |= {"dtype": "F8_E4M3", "shape": [96, 256]}
    write_safetensors(llama / "model.safetensors", header, data)
    message = refusal(llama)
    assert f"{name} is stored as F8_E4M3, FP8" in message and "a GGUF file of it" in message


def test_missing_wrong_and_unknown_tensors_are_named(llama: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = (llama / "model.safetensors").read_bytes()
    edit_tensors(llama, lambda tensors: tensors.pop(name))
    message = refusal(llama)
    assert name in message and "[96, 64]" in message and "missing" in message

    (llama / "model.safetensors").write_bytes(original)
    edit_tensors(llama, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    message = refusal(llama)
    assert str(llama / "model.safetensors") in message and name in message
    assert "[64, 96]" in message and "[96, 64]" in message

    (llama / "model.safetensors").write_bytes(original)
    edit_tensors(llama, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, "f4")}))
    assert "model.layers.0.self_attn.q_proj.bias is unknown" in refusal(llama)

    (llama / "model.safetensors").write_bytes(original)
    edit_config(llama, tie_word_embeddings=False, num_hidden_layers=4)
    assert "layers.3." in refusal(llama)


def test_a_tensor_twice_is_refused(llama: Path) -> None:
    edit_tensors(llama, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"]}))
    assert "one of them is too many" in refusal(llama)


def test_a_broken_index_is_named(tmp_path: Path) -> None:
    directory = write_tiny_hf(tmp_path / "m", "llama", max_shard_size="40KB")
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    place = index["weight_map"]["lm_head.weight"]
    other = next(file for file in index["weight_map"].values() if file != place)

    index_path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "lm_head.weight": other}}))
    message = refusal(directory)
    assert other in message and "lm_head.weight" in message

    for hostile in ("../x.safetensors", "/etc/passwd", 3, None):
        index_path.write_text(json.dumps({"weight_map": {"lm_head.weight": hostile}}))
        assert "lm_head.weight" in refusal(directory)
    for broken in ("[]", "{}", "x"):
        index_path.write_text(broken)
        assert str(index_path) in refusal(directory)

    index_path.write_text(json.dumps(index))
    (directory / place).unlink()
    assert str(directory / place) in refusal(directory)


def test_a_file_that_shrinks_while_open_is_an_error(llama: Path) -> None:
    with open_source(llama) as source:
        with (llama / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(ModelError, match="is 20000 bytes long, and was 504568"):
            for name in source.tensors():
                source.read(name)
