"""Open a Hugging Face directory: config.json, and weights in safetensors files.

The format (https://github.com/huggingface/safetensors#format): u64 little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}} with offsets from the header's end, then the data. A model of several files has
model.safetensors.index.json, whose weight_map says in which file each tensor is.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.errors import ModelError
from tpimpi.models.config import ModelConfig
from tpimpi.models.config_hf import config_from_hf, hf_mtp_layers, is_multimodal
from tpimpi.models.refused_checkpoints import TAKE_INSTEAD, refuse_quantized_tensors
from tpimpi.models.tensors import (
    EMBEDDING_NAME,
    HEAD_NAME,
    canonical_hf_name,
    canonical_text_name,
    fused_tensors,
    hf_name,
    hf_norm_offset,
    interleaved_heads,
    model_tensors,
    reads_mxfp4_pairs,
    rotated_rows,
    without_layers,
)
from tpimpi.weights.sources.mxfp4_pairs import BYTES_DTYPE, join_pairs
from tpimpi.weights.sources.source import Source, check_tensors, decode
from tpimpi.weights.sources.stored import FLOAT_FORMATS, Stored, TensorInfo
from tpimpi.weights.sources.weight_file import (
    DOWNLOAD_AGAIN,
    WeightFile,
    is_file,
    listed,
    open_file,
    refuse_pointer,
    shown,
    unreadable,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
_TEMPLATE_FOLDER = "additional_chat_templates"  # whose NAME.jinja is the asset additional_chat_template.NAME.jinja

_SAFETENSORS_DTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_INDEX = "model.safetensors.index.json"
# Far above any model's, and low enough that what JSON of that size becomes does not fill the memory.
_MAX_JSON_BYTES, _MAX_JSON_PARTS = 16 << 20, 1 << 20
_MAX_ASSET_BYTES = 128 << 20
_COMPARED_HEAD_ROWS = 64  # of a saved head, compared with the embedding it is tied to


def open_hf(directory: Path, name: str | None = None) -> Source:
    """Open a directory with config.json and safetensors; `name` is the model's where it is not the directory's."""
    config_path = directory / "config.json"
    values = read_json(config_path)
    config = config_from_hf(values, config_path)
    multimodal = is_multimodal(values)
    files: list[WeightFile] = []
    try:
        found = _hf_tensors(
            directory,
            files,
            canonical_text_name if multimodal else canonical_hf_name,
            pairs=reads_mxfp4_pairs(config),
        )
        found = without_layers(found, config.layers, hf_mtp_layers(values, config_path))
        found = _as_computed(config, join_pairs(found))
        if config.tied_head and HEAD_NAME in found:
            if EMBEDDING_NAME in found:
                _check_tied(found)
            else:  # saved under the other of its two names, as some trainers do; transformers reads it too
                found[EMBEDDING_NAME] = replace(
                    found[HEAD_NAME], info=replace(found[HEAD_NAME].info, name=EMBEDDING_NAME)
                )
            del found[HEAD_NAME]
        stored = check_tensors(config, found, _spelling(config), directory)
    except BaseException:
        for file in files:
            file.file.close()
        raise
    left_out = "of this model the text part alone is computed: it cannot be given images" if multimodal else ""
    return Source(
        directory,
        config,
        stored,
        files,
        lambda: _hf_assets(directory),
        assets_in_header=False,
        name=name,
        left_out=left_out,
    )


def _as_computed(config: ModelConfig, found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Fused matrices one by one, rows of Q and K in the order of slices, norms with what is added to them."""
    fused, needed = fused_tensors(config, hf=True), model_tensors(config)
    offset, made = hf_norm_offset(config), {}
    for name, tensor in found.items():
        for own, piece in (tensor.split(fused[name]) if name in fused else {name: tensor}).items():
            part = needed[own].part if own in needed else ""
            if (heads := interleaved_heads(config, part, hf=True)) and own in needed:
                made[own] = replace(piece, permuted_heads=heads, permuted_rows=rotated_rows(config))
            elif offset and part.endswith("norm"):
                made[own] = replace(piece, offset_value=offset)
            else:
                made[own] = piece
    return made


def _spelling(config: ModelConfig) -> Callable[[str], str]:
    """How a tensor is called in the files: a part of a fused one by the name of that."""
    fused = {piece.name: name for name, pieces in fused_tensors(config, hf=True).items() for piece in pieces}
    return lambda name: hf_name(fused.get(name, name))


