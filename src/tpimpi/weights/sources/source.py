"""An opened model of whatever format: its weight files, its tensors, and the checks that every format needs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats.bf16 import from_bf16
from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import expected_tensors
from tpimpi.weights.sources.stored import FLOAT_FORMATS, Stored, TensorInfo
from tpimpi.weights.sources.weight_file import WeightFile, shown

_WRAPPERS = frozenset(
    {"model", "language_model", "text_model", "base_model", "module", "_orig_mod", "_fsdp_wrapped_module"}
)
_FILE_SAMPLES = 64  # of each weight file, in a fingerprint
_SAMPLE_BYTES = 4096
_SLAB_NUMBERS = 1 << 20  # decoded at once: what dequantizing needs beside its result
_BF16_SLAB_NUMBERS = 1 << 15  # stays in the cache; slabs of 1 << 20 take twice as long


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
        self._asset_bytes: dict[str, int] | None = None  # counted when somebody asks
        self._infos = MappingProxyType({name: tensor.info for name, tensor in self._stored.items()})

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model by its canonical name: exactly the names of `expected_tensors(config)`."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> F32:
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

    def tokenizer_bytes(self) -> Mapping[str, int]:
        """Bytes of each of the tokenizer's assets. Counted once, since a large vocabulary takes a moment."""
        if self._asset_bytes is None:
            self._asset_bytes = {name: len(content) for name, content in self._assets().items()}
        return self._asset_bytes

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


def decode(format: str, blocks: Bytes) -> F32:
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


def _in_slabs(convert: Callable[[npt.NDArray[Any]], F32], stored: npt.NDArray[Any], columns: int, numbers: int) -> F32:
    """`convert`, applied to a slab of about `numbers` at a time: [rows, …] -> float32 [rows, columns]."""
    out = np.empty((stored.shape[0], columns), np.float32)
    slab = max(1, numbers // max(1, columns))
    for row in range(0, stored.shape[0], slab):
        out[row : row + slab] = convert(stored[row : row + slab])
    return out


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
