"""An opened model of whatever format: its weight files, its tensors, and the checks that every format needs."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.formats.bf16 import from_bf16
from tpimpi.errors import ModelError, shorten
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import Piece, expected_tensors

FLOAT_FORMATS = MappingProxyType({"f32": 4, "bf16": 2, "f16": 2})  # bytes a number
DOWNLOAD_AGAIN = "it is cut short or broken; download it again"

_PIECE = re.compile(r"(?P<file>.+\.gguf)[._-][\w-]+", re.IGNORECASE | re.DOTALL)  # m.gguf.part00, m.gguf-split-a
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_REMEDIES = {
    errno.EACCES: "let your user read it (chmod, chown)",
    errno.EPERM: "let your user read it (chmod, chown)",
    errno.EMFILE: "allow more (ulimit -n)",
    errno.ENFILE: "close other programs, or allow more (sysctl fs.file-max)",
    errno.ENAMETOOLONG: "give a shorter path",
}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_WRAPPERS = frozenset(
    {"model", "language_model", "text_model", "base_model", "module", "_orig_mod", "_fsdp_wrapped_module"}
)
_FILE_SAMPLES = 64  # of each weight file, in a fingerprint
_SAMPLE_BYTES = 4096
_SHOWN_PATH_CHARACTERS = 200  # of one that the system finds too long
_SLAB_NUMBERS = 1 << 20  # decoded at once: what dequantizing needs beside its result
_BF16_SLAB_NUMBERS = 1 << 15  # stays in the cache; slabs of 1 << 20 take twice as long

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's canonical name, its shape ([out, in] or [out]) and its stored format: f32, bf16, q4_1, …"""

    name: str
    shape: tuple[int, ...]
    format: str


