"""Read the header of a GGUF file: its metadata, and where its tensors lie.

The format (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian: magic, version,
counts, metadata, tensor infos, then aligned data. Dimensions stand innermost first.

The header is parsed here and not by gguf.GGUFReader, which makes NumPy objects of every vocabulary entry: 2.3 s for
49,152 tokens against 0.1 s.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tpimpi.errors import ModelError, shorten
from tpimpi.models.keys import MAX_LAYERS
from tpimpi.weights.sources.gguf_types import GgufType, type_of_number
from tpimpi.weights.sources.weight_file import (
    DOWNLOAD_AGAIN,
    WeightFile,
    open_file,
    piece_of,
    refuse_pointer,
    unreadable,
)

MAGIC = b"GGUF"
_SCALAR_CODES = dict(enumerate(("B", "b", "H", "h", "I", "i", "f", "?"))) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHOWN_CHARACTERS = 80  # of a name from a file that a message shows
_MAX_HEADER_BYTES = 256 << 20
# Far above any model's: a file of that many small ones would take gigabytes of memory.
_MAX_KEYS, _MAX_TENSORS, _MAX_ELEMENTS = 1 << 16, 1 << 20, 1 << 22


@dataclass(frozen=True)
class GgufArray:
    """An array in the metadata, left in the file until somebody wants it."""

    offset: int
    kind: int
    count: int

    def __repr__(self) -> str:
        return f"an array of {self.count}"


@dataclass(frozen=True)
class GgufTensor:
    """A tensor info as it stands in the file; the shape is turned to [out, in]."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the beginning of the file's data

    @property
    def type(self) -> GgufType | None:
        """Its type; None where the gguf package does not know it."""
        return type_of_number(self.kind)

    @property
    def nbytes(self) -> int:
        """What it takes in the file; 0 where its type is not known."""
        return 0 if self.type is None else self.type.nbytes(math.prod(self.shape))


@dataclass(frozen=True)
class GgufFile:
    """An open GGUF file and its header: metadata by key (arrays as GgufArray, those of layers as lists), tensors by name."""

    file: WeightFile
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_header(file: WeightFile) -> GgufFile:
    """Parse and check a file's header, and set its `header_end`. ModelError, one line that names the file."""
    with open_file(file.path, buffering=1 << 20) as stream:
        header = GgufHeader(stream, file.size, file.path)
        try:
            metadata, tensors = header.parse()
            end = header.position
            metadata |= _arrays_of_layers(header, metadata)
        except OSError as error:
            raise unreadable(file.path, error) from error
        except struct.error as error:
            raise header.broken(str(error)) from error
    file.header_end = _data_start(end, metadata, file.path)
    return GgufFile(file, header.version, metadata, tensors)


def alignment(metadata: Mapping[str, Any], path: Path) -> int:
    """Bytes of which the beginnings of a file's data and tensors are multiples. ModelError where it is no power of two."""
    found = metadata.get("general.alignment", 32)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1 or found & (found - 1):
        raise ModelError(f"{path}: general.alignment is {found!r}; a power of two is needed; {DOWNLOAD_AGAIN}")
    return found


