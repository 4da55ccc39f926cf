"""Read a model's tensors one at a time, from a Hugging Face directory (safetensors) or from a GGUF file.

A tensor comes as numbers (`Source.read`) or as the bytes that are stored (`Source.read_blocks`: quantized blocks, or
bf16, f16, f32), whole or a run of rows. Names are Hugging Face's without "model."; shapes are [out, in], row-major.
Everything a file says of itself is checked before a tensor is read: header, extents, and that the tensors are exactly
those of the config. Files are read with positioned reads, not mapped: what is not asked for is never in memory, and a
file that shrinks meanwhile is an error instead of a SIGBUS.

The formats:
- safetensors (https://github.com/huggingface/safetensors#format): u64 little-endian header length, a JSON header
  {name: {dtype, shape, data_offsets}} with offsets from the header's end, then the data.
- GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian: magic, version,
  counts, metadata, tensor infos, then aligned data. Dimensions stand innermost first. For architecture llama the rows
  of Q and K are interleaved within each head (row 2i is Hugging Face's i, row 2i + 1 its i + head_dim / 2). The
  header is parsed here and not by gguf.GGUFReader, which makes NumPy objects of every vocabulary entry: 2.3 s for
  49,152 tokens against 0.1 s.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.config import ModelConfig, config_from_gguf, config_from_hf
from tpimpi.errors import ModelError

FLOAT_FORMATS = MappingProxyType({"f32": 4, "bf16": 2, "f16": 2})  # bytes a number

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "config.json",
)

_SAFETENSORS_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_SAMPLES = 64  # of each weight file, in a fingerprint
_SAMPLE_BYTES = 4096
_MAX_JSON = 64 << 20
_MAX_GGUF_HEADER = 256 << 20
_SLAB_NUMBERS = 1 << 20  # decoded at once: what dequantizing needs beside its result
_DOWNLOAD_AGAIN = "it is cut short or broken; download it again"

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's canonical name, its shape ([out, in] or [out]) and its stored format: f32, bf16, q4_1, …"""

    name: str
    shape: tuple[int, ...]
    format: str


class _WeightFile:
    """An open file of weights; `header_end` is where its data begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = path.open("rb", buffering=0)
        except OSError as error:
            raise _unreadable(path, error) from error
        self.size = os.fstat(self.file.fileno()).st_size
        self.header_end = 0

    def read(self, offset: int, count: int) -> Bytes:
        """Bytes [offset, offset + count) as a new array."""
        out = np.empty(count, np.uint8)
        view, done = memoryview(out), 0
        while done < count:
            try:
                got = os.preadv(self.file.fileno(), [view[done:]], offset + done)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if not got:
                size = os.fstat(self.file.fileno()).st_size
                raise ModelError(
                    f"{self.path}: is {size} bytes long, and was {self.size} when it was opened; "
                    f"start again when nothing writes to it"
                )
            done += got
        return out


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies. `permuted_heads` > 0: the rows of each of that many heads are interleaved."""

    info: TensorInfo
    file: _WeightFile
    offset: int
    row_bytes: int
    permuted_heads: int = 0