class WeightFile:
    """An open file of weights; `header_end` is where its data begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_file(path, buffering=0)
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
                raise unreadable(self.path, error) from error
            if not got:
                size = os.fstat(self.file.fileno()).st_size
                raise ModelError(
                    f"{self.path}: is {size} bytes long, and was {self.size} when it was opened; "
                    f"start again when nothing writes to it"
                )
            done += got
        return out


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies. `permuted_heads` > 0: the first `permuted_rows` rows of each of that many heads are interleaved.

    `offset_value` is added to the numbers of a vector.
    """

    info: TensorInfo
    file: WeightFile
    offset: int
    row_bytes: int
    permuted_heads: int = 0
    permuted_rows: int = 0
    offset_value: float = 0.0

    def split(self, pieces: Sequence[Piece]) -> dict[str, Stored]:
        """The matrices, or biases, that this holds, by their canonical names. ModelError where it has not as many rows.

        Those of all experts may be one tensor with a dimension more, which is the same numbers in the same order.
        """
        rows = sum(piece.rows for piece in pieces)
        dimensions = 1 if pieces[0].name.endswith(".bias") else 2
        if len(self.info.shape) == dimensions + 1 and self.info.shape[1]:
            stack, height, *rest = self.info.shape
            flat = TensorInfo(self.info.name, (stack * height, *rest), self.info.format)
            return replace(self, info=flat, row_bytes=self.row_bytes // height).split(pieces)
        if len(self.info.shape) != dimensions or self.info.shape[0] != rows:
            raise ModelError(
                f"{self.file.path}: tensor {shown(self.info.name)} has shape {list(self.info.shape)}, and the config needs "
                f"{rows} rows; config and weights are not of the same model"
            )
        return {
            piece.name: replace(
                self,
                info=TensorInfo(piece.name, (piece.rows, *self.info.shape[1:]), self.info.format),
                offset=self.offset + piece.first * self.row_bytes,
            )
            for piece in pieces
        }

    def rows(self, start: int, stop: int) -> Bytes:
        """Rows [start, stop) in the file's order: uint8 [rows, bytes a row]."""
        data = self.file.read(self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        return data.reshape(stop - start, self.row_bytes)


class Source:
    """An opened model: its config, and its tensors one at a time. Made by `open_source`; close it, or use `with`.

    `name` is the model's, as people see it: its folder's, or its file's without .gguf. Holds the files' headers (a few MB at
    most) and open files, no tensor data. Reading is thread-safe.
    """

    def __init__(
        self,
        path: Path,
        config: ModelConfig,
        stored: Mapping[str, Stored],
        files: Iterable[WeightFile],
        assets: Callable[[], dict[str, bytes]],
        *,
        assets_in_header: bool,
        name: str | None = None,
        left_out: str = "",
    ) -> None:
        """`left_out`: what of the model in the files is not taken, in a line; "" where all is."""
        self.path = path
        self.name = os.path.basename(os.path.abspath(path)) if name is None else name  # noqa: PTH100, PTH119 (links stay)
        self.left_out = left_out
        self.config = config
        self._stored = dict(stored)
        self._files = list(files)
        self._assets = assets
        self._assets_in_header = assets_in_header
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
        info, offset = self._stored[name].info, self._stored[name].offset_value
        numbers = decode(info.format, self.read_blocks(name, rows))
        if len(info.shape) > 1:
            return numbers
        return numbers.reshape(-1) + np.float32(offset) if offset else numbers.reshape(-1)

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
            return tensor.rows(start, stop)
        # Only whole heads can be put in order; whole rows move, so blocks stay as they are.
        head = total // tensor.permuted_heads
        first, last = start // head * head, -(-stop // head) * head
        wanted = np.arange(start, stop)
        inside, half = wanted % head, tensor.permuted_rows // 2
        interleaved = inside % half * 2 + inside // half
        stored = wanted - inside + np.where(inside < 2 * half, interleaved, inside)
        block: Bytes = tensor.rows(first, last)[stored - first]
        return block

    def trace(self) -> bytes:
        """Of random weights that follow one, the experts to be chosen: uint16 [positions, layers, experts a token]."""
        return b""

    def fingerprint(self) -> str:
        """32 hex digits: the same for a copy, whatever its files are called; another for another model or fine-tune.

        Of each weight file its size, header and 64 evenly spaced samples of 4 KiB (so little is read of 140 GB), the
        config, and the tokenizer's assets whole, names and bytes (of a GGUF file they are in the header).
        """
        digest = xxhash.xxh3_128(b"".join(sorted(_file_digest(file) for file in self._files)))
        digest.update(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        assets = {} if self._assets_in_header else self._assets()
        for name, content in sorted(assets.items()):
            digest.update(f"\n{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()

    def tokenizer_assets(self) -> dict[str, bytes]:
        """What the tokenizer is made of, by file name: see TOKENIZER_FILES; for GGUF {"gguf.json": its metadata}.

        gguf.json is one JSON object of all `tokenizer.*` keys; bytes that are no UTF-8 stand as surrogate escapes.
        """
        return self._assets()

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


def decode(format: str, blocks: Bytes) -> Floats:
    """Stored rows as numbers: uint8 [rows, bytes a row] -> float32 [rows, in].

    Exact for f32, bf16 and f16; a quantized block gives gguf's numbers, which are llama.cpp's. f32 is not copied.
    Peak memory: the result, and what a slab of rows (a million numbers at most, or one row) needs to be decoded.
    """
    if format == "f32":
        return blocks.view("<f4")
    if format == "f16":
        return blocks.view("<f2").astype(np.float32)
    if format == "bf16":
        stored = blocks.view("<u2")
        return _in_slabs(from_bf16, stored, stored.shape[1], _BF16_SLAB_NUMBERS)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType[format.upper()]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    columns = blocks.shape[1] // block_bytes * block
    return _in_slabs(lambda rows: dequantize(rows, kind), blocks, columns, _SLAB_NUMBERS)


def _in_slabs(
    convert: Callable[[npt.NDArray[Any]], Floats], stored: npt.NDArray[Any], columns: int, numbers: int
) -> Floats:
    """`convert`, applied to a slab of about `numbers` at a time: [rows, …] -> float32 [rows, columns]."""
    out = np.empty((stored.shape[0], columns), np.float32)
    slab = max(1, numbers // max(1, columns))
    for row in range(0, stored.shape[0], slab):
        out[row : row + slab] = convert(stored[row : row + slab])
    return out


def what_is(path: Path) -> str:
    """What stands there: "a file", "a directory", "nothing", "a dangling link", "a pipe", …; ModelError if no one can say.

    Links are followed.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a dangling link" if path.is_symlink() else "nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        raise unreadable(path, error) from error
    return next((kind for test, kind in _KINDS if test(mode)), "a device")


def is_file(path: Path) -> bool:
    """Whether this file of a model is there; ModelError for what is there and no file.

    A download whose blobs are gone is all dangling links, which must not count as absent; a pipe would make us wait.
    """
    kind = what_is(path)
    if kind not in ("a file", "nothing"):
        raise ModelError(f"{path}: is {kind}, and a file is needed; download the model again")
    return kind == "a file"


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """A file of a model, opened to be read; ModelError if it is no file, or cannot be."""
    try:
        is_file(path)
        return path.open("rb", buffering=buffering)
    except OSError as error:
        raise unreadable(path, error) from error


def piece_of(path: Path) -> str | None:
    """The remedy for a file that is not whole where its name is that of a piece of one, as uploads with a limit have it."""
    match = _PIECE.fullmatch(path.name)
    if match is None:
        return None
    return (
        f"it looks like one of several pieces of a file: join them all, in order (cat PIECES > {shown(match['file'])})"
    )


def refuse_pointer(start: bytes, path: Path) -> None:
    """Raise ModelError where a file that begins with `start` is not itself but the pointer to it that Git LFS keeps."""
    if start.startswith(_LFS_POINTER):
        raise ModelError(
            f"{path}: is a Git LFS pointer, a few lines of text in place of the file; fetch the file itself with "
            f"git lfs pull, or download it again"
        )


def listed(directory: Path, *suffixes: str) -> list[Path]:
    """What a directory holds with one of these suffixes, in capitals too, by name; ModelError if it cannot be listed."""
    try:
        return sorted(path for path in directory.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise unreadable(directory, error) from error


def unreadable(path: Path, error: OSError) -> ModelError:
    name = shorten(str(path), _SHOWN_PATH_CHARACTERS) if error.errno == errno.ENAMETOOLONG else path
    remedy = _REMEDIES.get(error.errno or 0, "check its disk, or download the model again")
    return ModelError(f"{name}: cannot be read: {error.strerror or error}; {remedy}")


def _file_digest(file: WeightFile) -> bytes:
    digest = xxhash.xxh3_128(file.size.to_bytes(8, "little"))
    digest.update(file.read(0, file.header_end))
    if file.size <= _FILE_SAMPLES * _SAMPLE_BYTES:
        digest.update(file.read(0, file.size))
    else:
        for sample in range(_FILE_SAMPLES):
            digest.update(file.read(sample * (file.size - _SAMPLE_BYTES) // (_FILE_SAMPLES - 1), _SAMPLE_BYTES))
    return digest.digest()


def check_tensors(
    config: ModelConfig, found: Mapping[str, Stored], spell: Callable[[str], str], where: Path
) -> dict[str, Stored]:
    """Exactly the tensors the config needs, in its order; `spell` gives a canonical name's spelling in the files."""
    needed = expected_tensors(config)
    for name, tensor in found.items():
        if name not in needed:
            if (inner := _in_wrappers(name, needed)) is not None:
                raise ModelError(
                    f"{tensor.file.path}: tensor {shown(spell(name))} is {spell(inner)} with a prefix too many, as programs "
                    f"write it that save a model inside another; save the model itself (save_pretrained), or take the "
                    f"published one"
                )
            raise ModelError(
                f"{tensor.file.path}: tensor {shown(spell(name))} is unknown in a {config.architecture} model of "
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


def _in_wrappers(name: str, needed: Mapping[str, object]) -> str | None:
    """The tensor that this is but for the names of classes around the model; None for another."""
    parts = name.split(".")
    while parts and parts[0] in _WRAPPERS:
        parts = parts[1:]
        if ".".join(parts) in needed:
            return ".".join(parts)
    return None


def shown(name: str) -> str:
    """A tensor name from a file, as it may stand in a message."""
    return name if name.isprintable() and len(name) <= 120 else f"{shorten(name, 100)!r}"