def _data_start(header_end: int, metadata: Mapping[str, Any], path: Path) -> int:
    unit = alignment(metadata, path)
    return -(-header_end // unit) * unit


def _arrays_of_layers(header: GgufHeader, metadata: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The arrays that describe the model's layers, as lists: numbers below "<architecture>.", at most one for each layer."""
    prefix = f"{metadata.get('general.architecture')}."
    return {
        key: header.array(value)
        for key, value in metadata.items()
        if key.startswith(prefix)
        and isinstance(value, GgufArray)
        and value.kind != _STRING
        and value.count <= MAX_LAYERS
    }


class GgufHeader:
    """Reads a GGUF header from front to back; every step is checked against the file's end.

    Memory: scalars and tensor infos; arrays are stepped over, and read when `array` is called.
    """

    def __init__(self, stream: BinaryIO, size: int, path: Path) -> None:
        self.stream = stream
        self.limit = min(size, _MAX_HEADER_BYTES)
        self.size = size
        self.path = path
        self.position = 0
        self.version = 0
        self.key = ""  # the last one that was read

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Metadata (arrays as `GgufArray`) and tensors by name; `position` is then the header's end."""
        magic = self.stream.read(min(self.size, 128))
        refuse_pointer(magic, self.path)
        if not magic.startswith(MAGIC):
            raise ModelError(f"{self.path}: is no GGUF file (it does not begin with 'GGUF'); download it again")
        self.stream.seek(len(MAGIC))
        self.position = len(MAGIC)
        version = self.version = self.number("I")
        if version and version & 0xFFFF == 0:
            raise ModelError(
                f"{self.path}: is a big-endian GGUF file; tpimpi reads little-endian ones, take one of those"
            )
        if version not in (2, 3):
            raise ModelError(f"{self.path}: is GGUF version {version}; tpimpi reads versions 2 and 3, convert it anew")
        tensor_count, key_count = self.number("Q"), self.number("Q")
        for what, count, most in (("tensors", tensor_count, _MAX_TENSORS), ("keys", key_count, _MAX_KEYS)):
            if count > most:
                raise self.broken(f"it says that it has {count} {what}, more than {most}")
        metadata: dict[str, Any] = {}
        for _ in range(key_count):
            self.key = key = self.string()
            if key in metadata:
                raise self.broken(f"key {shorten(key, _SHOWN_CHARACTERS)!r} is there twice")
            metadata[key] = self.value(self.number("I"))
        tensors: dict[str, GgufTensor] = {}
        for _ in range(tensor_count):
            tensor = self.tensor()
            if tensor.name in tensors:
                raise self.broken(f"tensor {shorten(tensor.name, _SHOWN_CHARACTERS)!r} is there twice")
            tensors[tensor.name] = tensor
        return metadata, tensors

    def array(self, array: GgufArray) -> list[Any]:
        """The elements of an array that `parse` stepped over."""
        if array.count > _MAX_ELEMENTS:
            raise self.broken(f"an array of it has {array.count} elements, more than {_MAX_ELEMENTS}")
        self.stream.seek(array.offset)
        self.position = array.offset
        if array.kind == _STRING:
            return [text.decode("utf-8", "surrogateescape") for text in self.strings(array.count)]
        code = f"<{array.count}{_SCALAR_CODES[array.kind]}"
        return list(struct.unpack(code, self.take(struct.calcsize(code))))

    def tensor(self) -> GgufTensor:
        name = self.string()
        dimensions = self.number("I")
        if not 1 <= dimensions <= 4:
            raise self.broken(f"tensor {shorten(name, _SHOWN_CHARACTERS)!r} has {dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        while len(shape) > 1 and shape[0] == 1:  # a vector that was written as a matrix of one row
            shape = shape[1:]
        return GgufTensor(name, shape, self.number("I"), self.number("Q"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALAR_CODES:
            return self.number(_SCALAR_CODES[kind])
        if kind != _ARRAY:
            raise self.broken(f"metadata type {kind} is unknown")
        kind, count = self.number("I"), self.number("Q")
        array = GgufArray(self.position, kind, count)
        if kind == _STRING:
            for _ in self.strings(count):
                pass
        elif kind in _SCALAR_CODES:
            self.need(count * struct.calcsize(f"<{_SCALAR_CODES[kind]}"))
            self.position += count * struct.calcsize(f"<{_SCALAR_CODES[kind]}")
            self.stream.seek(self.position)
        else:
            raise self.broken(f"array of metadata type {kind}")
        return array

    def strings(self, count: int) -> Iterator[bytes]:
        """So many strings that follow each other. The one loop that a big vocabulary makes long."""
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
            text = read(length)
            if len(text) != length:
                raise self.broken("it became shorter while it was read")
            yield text
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
        if self.position + count > self.limit < self.size >= self.position + count:
            raise ModelError(
                f"{self.path}: its metadata goes on past {_MAX_HEADER_BYTES >> 20} MiB, with key "
                f"{shorten(self.key, _SHOWN_CHARACTERS)!r}, more than tpimpi reads; take another file of this model, or "
                f"convert it again without that key"
            )
        if self.position + count > self.limit:
            raise self.broken(f"its header goes on to byte {self.position + count}, past the limit of {self.limit}")

    def broken(self, what: str) -> ModelError:
        remedy = piece_of(self.path) or DOWNLOAD_AGAIN
        return ModelError(f"{self.path}: no whole GGUF file ({what}), {self.size} bytes; {remedy}")
