"""Open a GGUF file: its header, its config, and where its tensors lie.

`gguf_header` specifies the file, `gguf_parts` the file that was split. For architecture llama the rows of Q and K are
interleaved within each head (row 2i is Hugging Face's i, row 2i + 1 its i + head_dim / 2).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.errors import ModelError
from tpimpi.models.config_gguf import config_from_gguf
from tpimpi.models.tensors import fused_tensors, interleaved_heads, model_tensors, rotated_rows, without_layers
from tpimpi.weights.sources.gguf_header import GgufArray, GgufFile, GgufHeader, GgufTensor
from tpimpi.weights.sources.gguf_parts import model_of, read_parts, tensors_of_parts
from tpimpi.weights.sources.gguf_types import type_of_name
from tpimpi.weights.sources.source import Source, check_tensors, decode
from tpimpi.weights.sources.stored import Stored, TensorInfo
from tpimpi.weights.sources.weight_file import DOWNLOAD_AGAIN, WeightFile, open_file, piece_of, shown, unreadable

# Vectors that belong to the rotary positions, by what config_from_gguf calls them.
_ROPE_TENSORS = {
    "factors": "rope_freqs.weight",
    "short": "rope_factors_short.weight",
    "long": "rope_factors_long.weight",
}


def open_gguf(path: Path) -> Source:
    """Open a GGUF file, or all parts of the split file that it is a part of. Errors as `open_source`."""
    files: list[WeightFile] = []
    try:
        return _open_parts(read_parts(path, files), files)
    except BaseException:
        for file in files:
            file.file.close()
        raise


def _open_parts(parts: Sequence[GgufFile], files: Sequence[WeightFile]) -> Source:
    first = parts[0]
    path, metadata = first.file.path, first.metadata
    tensors = tensors_of_parts(parts)
    shapes = {name: tensor.shape for name, (tensor, _) in tensors.items()}
    apart = {}
    for name, stored_name in _ROPE_TENSORS.items():
        if stored_name in tensors:
            tensor, file = tensors.pop(stored_name)
            apart[name] = _gguf_stored(tensor, stored_name, file)
    config = config_from_gguf(metadata, path, shapes, {name: _rope_factors(found) for name, found in apart.items()})
    more = metadata[f"{metadata['general.architecture']}.block_count"] - config.layers  # that predict further tokens
    tensors = without_layers(tensors, config.layers, more)
    needed, fused = model_tensors(config), fused_tensors(config, hf=False)
    known = {tensor.gguf_name: tensor for tensor in needed.values()}
    parts_of = {tensor.name: tensor.part for tensor in needed.values()}
    stored: dict[str, Stored] = {}
    for name, (tensor, file) in tensors.items():
        # A name that is not known stays as it is, and is refused below.
        whole = _gguf_stored(tensor, name if name in fused or name not in known else known[name].name, file)
        for canonical, piece in (whole.split(fused[name]) if name in fused else {whole.info.name: whole}).items():
            if canonical in stored:
                raise ModelError(f"{file.path}: tensor {shown(name)} is there twice; {DOWNLOAD_AGAIN}")
            heads = interleaved_heads(config, parts_of.get(canonical, ""))
            stored[canonical] = replace(piece, permuted_heads=heads, permuted_rows=rotated_rows(config) if heads else 0)
    spelled = {piece.name: name for name, pieces in fused.items() for piece in pieces}

    def gguf_name(name: str) -> str:
        return spelled.get(name, needed[name].gguf_name if name in needed else name)

    _refuse_overlaps([*stored.values(), *apart.values()], gguf_name)
    checked = check_tensors(config, stored, gguf_name, path)
    _check_decodable(checked, gguf_name, path)
    return Source(
        path,
        config,
        checked,
        files,
        lambda: _gguf_assets(path, first.file.size, metadata),
        assets_in_header=True,
        name=model_of(path.name),
    )


def _gguf_stored(tensor: GgufTensor, canonical: str, file: WeightFile) -> Stored:
    kind = tensor.type
    if kind is None:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} is of type {tensor.kind}, which the gguf package does not know; "
            f"update it (pip install -U gguf), or take another file of the model"
        )
    if tensor.shape[-1] % kind.block:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} has rows of {tensor.shape[-1]} numbers; type {kind.name.upper()} "
            f"needs a multiple of {kind.block}; {DOWNLOAD_AGAIN}"
        )
    offset, size = file.header_end + tensor.offset, tensor.nbytes
    if offset + size > file.size:
        raise ModelError(
            f"{file.path}: tensor {shown(tensor.name)} needs bytes {offset} to {offset + size}, and the file has "
            f"{file.size}; {piece_of(file.path) or DOWNLOAD_AGAIN}"
        )
    # A vector's "row" is one number, so that runs of it are read as runs of rows.
    row_bytes = kind.nbytes(math.prod(tensor.shape[1:]))
    return Stored(TensorInfo(canonical, tensor.shape, kind.name), file, offset, row_bytes)


def _refuse_overlaps(stored: Iterable[Stored], gguf_name: Callable[[str], str]) -> None:
    """Refuse a file of which two tensors have bytes in common: at least one of the two would be nonsense."""
    ends: dict[Path, tuple[int, str]] = {}
    for tensor in sorted(stored, key=lambda tensor: tensor.offset):
        path, name = tensor.file.path, gguf_name(tensor.info.name)
        end, before = ends.get(path, (0, ""))
        if tensor.offset < end:
            raise ModelError(
                f"{path}: tensors {shown(before)} and {shown(name)} overlap (one ends at byte {end}, the other begins at "
                f"{tensor.offset}); {DOWNLOAD_AGAIN}"
            )
        ends[path] = tensor.offset + tensor.info.shape[0] * tensor.row_bytes, name


def _rope_factors(stored: Stored) -> list[float]:
    shape, file = stored.info.shape, stored.file
    if len(shape) != 1 or stored.info.format != "f32":
        raise ModelError(
            f"{file.path}: tensor {stored.info.name} has shape {list(shape)} and format {stored.info.format}; "
            f"a vector of f32 is needed"
        )
    factors: list[float] = file.read(stored.offset, shape[0] * 4).view("<f4").tolist()
    return factors


def _check_decodable(stored: Mapping[str, Stored], gguf_name: Callable[[str], str], path: Path) -> None:
    """Refuse formats that gguf cannot turn into numbers, by decoding one block of zeros of each that is not ours too."""
    first: dict[str, str] = {}
    for name, tensor in stored.items():
        if tensor.info.format not in WEIGHT_FORMATS:
            first.setdefault(tensor.info.format, name)
    for format, name in first.items():
        try:
            decode(format, np.zeros((1, type_of_name(format).block_bytes), np.uint8))
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
                    header = GgufHeader(stream, size, path)
                    values[key] = header.array(value) if isinstance(value, GgufArray) else value
    except OSError as error:
        raise unreadable(path, error) from error
    return {"gguf.json": json.dumps(values).encode()}