class Source:
    """An opened model: its config, and its tensors one at a time. Made by `open_source`; close it, or use `with`.

    Holds the files' headers (a few MB at most) and open files, no tensor data. Reading is thread-safe.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        stored: Mapping[str, _Stored],
        files: Iterable[_WeightFile],
        assets: Callable[[], dict[str, bytes]],
    ) -> None:
        self.path = path
        self.config = config
        self._stored = dict(stored)
        self._files = list(files)
        self._assets = assets
        self._infos = MappingProxyType({name: tensor.info for name, tensor in self._stored.items()})

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by its canonical name: exactly the names of `expected_tensors(config)`."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> Floats:
        """Rows of a tensor as numbers: float32 [rows, in], or [rows] of a vector.

        Only these rows are read and decoded. Peak memory: the result and the stored bytes of these rows (of Q and K
        in a GGUF file twice the stored bytes). KeyError for a name that is not in `tensors()`; ModelError if the
        file cannot be read.
        """
        info = self._stored[name].info
        numbers = decode(info.format, self.read_blocks(name, rows))
        return numbers if len(info.shape) > 1 else numbers.reshape(-1)

    def read_blocks(self, name: str, rows: slice | None = None) -> Bytes:
        """Rows of a tensor as they are stored: uint8 [rows, bytes a row], in the order of `read`'s rows.

        `rows` is a slice of step 1. Peak memory: the result; of Q and K in a GGUF file twice that. Errors as `read`.
        """
        tensor = self._stored[name]
        total = tensor.info.shape[0]
        start, stop, step = (rows or slice(None)).indices(total)
        if step != 1:
            raise ValueError(f"rows of {name}: step is {step}, 1 is needed")
        stop = max(start, stop)
        if not tensor.permuted_heads:
            return self._rows(tensor, start, stop)
        # Only whole heads can be put in order; whole rows move, so blocks stay as they are.
        head = total // tensor.permuted_heads
        first, last = start // head * head, -(-stop // head) * head
        wanted = np.arange(start, stop)
        inside = wanted % head
        stored = wanted - inside + inside % (head // 2) * 2 + inside // (head // 2)
        block: Bytes = self._rows(tensor, first, last)[stored - first]
        return block

    def fingerprint(self) -> str:
        """32 hex digits: the same for a copy, whatever its files are called; another for another model or fine-tune.

        Of each weight file its size, header and 64 evenly spaced samples of 4 KiB (so little is read of 140 GB), and
        the config.
        """
        digests = sorted(_file_digest(file) for file in self._files)
        config = json.dumps(self.config.to_dict(), sort_keys=True)
        return xxhash.xxh3_128_hexdigest(b"".join(digests) + config.encode())

    def tokenizer_assets(self) -> dict[str, bytes]:
        """What the tokenizer is made of, by file name: see TOKENIZER_FILES; for GGUF {"gguf.json": its metadata}.

        gguf.json is one JSON object of all `tokenizer.*` keys; bytes that are no UTF-8 stand as surrogate escapes.
        """
        return self._assets()

    def native_format(self) -> str:
        """The format in which most numbers of the weight matrices are stored."""
        counts: Counter[str] = Counter()
        for info in self._infos.values():
            if len(info.shape) > 1:
                counts[info.format] += math.prod(info.shape)
        return max(sorted(counts), key=counts.__getitem__)

    def close(self) -> None:
        """Close the files; reading afterwards is a ValueError."""
        for file in self._files:
            file.file.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _rows(tensor: _Stored, start: int, stop: int) -> Bytes:
        data = tensor.file.read(tensor.offset + start * tensor.row_bytes, (stop - start) * tensor.row_bytes)
        return data.reshape(stop - start, tensor.row_bytes)


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory, a .gguf file, or a directory that holds exactly one .gguf file.

    Reads and checks the headers alone (and the `rope_freqs` of a GGUF file, and a few rows of a head that a tied model
    has twice). ModelError, one line that names the file, for whatever is missing, broken, or unknown.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ModelError(f"model not found: {path}; give --model a Hugging Face directory or a .gguf file")
        if path.is_dir():
            if (path / "config.json").exists():
                return _open_hf(path)
            found = sorted(path.glob("*.gguf"))
            if len(found) == 1:
                return _open_gguf(found[0])
            what = (
                f"{len(found)} .gguf files ({', '.join(file.name for file in found[:3])}, …)" if found else "no .gguf"
            )
            raise ModelError(
                f"{path}: holds no config.json and {what}; give --model a Hugging Face directory or one .gguf file"
            )
        if not path.is_file():
            raise ModelError(f"{path}: is neither a directory nor a file; give --model one of the two")
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if magic != b"GGUF" and path.suffix != ".gguf":
        raise ModelError(f"{path}: is no GGUF file; give --model a .gguf file, or the directory that holds config.json")
    return _open_gguf(path)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors a model of this config has: canonical name -> shape [out, in], or [out]. No more and no fewer."""
    hidden, intermediate = config.hidden, config.intermediate
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab, hidden)}
    for layer in range(config.layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        linear = {
            f"{attention}.q_proj": (q_rows, hidden, config.qkv_bias),
            f"{attention}.k_proj": (kv_rows, hidden, config.qkv_bias),
            f"{attention}.v_proj": (kv_rows, hidden, config.qkv_bias),
            f"{attention}.o_proj": (hidden, q_rows, config.o_bias),
            f"{mlp}.gate_proj": (intermediate, hidden, config.mlp_bias),
            f"{mlp}.up_proj": (intermediate, hidden, config.mlp_bias),
            f"{mlp}.down_proj": (hidden, intermediate, config.mlp_bias),
        }
        shapes[f"layers.{layer}.input_layernorm.weight"] = (hidden,)
        for name, (rows, columns, bias) in linear.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)
        if config.qk_norm:
            shapes[f"{attention}.q_norm.weight"] = (config.head_dim,)
            shapes[f"{attention}.k_norm.weight"] = (config.head_dim,)
        shapes[f"layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["norm.weight"] = (hidden,)
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab, hidden)
    return shapes


