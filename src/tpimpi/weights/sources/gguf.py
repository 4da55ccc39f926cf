"""Open a GGUF file: its header, its config, and where its tensors lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian: magic, version,
counts, metadata, tensor infos, then aligned data. Dimensions stand innermost first. For architecture llama the rows
of Q and K are interleaved within each head (row 2i is Hugging Face's i, row 2i + 1 its i + head_dim / 2).

The header is parsed here and not by gguf.GGUFReader, which makes NumPy objects of every vocabulary entry: 2.3 s for
49,152 tokens against 0.1 s.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tpimpi.errors import ModelError
from tpimpi.models.config_gguf import config_from_gguf
from tpimpi.models.keys import MAX_LAYERS
from tpimpi.models.tensors import interleaved_heads, model_tensors
from tpimpi.weights.sources.source import (
    DOWNLOAD_AGAIN,
    Source,
    Stored,
    TensorInfo,
    WeightFile,
    check_tensors,
    decode,
    open_file,
    shown,
    unreadable,
)

_SCALAR_CODES = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_HEADER_BYTES = 256 << 20


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


def open_gguf(path: Path) -> Source:
    file = WeightFile(path)
    try:
        return _open_gguf_file(file)
    except BaseException:
        file.file.close()
        raise


def _open_gguf_file(file: WeightFile) -> Source:
    path = file.path
    with open_file(path, buffering=1 << 20) as stream:
        header = _GgufHeader(stream, file.size, path)
        try:
            metadata, tensors = header.parse()
            metadata_end = header.position
            metadata |= _arrays_of_layers(header, metadata)
            header.position = metadata_end
        except OSError as error:
            raise unreadable(path, error) from error
        except struct.error as error:
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
    needed = model_tensors(config)
    known = {tensor.gguf_name: tensor for tensor in needed.values()}
    stored = {}
    for name, tensor in tensors.items():
        canonical, heads = name, 0  # a name that is not known stays as it is, and is refused below
        if name in known:
            canonical, heads = known[name].name, interleaved_heads(config, known[name].part)
        if canonical in stored:
            raise ModelError(f"{path}: tensor {shown(name)} is there twice; {DOWNLOAD_AGAIN}")
        stored[canonical] = _gguf_stored(tensor, canonical, file, heads)

    def gguf_name(name: str) -> str:
        return needed[name].gguf_name if name in needed else name

    checked = check_tensors(config, stored, gguf_name, path)
    _check_decodable(checked, gguf_name, path)
    return Source(path, config, checked, [file], lambda: _gguf_assets(path, file.size, metadata), assets_in_header=True)


def _arrays_of_layers(header: _GgufHeader, metadata: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arrays that describe the model's layers, as lists: numbers below "<architecture>.", at most one for each layer."""
    prefix = f"{metadata.get('general.architecture')}."
    return {
        key: header.array(value)
        for key, value in metadata.items()
        if key.startswith(prefix)
        and isinstance(value, _GgufArray)
        and value.kind != _STRING
        and value.count <= MAX_LAYERS
    }


def _gguf_data_start(header_end: int, metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", 32)
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ModelError(f"{path}: general.alignment is {alignment!r}; a power of two is needed; {DOWNLOAD_AGAIN}")
    return -(-header_end // alignment) * alignment


def _gguf_stored(tensor: _GgufTensor, canonical: str, file: WeightFile, heads: int = 0) -> Stored:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(tensor.kind)
    except ValueError:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} is of type {tensor.kind}, which the gguf package does not know; "
            f"update it (pip install -U gguf), or take another file of the model"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} has rows of {tensor.shape[-1]} numbers; type {kind.name} needs a "
            f"multiple of {block}; {DOWNLOAD_AGAIN}"
        )
    offset, size = file.header_end + tensor.offset, math.prod(tensor.shape) // block * block_bytes
    if offset + size > file.size:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} needs bytes {offset} to {offset + size}, and the file has "
            f"{file.size}; {DOWNLOAD_AGAIN}"
        )
    # A vector's "row" is one number, so that runs of it are read as runs of rows.
    row_bytes = math.prod(tensor.shape[1:]) // block * block_bytes
    return Stored(TensorInfo(canonical, tensor.shape, kind.name.lower()), file, offset, row_bytes, heads)


def _rope_factors(tensor: _GgufTensor, file: WeightFile) -> list[float]:
    stored = _gguf_stored(tensor, tensor.name, file)
    if len(tensor.shape) != 1 or stored.info.format != "f32":
        raise ModelError(
            f"{file.path}: tensor {tensor.name} has shape {list(tensor.shape)} and format {stored.info.format}; "
            f"a vector of f32 is needed"
        )
    factors: list[float] = file.read(stored.offset, tensor.shape[0] * 4).view("<f4").tolist()
    return factors


def _check_decodable(stored: Mapping[str, Stored], gguf_name: Callable[[str], str], path: Path) -> None:
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
                f"{path}: tensor {gguf_name(name)} is of type {format.upper()}, which the gguf package cannot turn into "
                f"numbers; take a file of the model in another format (Q8_0, Q4_K_M, …)"
            ) from None


def _gguf_assets(path: Path, size: int, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    values = {}
    try:
        with open_file(path, buffering=1 << 20) as stream:
            for key, value in metadata.items():
                if key.startswith("tokenizer."):
                    header = _GgufHeader(stream, size, path)
                    values[key] = header.array(value) if isinstance(value, _GgufArray) else value
    except OSError as error:
        raise unreadable(path, error) from error
    return {"gguf.json": json.dumps(values).encode()}


class _GgufHeader:
    """Reads a GGUF header from front to back; every step is checked against the file's end.

    Memory: scalars and tensor infos; arrays are stepped over, and read when `array` is called.
    """

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self.stream = stream
        self.limit = min(size, _MAX_HEADER_BYTES)
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
        if array.kind == _STRING:
            return [self.string() for _ in range(array.count)]
        code = f"<{array.count}{_SCALAR_CODES[array.kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def tensor(self) -> _GgufTensor:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.broken(f"tensor {name[:80]!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        return _GgufTensor(name, shape, self.number("I"), self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALAR_CODES:
            return self.number(_SCALAR_CODES[kind])
        if kind != _ARRAY:
            raise self.broken(f"metadata type {kind} is unknown")
        kind, count = self.number("I"), self.number("Q")
        array = _GgufArray(self.position, kind, count)
        if kind == _STRING:
            self.skip_strings(count)
        elif kind in _SCALAR_CODES:
            self.need(count * struct.calcsize(f"<{_SCALAR_CODES[kind]}"))
            self.position += count * struct.calcsize(f"<{_SCALAR_CODES[kind]}")
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
        return ModelError(f"{self.path}: no whole GGUF file ({what}), {self.size} bytes; {DOWNLOAD_AGAIN}")