def _hf_assets(directory: Path) -> dict[str, bytes]:
    assets = {}
    paths = {name: directory / name for name in TOKENIZER_FILES}
    paths |= {f"additional_chat_template.{path.name}": path for path in _templates(directory / _TEMPLATE_FOLDER)}
    for name, path in paths.items():
        try:
            if is_file(path):
                assets[name] = _read_all(path, _MAX_ASSET_BYTES)
                refuse_pointer(assets[name], path)
        except OSError as error:
            raise unreadable(path, error) from error
    return assets


def _templates(folder: Path) -> list[Path]:
    """Chat templates that have names."""
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".jinja" and path.name.isprintable())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable(folder, error) from error


def _hf_tensors(
    directory: Path, files: list[WeightFile], canonical_name: Callable[[str], str | None], *, pairs: bool
) -> dict[str, Stored]:
    """Canonical name -> tensor, of every weight file; each is opened and appended to `files`.

    `canonical_name` gives None for a tensor that is not wanted; with `pairs` tensors of bytes are taken too.
    """
    dtypes = {**_SAFETENSORS_DTYPES, **({"U8": BYTES_DTYPE} if pairs else {})}
    names, placed = _weight_files(directory)
    if not names:
        raise _no_safetensors(directory)
    found: dict[str, Stored] = {}
    for file_name in names:
        path = directory / file_name
        if not is_file(path):
            raise ModelError(f"{path}: is missing, and {_INDEX} places tensors in it; download it")
        file = WeightFile(path)
        files.append(file)
        header = _read_safetensors_header(file)
        refuse_quantized_tensors(header, path)
        for name, place in placed.items():
            if place == file_name and name not in header:
                raise ModelError(
                    f"{path}: has no tensor {shown(name)}, which {_INDEX} places there; "
                    f"download both again, of the same version of the model"
                )
        for name, entry in header.items():
            canonical = canonical_name(name)
            if (
                canonical is None
                or canonical.endswith("rotary_emb.inv_freq")
                or placed.get(name, file_name) != file_name
            ):
                continue
            if canonical in found:
                raise ModelError(
                    f"{path}: tensor {shown(name)} is also in {found[canonical].file.path.name}; one of them is too many"
                )
            found[canonical] = _safetensors_entry(file, name, canonical, entry, dtypes)
    return found


def _weight_files(directory: Path) -> tuple[list[str], dict[str, str]]:
    """The names of the weight files, and in which of them the index, where there is one, places each tensor."""
    if is_file(directory / "model.safetensors"):
        return ["model.safetensors"], {}
    if is_file(directory / _INDEX):
        placed = _read_index(directory / _INDEX)
        return sorted(set(placed.values())), placed
    # consolidated.*: the same weights once more, under the names of Meta's and Mistral's own code.
    found = (file.name for file in listed(directory, ".safetensors"))
    return sorted(name for name in found if not name.startswith("consolidated")), {}


def weight_headers(directory: Path) -> dict[str, dict[str, Any]]:
    """The header of each weight file that is there, by its name: tensors' dtype, shape and data_offsets. ModelError where
    one is broken."""
    found = {}
    for name in _weight_files(directory)[0]:
        if is_file(directory / name):
            file = WeightFile(directory / name)
            try:
                found[name] = _read_safetensors_header(file)
            finally:
                file.file.close()
    return found


def _no_safetensors(directory: Path) -> ModelError:
    if listed(directory, ".bin", ".pth"):
        return ModelError(
            f"{directory}: holds PyTorch weights (.bin, .pth) and no safetensors, and tpimpi reads no pickles; "
            f"convert it: load it with transformers and save_pretrained()"
        )
    if listed(directory, ".gguf"):
        return ModelError(f"{directory}: holds config.json and no safetensors; give --model the .gguf file itself")
    return ModelError(f"{directory}: holds config.json and no safetensors file; download the model's weights")


def read_json(path: Path) -> Any:
    """What a JSON file of a model holds. ModelError where it cannot be read, or is no JSON."""
    try:
        data = _read_all(path, _MAX_JSON_BYTES)
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_pointer(data, path)
    _refuse_many_parts(data, path)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: is no JSON ({error}); download it again") from error