def decode(format: str, blocks: Bytes) -> Floats:
    """Stored rows as numbers: uint8 [rows, bytes a row] -> float32 [rows, in].

    Exact for f32, bf16 and f16; a quantized block gives gguf's numbers, which are llama.cpp's. f32 is not copied.
    """
    if format == "f32":
        return blocks.view("<f4").astype(np.float32, copy=False)
    if format == "f16":
        return blocks.view("<f2").astype(np.float32)
    if format == "bf16":
        bits = blocks.view("<u2").astype(np.uint32)  # bf16 is the upper half of an f32
        bits <<= 16
        return bits.view(np.float32)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[format.upper()]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = blocks.shape[0], blocks.shape[1] // block_bytes * block
    out = np.empty((rows, columns), np.float32)
    slab = max(1, _SLAB_NUMBERS // max(1, columns))
    for row in range(0, rows, slab):
        out[row : row + slab] = dequantize(blocks[row : row + slab], kind)
    return out


def _unreadable(path: Path, error: OSError) -> ModelError:
    return ModelError(f"{path}: cannot be read: {error.strerror or error}")


def _file_digest(file: _WeightFile) -> bytes:
    digest = xxhash.xxh3_128(file.size.to_bytes(8, "little"))
    digest.update(file.read(0, file.header_end))
    if file.size <= _SAMPLES * _SAMPLE_BYTES:
        digest.update(file.read(0, file.size))
    else:
        for sample in range(_SAMPLES):
            digest.update(file.read(sample * (file.size - _SAMPLE_BYTES) // (_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.digest()


def _check_tensors(
    config: ModelConfig, found: Mapping[str, _Stored], spell: Callable[[str], str], where: Path
) -> dict[str, _Stored]:
    """Exactly the tensors the config needs, in its order; `spell` gives a canonical name's spelling in the files."""
    needed = expected_tensors(config)
    for name, tensor in found.items():
        if name not in needed:
            raise ModelError(
                f"{tensor.file.path}: tensor {_name(spell(name))} is unknown in a {config.architecture} model of "
                f"{config.layers} layers with this config; tpimpi would leave it out, so it does not run the model"
            )
    for name, shape in needed.items():
        if name not in found:
            more = len(needed.keys() - found.keys()) - 1
            raise ModelError(
                f"{where}: tensor {spell(name)} of shape {list(shape)} is missing"
                f"{f', and {more} more' if more else ''}; the model is not whole, or the config is another model's"
            )
        tensor = found[name]
        if tensor.info.shape != shape:
            raise ModelError(
                f"{tensor.file.path}: tensor {spell(name)} has shape {list(tensor.info.shape)}, and the config needs "
                f"{list(shape)}; config and weights are not of the same model"
            )
        if len(shape) == 1 and tensor.info.format not in FLOAT_FORMATS:
            raise ModelError(
                f"{tensor.file.path}: tensor {spell(name)} is a vector in format {tensor.info.format}; "
                f"one of {', '.join(FLOAT_FORMATS)} is needed"
            )
    return {name: found[name] for name in needed}


def _name(name: str) -> str:
    """A tensor name from a file, as it may stand in a message."""
    return name if name.isprintable() and len(name) <= 120 else f"{name[:100]!r}"


# Hugging Face directories


def _open_hf(directory: Path) -> Source:
    config_path = directory / "config.json"
    config = config_from_hf(_read_json(config_path), config_path)
    files: list[_WeightFile] = []
    try:
        found = _hf_tensors(directory, files)
        if config.tied_head and "lm_head.weight" in found:
            _check_tied(found)
            del found["lm_head.weight"]
        stored = _check_tensors(config, found, _hf_name, directory)
    except BaseException:
        for file in files:
            file.file.close()
        raise
    return Source(directory, config, stored, files, lambda: _hf_assets(directory))


def _hf_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _hf_assets(directory: Path) -> dict[str, bytes]:
    assets = {}
    for name in TOKENIZER_FILES:
        path = directory / name
        try:
            if path.is_file():
                assets[name] = path.read_bytes()
        except OSError as error:
            raise _unreadable(path, error) from error
    return assets


def _hf_tensors(directory: Path, files: list[_WeightFile]) -> dict[str, _Stored]:
    """Canonical name -> tensor, of every weight file; each is opened and appended to `files`."""
    index_path = directory / "model.safetensors.index.json"
    placed: dict[str, str] = {}
    if (directory / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index_path.exists():
        placed = _read_index(index_path)
        names = sorted(set(placed.values()))
    else:
        # consolidated.*: the same weights once more, under the names of Meta's and Mistral's own code.
        names = sorted(file.name for file in directory.glob("*.safetensors") if not file.match("consolidated*"))
    if not names:
        raise _no_safetensors(directory)
    found: dict[str, _Stored] = {}
    for file_name in names:
        path = directory / file_name
        if not path.exists():
            raise ModelError(f"{path}: is missing, and {index_path.name} places tensors in it; download it")
        file = _WeightFile(path)
        files.append(file)
        header = _read_safetensors_header(file)
        for name, place in placed.items():
            if place == file_name and name not in header:
                raise ModelError(
                    f"{path}: has no tensor {_name(name)}, which {index_path.name} places there; "
                    f"download both again, of the same version of the model"
                )
        for name, entry in header.items():
            canonical = name.removeprefix("model.")
            if canonical.endswith("rotary_emb.inv_freq") or placed.get(name, file_name) != file_name:
                continue
            if canonical in found:
                raise ModelError(
                    f"{path}: tensor {_name(name)} is also in {found[canonical].file.path.name}; one of them is too many"
                )
            found[canonical] = _safetensors_entry(file, name, canonical, entry)
    return found


def _no_safetensors(directory: Path) -> ModelError:
    if any(directory.glob("*.bin")) or any(directory.glob("*.pth")):
        return ModelError(
            f"{directory}: holds PyTorch weights (.bin, .pth) and no safetensors, and tpimpi reads no pickles; "
            f"convert it: load it with transformers and save_pretrained()"
        )
    if any(directory.glob("*.gguf")):
        return ModelError(f"{directory}: holds config.json and no safetensors; give --model the .gguf file itself")
    return ModelError(f"{directory}: holds config.json and no safetensors file; download the model's weights")


def _read_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_JSON + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(data) > _MAX_JSON:
        raise ModelError(f"{path}: is longer than {_MAX_JSON >> 20} MiB; it is no such file")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); download it again") from error


def _read_index(path: Path) -> dict[str, str]:
    index = _read_json(path)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{path}: has no weight_map; download it again")
    for name, file_name in placed.items():
        # A name with a folder in it could lead anywhere on the disk.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", file_name):
            raise ModelError(
                f"{path}: places tensor {_name(name)} in {_name(str(file_name))!r}; a name that ends in .safetensors, "
                f"without folders, is needed"
            )
    return placed


def _read_safetensors_header(file: _WeightFile) -> dict[str, Any]:
    """The tensors' entries, after the safetensors library has accepted the file: sizes, offsets, no gaps, no overlap."""
    from safetensors import safe_open

    try:
        with safe_open(file.path, framework="numpy"):
            pass
    except Exception as error:
        raise ModelError(
            f"{file.path}: no whole safetensors file ({error}), {file.size} bytes; {_DOWNLOAD_AGAIN}"
        ) from error
    (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
    file.header_end = 8 + length
    header: dict[str, Any] = json.loads(file.read(8, length).tobytes())
    header.pop("__metadata__", None)
    return header


def _safetensors_entry(file: _WeightFile, name: str, canonical: str, entry: Mapping[str, Any]) -> _Stored:
    format = _SAFETENSORS_DTYPES.get(entry["dtype"])
    if format is None:
        raise ModelError(
            f"{file.path}: tensor {_name(name)} is stored as {entry['dtype']}; "
            f"one of {', '.join(_SAFETENSORS_DTYPES)} is needed"
        )
    shape = tuple(entry["shape"])
    row_bytes = math.prod(shape[1:]) * FLOAT_FORMATS[format]
    return _Stored(TensorInfo(canonical, shape, format), file, file.header_end + entry["data_offsets"][0], row_bytes)


def _check_tied(found: Mapping[str, _Stored]) -> None:
    """A tied model's saved head must be its embedding; a few rows tell a head of its own, which would be lost."""
    head, table = found["lm_head.weight"], found.get("embed_tokens.weight")
    same = table is not None and head.info.shape == table.info.shape and len(head.info.shape) == 2
    if table is not None and same:
        rows = head.info.shape[0]
        for row in {sample * (rows - 1) // (_SAMPLES - 1) for sample in range(_SAMPLES)} if rows else ():
            pair = [
                decode(tensor.info.format, tensor.file.read(tensor.offset + row * tensor.row_bytes, tensor.row_bytes))
                for tensor in (head, table)
            ]
            same = same and np.array_equal(pair[0], pair[1], equal_nan=True)
    if not same:
        raise ModelError(
            f"{head.file.path}: config.json says tie_word_embeddings, but lm_head.weight is not embed_tokens.weight; "
            f"set tie_word_embeddings to false in config.json"
        )


# GGUF files


_GGUF_TOP = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}
_GGUF_LAYER = {
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
_GGUF_SCALARS = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


@dataclass(frozen=True)
class _GgufArray:
    """An array in the metadata, left in the file until somebody wants it."""

    offset: int
    kind: int
    count: int

    def __repr__(self) -> str:
        return f"an array of {self.count}"


@dataclass(frozen=True)
class _GgufTensor:
    """A tensor info as it stands in the file; the shape is turned to [out, in]."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _open_gguf(path: Path) -> Source:
    file = _WeightFile(path)
    try:
        return _open_gguf_file(file)
    except BaseException:
        file.file.close()
        raise


def _open_gguf_file(file: _WeightFile) -> Source:
    path = file.path
    with path.open("rb", buffering=1 << 20) as stream:
        header = _GgufHeader(stream, file.size, path)
        try:
            metadata, tensors = header.parse()
        except (OSError, struct.error) as error:
            raise header.broken(str(error)) from error
    split = metadata.get("split.count", 0)
    if split not in (0, 1):
        raise ModelError(
            f"{path}: is one of {split} parts (split.count); tpimpi reads whole files: "
            f"join the parts with llama-gguf-split --merge"
        )
    file.header_end = _gguf_data_start(header.position, metadata, path)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    rope = tensors.pop("rope_freqs.weight", None)
    config = config_from_gguf(metadata, path, shapes, None if rope is None else _rope_factors(rope, file))
    stored = {}
    for name, tensor in tensors.items():
        canonical = _canonical_gguf_name(name)
        heads = 0
        if config.architecture == "llama" and re.fullmatch(r"layers\.\d+\.self_attn\.[qk]_proj\..*", canonical):
            heads = config.heads if ".q_proj." in canonical else config.kv_heads
        if canonical in stored:
            raise ModelError(f"{path}: tensor {_name(name)} is there twice; {_DOWNLOAD_AGAIN}")
        stored[canonical] = _gguf_stored(tensor, canonical, file, heads)
    checked = _check_tensors(config, stored, _gguf_name, path)
    _check_decodable(checked, path)
    return Source(path, config, checked, [file], lambda: _gguf_assets(path, file.size, metadata))


def _gguf_data_start(header_end: int, metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment is {alignment!r}; a power of two is needed; {_DOWNLOAD_AGAIN}")
    return -(-header_end // alignment) * alignment


def _canonical_gguf_name(name: str) -> str:
    """Hugging Face's name for a GGUF tensor name; a name that is not known stays as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _GGUF_TOP:
        return f"{_GGUF_TOP[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(0|[1-9][0-9]{0,5})\.(\w+)", stem)
    if match and match[2] in _GGUF_LAYER:
        return f"layers.{match[1]}.{_GGUF_LAYER[match[2]]}.{kind}"
    return name


def _gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    top = {canonical: gguf for gguf, canonical in _GGUF_TOP.items()}
    if stem in top:
        return f"{top[stem]}.{kind}"
    match = re.fullmatch(r"layers\.([0-9]+)\.(.+)", stem)
    layer = {canonical: gguf for gguf, canonical in _GGUF_LAYER.items()}
    return f"blk.{match[1]}.{layer[match[2]]}.{kind}" if match and match[2] in layer else name


def _gguf_stored(tensor: _GgufTensor, canonical: str, file: _WeightFile, heads: int = 0) -> _Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise ModelError(
            f"{file.path}: tensor {_name(tensor.name)} is of type {tensor.kind}, which the gguf package does not know; "
            f"update it (pip install -U gguf), or take another file of the model"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise ModelError(
            f"{file.path}: tensor {_name(tensor.name)} has rows of {tensor.shape[-1]} numbers; type {kind.name} needs a "
            f"multiple of {block}; {_DOWNLOAD_AGAIN}"
        )
    offset, size = file.header_end + tensor.offset, math.prod(tensor.shape) // block * block_bytes
    if offset + size > file.size:
        raise ModelError(
            f"{file.path}: tensor {_name(tensor.name)} needs bytes {offset} to {offset + size}, and the file has "
            f"{file.size}; {_DOWNLOAD_AGAIN}"
        )
    # A vector's "row" is one number, so that runs of it are read as runs of rows.
    row_bytes = math.prod(tensor.shape[1:]) // block * block_bytes
    return _Stored(TensorInfo(canonical, tensor.shape, kind.name.lower()), file, offset, row_bytes, heads)


def _rope_factors(tensor: _GgufTensor, file: _WeightFile) -> list[float]:
    stored = _gguf_stored(tensor, tensor.name, file)
    if len(tensor.shape) != 1 or stored.info.format != "f32":
        raise ModelError(
            f"{file.path}: tensor {tensor.name} has shape {list(tensor.shape)} and format {stored.info.format}; "
            f"a vector of f32 is needed"
        )
    factors: list[float] = file.read(stored.offset, tensor.shape[0] * 4).view("<f4").tolist()
    return factors


def _check_decodable(stored: Mapping[str, _Stored], path: Path) -> None:
    """Refuse formats that gguf cannot turn into numbers, by decoding one block of zeros of each."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    first: dict[str, str] = {}
    for name, tensor in stored.items():
        first.setdefault(tensor.info.format, name)
    for format, name in first.items():
        try:
            decode(format, np.zeros((1, GGML_QUANT_SIZES[GGMLQuantizationType[format.upper()]][1]), np.uint8))
        except NotImplementedError:
            raise ModelError(
                f"{path}: tensor {_gguf_name(name)} is of type {format.upper()}, which the gguf package cannot turn into "
                f"numbers; take a file of the model in another format (Q8_0, Q4_K_M, …)"
            ) from None


def _gguf_assets(path: Path, size: int, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    values = {}
    try:
        with path.open("rb", buffering=1 << 20) as stream:
            for key, value in metadata.items():
                if key.startswith("tokenizer."):
                    header = _GgufHeader(stream, size, path)
                    values[key] = header.array(value) if isinstance(value, _GgufArray) else value
    except OSError as error:
        raise _unreadable(path, error) from error
    return {"gguf.json": json.dumps(values).encode()}


class _GgufHeader:
    """Reads a GGUF header from front to back; every step is checked against the file's end.

    Memory: scalars and tensor infos; arrays are stepped over, and read when `array` is called.
    """

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self.stream = stream
        self.limit = min(size, _MAX_GGUF_HEADER)
        self.size = size
        self.path = path
        self.position = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, _GgufTensor]]:
        """Metadata (arrays as `_GgufArray`) and tensors by name; `position` is then the header's end."""
        if self.size < 4 or self.take(4) != b"GGUF":
            raise ModelError(f"{self.path}: is no GGUF file (it does not begin with 'GGUF'); download it again")
        version = self.number("I")
        if version and version & 0xFFFF == 0:
            raise ModelError(
                f"{self.path}: is a big-endian GGUF file; tpimpi reads little-endian ones, take one of those"
            )
        if version not in (2, 3):
            raise ModelError(f"{self.path}: is GGUF version {version}; tpimpi reads versions 2 and 3, convert it anew")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self.string()
            if key in metadata:
                raise self.broken(f"key {key[:80]!r} is there twice")
            metadata[key] = self.value(self.number("I"))
        tensors: dict[str, _GgufTensor] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in tensors:
                raise self.broken(f"tensor {tensor.name[:80]!r} is there twice")
            tensors[tensor.name] = tensor
        return metadata, tensors

    def array(self, array: _GgufArray) -> list[Any]:
        """The elements of an array that `parse` stepped over."""
        self.stream.seek(array.offset)
        self.position = array.offset
        if array.kind == _GGUF_STRING:
            return [self.string() for _ in range(array.count)]
        code = f"<{array.count}{_GGUF_SCALARS[array.kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def tensor(self) -> _GgufTensor:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.broken(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return _GgufTensor(name, shape, self.number("I"), self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == _GGUF_STRING:
            return self.string()
        if kind in _GGUF_SCALARS:
            return self.number(_GGUF_SCALARS[kind])
        if kind != _GGUF_ARRAY:
            raise self.broken(f"metadata type {kind} is unknown")
        kind, count = self.number("I"), self.number("Q")
        array = _GgufArray(self.position, kind, count)
        if kind == _GGUF_STRING:
            self.skip_strings(count)
        elif kind in _GGUF_SCALARS:
            self.need(count * struct.calcsize(f"<{_GGUF_SCALARS[kind]}"))
            self.position += count * struct.calcsize(f"<{_GGUF_SCALARS[kind]}")
            self.stream.seek(self.position)
        else:
            raise self.broken(f"array of metadata type {kind}")
        return array

    def skip_strings(self, count: int) -> None:
        # The one loop that a big vocabulary makes long.
        read, unpack, position, limit = self.stream.read, struct.Struct("<Q").unpack, self.position, self.limit
        for _ in range(count):
            if position + 8 > limit:
                self.position = position
                self.need(8)
            (length,) = unpack(read(8))
            position += 8 + length
            if position > limit:
                self.position = position - length
                self.need(length)
            read(length)
        self.position = position

    def string(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "surrogateescape")

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def take(self, count: int) -> bytes:
        self.need(count)
        data = self.stream.read(count)
        self.position += count
        if len(data) != count:
            raise self.broken("it became shorter while it was read")
        return data

    def need(self, count: int) -> None:
        if self.position + count > self.limit:
            raise self.broken(f"its header goes on to byte {self.position + count}, past the limit of {self.limit}")

    def broken(self, what: str) -> ModelError:
        return ModelError(f"{self.path}: no whole GGUF file ({what}), {self.size} bytes; {_DOWNLOAD_AGAIN}")