def _read_all(path: Path, most: int) -> bytes:
    """A file of `most` bytes at most. Raises OSError, and ModelError for a longer one."""
    with open_file(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ModelError(f"{path}: is longer than {most >> 20} MiB; it is no such file")
        return file.read()


def _refuse_many_parts(data: bytes, path: Path) -> None:
    """Raise ModelError for JSON of more arrays and objects than any model has: each takes far more memory than its text."""
    parts = data.count(b"[") + data.count(b"{")
    if parts > _MAX_JSON_PARTS:
        raise ModelError(f"{path}: has {parts} arrays and objects, more than {_MAX_JSON_PARTS}; it is no such file")


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path)
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed:
        raise ModelError(f"{path}: has no weight_map; download it again")
    for name, file_name in placed.items():
        # A name with a folder in it could lead anywhere on the disk.
        if not isinstance(file_name, str) or not re.fullmatch(r"[\w.\-]+\.safetensors", file_name):
            raise ModelError(
                f"{path}: places tensor {shown(name)} in {shown(str(file_name))!r}; a name that ends in .safetensors, "
                f"without folders, is needed"
            )
    return placed


def _read_safetensors_header(file: WeightFile) -> dict[str, Any]:
    """The tensors' entries, after the safetensors library has accepted the file: sizes, offsets, no gaps, no overlap."""
    from safetensors import safe_open

    refuse_pointer(file.read(0, min(file.size, 128)).tobytes(), file.path)
    if file.size >= 8:
        (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
        if _MAX_JSON_BYTES < length <= file.size:
            raise ModelError(
                f"{file.path}: its header has {length} bytes, more than {_MAX_JSON_BYTES >> 20} MiB; {DOWNLOAD_AGAIN}"
            )
        if length <= file.size - 8:
            _refuse_many_parts(file.read(8, length).tobytes(), file.path)
    try:
        with safe_open(file.path, framework="numpy"):
            pass
    except Exception as error:
        raise ModelError(
            f"{file.path}: no whole safetensors file ({error}), {file.size} bytes; {DOWNLOAD_AGAIN}"
        ) from error
    (length,) = struct.unpack("<Q", file.read(0, 8).tobytes())
    file.header_end = 8 + length
    header: dict[str, Any] = json.loads(file.read(8, length).tobytes())
    header.pop("__metadata__", None)
    return header


def _safetensors_entry(
    file: WeightFile, name: str, canonical: str, entry: Mapping[str, Any], dtypes: Mapping[str, str]
) -> Stored:
    format = dtypes.get(entry["dtype"])
    if format is None and entry["dtype"].startswith("F8_"):
        raise ModelError(
            f"{file.path}: tensor {shown(name)} is stored as {entry['dtype']}, FP8, which tpimpi does not read; "
            f"{TAKE_INSTEAD}"
        )
    if format is None:
        raise ModelError(
            f"{file.path}: tensor {shown(name)} is stored as {entry['dtype']}; "
            f"one of {', '.join(_SAFETENSORS_DTYPES)} is needed"
        )
    shape = tuple(entry["shape"])
    row_bytes = math.prod(shape[1:]) * FLOAT_FORMATS.get(format, 1)
    return Stored(TensorInfo(canonical, shape, format), file, file.header_end + entry["data_offsets"][0], row_bytes)


def _check_tied(found: Mapping[str, Stored]) -> None:
    """A tied model's saved head must be its embedding; a few rows tell a head of its own, which would be lost."""
    head, table = found[HEAD_NAME], found.get(EMBEDDING_NAME)
    same = table is not None and head.info.shape == table.info.shape and len(head.info.shape) == 2
    if table is not None and same:
        rows = head.info.shape[0]
        for row in (
            {sample * (rows - 1) // (_COMPARED_HEAD_ROWS - 1) for sample in range(_COMPARED_HEAD_ROWS)} if rows else ()
        ):
            pair = [decode(tensor.info.format, tensor.rows(row, row + 1)) for tensor in (head, table)]
            same = same and np.array_equal(pair[0], pair[1], equal_nan=True)
    if not same:
        raise ModelError(
            f"{head.file.path}: config.json says tie_word_embeddings, but {HEAD_NAME} is not {EMBEDDING_NAME}; "
            f"set tie_word_embeddings to false in config.json"
        )
