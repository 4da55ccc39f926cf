"""A SyntheticSource written as one GGUF file, or as a Hugging Face folder in bf16: the same weights, number for number.

Neither has a tokenizer. GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): names, keys and types as
llama.cpp's converter writes them (see gguf_metadata). What a family's files hold as one matrix, with rows of Q and K
interleaved, or with other numbers in the norms, is so in ours. Safetensors are specified in sources.safetensors.

Memory: the source's pool, and a run of rows of a million numbers; of stacks that are transposed, or whose rows take turns
(gpt-oss), two or three times an expert's matrix.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tpimpi import __version__
from tpimpi.compute.arrays import Bytes
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.bf16 import from_bf16, to_bf16
from tpimpi.compute.formats.packed import row_bytes
from tpimpi.errors import InputError, StorageError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.architectures.base import gguf_same_window
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import (
    ModelTensor,
    Piece,
    fused_tensors,
    hf_norm_offset,
    interleaved_heads,
    model_tensors,
    rotated_rows,
)
from tpimpi.system.disk import disk_full, storage_error
from tpimpi.system.files import check_folder as check_is_folder
from tpimpi.system.files import unfinished
from tpimpi.weights.sources.gguf_metadata import add_metadata, check_metadata, rope_tensors
from tpimpi.weights.sources.synthetic import SyntheticSource

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

MAX_FILE_BYTES = 5 * 10**9  # of a safetensors file at most, unless a single tensor is larger
_SLAB_NUMBERS = 1 << 20  # of a tensor, written at a time; at least a row
_INDEX = "model.safetensors.index.json"
_ELSEWHERE = "choose another place with --out"  # the remedy of a full disk
# What LlamaFileType calls a file of one format where that is not its own name.
_FILE_TYPES = {
    "f32": "ALL_F32",
    **{fmt: f"MOSTLY_{fmt.upper()}_S" for fmt in ("q3_k", "q4_k", "q5_k")},
    "mxfp4": "MOSTLY_MXFP4_MOE",
}
_MARK_KEY = "_tpimpi_synth"  # the key of config.json that says that a folder is ours to write over


@dataclass(frozen=True)
class _Tensor:
    """A tensor as a file shall have it: one of the source, or several as one matrix, or as a stack of matrices.

    The rows of every `turns` of the pieces take turns; a stack may be `transposed`: [experts, columns, rows].
    """

    pieces: tuple[ModelTensor, ...]
    stored: str  # its name in the file
    shape: tuple[int, ...]
    format: str
    nbytes: int
    turns: int = 1
    transposed: bool = False


# GGUF


def check_gguf(config: ModelConfig, fmt: str, path: Path) -> None:
    """Raise InputError where GGUF cannot hold such a model, or `path` is no place for a .gguf file."""
    if path.suffix != ".gguf":
        raise InputError(f"--out is {path}, must be the name of a file that ends in .gguf")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"--out {path} is there and is no regular file; give another name, or remove it")
    check_is_folder(path.parent, "--out")
    block = FORMATS[fmt].block_weights
    columns = [config.mlp_columns(layer) for layer in range(config.layers)]
    for size in (config.hidden, *columns, config.expert_intermediate, config.heads * config.head_dim):
        if size % block:
            raise InputError(
                f"this shape has rows of {size} numbers, {fmt} in a GGUF file needs a multiple of {block}; "
                "give --format bf16 or f32"
            )
    family = ARCHITECTURES[config.architecture]
    windows = {0 if window >= config.context else window for window in config.attention_windows}
    if any(windows) and (family.gguf_windows is None or (family.gguf_windows is gguf_same_window and len(windows) > 1)):
        raise InputError("this shape has attention windows, which a GGUF file of it cannot say; write it --as hf")


def write_gguf(source: SyntheticSource, path: Path, progress: Progress) -> None:
    """Write one GGUF file, under a temporary name until it is whole. Raises InputError, StorageError."""
    from gguf import GGMLQuantizationType

    tensors, factors = _stored_tensors(source, hf=False), rope_tensors(source.config)
    temporary = _temporary(path)
    with _storing(path, [temporary]):
        for fmt in sorted(source.formats.layer_formats()):
            check_gguf(source.config, fmt, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = _gguf_writer(source, temporary)
        check_metadata(writer, source.config, {tensor.stored: tensor.shape for tensor in tensors})
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for tensor in tensors:
            kind = GGMLQuantizationType[tensor.format.upper()]
            writer.add_tensor_info(tensor.stored, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            sizes = [tensor.nbytes for tensor in tensors] + [values.nbytes for values in factors.values()]
            total = _aligned(file.tell()) + sum(map(_aligned, sizes))
            _reserve(file, total, path)
            file.seek(_aligned(file.tell()))
            for values in factors.values():
                file.write(values)
                file.seek(_aligned(file.tell()))
            for tensor in tensors:
                for rows in _rows(source, tensor, hf=False):
                    progress(file.tell(), total)
                    file.write(rows)
                file.seek(_aligned(file.tell()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    progress(total, total)


def _gguf_writer(source: SyntheticSource, path: Path) -> Any:
    """A GGUFWriter with all metadata; nothing is written yet."""
    from gguf import GGUFWriter, LlamaFileType

    config, fmt = source.config, source.formats.layers[0].q
    writer = GGUFWriter(path, ARCHITECTURES[config.architecture].gguf_name)
    writer.add_name(source.name.encode("utf-8", "replace").decode())  # of a folder whose name may be no UTF-8
    kind = _FILE_TYPES.get(fmt, f"MOSTLY_{fmt.upper()}")
    if "mxfp4" in source.formats.layer_formats():
        kind = _FILE_TYPES["mxfp4"]
    elif len(source.formats.layer_formats()) > 1:  # a mix
        kind = f"MOSTLY_{fmt.upper()}_M"
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("none")  # llama.cpp then takes the vocabulary's size from its key
    add_metadata(writer, config)
    return writer


# A Hugging Face folder


def check_folder(folder: Path) -> None:
    """Raise InputError where the folder holds anything but an older model of ours: nobody's weights are written over."""
    check_is_folder(folder, "--out")
    if not folder.exists():
        return
    found = sorted(path.name for path in folder.iterdir())
    try:
        ours = not found or _MARK_KEY in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):  # not there, no JSON, no object
        ours = False
    if not ours:
        raise InputError(
            f"--out {folder} holds {found[0]!r} and no config.json that synth wrote; give an empty folder, or another name"
        )


def write_hf(source: SyntheticSource, folder: Path, progress: Progress) -> None:
    """Write config.json, and safetensors files of MAX_FILE_BYTES with their index; what is unfinished has other names.

    Raises InputError, StorageError.
    """
    files = _safetensors_files(source)
    names = [f"model-{number + 1:05}-of-{len(files):05}.safetensors" for number in range(len(files))]
    temporaries = [_temporary(folder / name) for name in names]
    weights = sum(tensor.nbytes for tensors in files for tensor in tensors)
    done = 0
    with _storing(folder, temporaries):
        check_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < weights:
            raise _too_full(folder, weights, free)
        for tensors, temporary in zip(files, temporaries, strict=True):
            header = _safetensors_header(source, tensors)
            with temporary.open("wb") as file:
                _reserve(file, len(header) + sum(tensor.nbytes for tensor in tensors), folder)
                file.write(header)
                for tensor in tensors:
                    for rows in _rows(source, tensor, hf=True):
                        progress(done, weights)
                        file.write(rows)
                        done += rows.nbytes
                file.flush()
                os.fsync(file.fileno())
        for old in [folder / "config.json", folder / _INDEX, *folder.glob("model-*-of-*.safetensors")]:
            old.unlink(missing_ok=True)
        for name, temporary in zip(names, temporaries, strict=True):
            temporary.replace(folder / name)
        placed = {tensor.stored: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": weights}, "weight_map": placed}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")
        (folder / "config.json").write_text(json.dumps(_hf_config(source), indent=1) + "\n")
    progress(weights, weights)


def _hf_config(source: SyntheticSource) -> dict[str, Any]:
    values = {name: value for name, value in source.shape.values.items() if name not in ("dtype", "torch_dtype")}
    made_by = {"version": __version__, "seed": source.seed, "format": source.formats.describe()}
    architectures = [ARCHITECTURES[source.config.architecture].hf_class]
    return {**values, "architectures": architectures, "torch_dtype": "bfloat16", _MARK_KEY: made_by}


def _safetensors_files(source: SyntheticSource) -> list[list[_Tensor]]:
    files: list[list[_Tensor]] = [[]]
    for tensor in _stored_tensors(source, hf=True):
        if files[-1] and sum(other.nbytes for other in files[-1]) + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    return files


def _safetensors_header(source: SyntheticSource, tensors: Sequence[_Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        place = [start, start + tensor.nbytes]
        entries[tensor.stored] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": place}
        start += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# Both


def _stored_tensors(source: SyntheticSource, *, hf: bool) -> list[_Tensor]:
    """The tensors of a file in the order of the model. Parts of a GGUF matrix that have different formats stay apart."""
    tensors, infos = model_tensors(source.config), source.tensors()
    whole: dict[str, tuple[str, list[Piece]]] = {}
    later: set[str] = set()
    for stored, pieces in fused_tensors(source.config, hf=hf).items():
        names = [piece.name for piece in pieces]
        if hf or len({infos[name].format for name in names}) == 1:
            whole[names[0]] = f"model.{stored}" if hf else stored, pieces
            later.update(names[1:])
    made = []
    for name, tensor in tensors.items():
        if name in later:
            continue
        alone = tensor.hf_name if hf else tensor.gguf_name, [Piece(name, 0, tensor.shape[0])]
        stored, pieces = whole.get(name, alone)
        parts, form = tuple(tensors[piece.name] for piece in pieces), "bf16" if hf else infos[name].format
        rows, columns, height = sum(part.shape[0] for part in parts), tensor.shape[1:], pieces[0].height
        width = row_bytes(form, columns[0] if columns else 1)
        transposed, shape = hf and pieces[0].transposed, (rows, *columns)
        if height:
            shape = (rows // height, *((*columns, height) if transposed else (height, *columns)))
        made.append(_Tensor(parts, stored, shape, form, rows * width, pieces[0].step, transposed))
    return made


def _rows(source: SyntheticSource, tensor: _Tensor, *, hf: bool) -> Iterator[Bytes]:
    """The tensor's rows in the file's order, a run at a time: uint8 [rows, bytes a row]; with `hf` as bf16.

    Of a matrix whose rows take turns with another's, and of one that is transposed, all at once.
    """
    if tensor.turns > 1 or tensor.transposed:
        for first in range(0, len(tensor.pieces), tensor.turns):
            group = tensor.pieces[first : first + tensor.turns]
            picked = [source.pick(piece.name, np.arange(piece.shape[0]), as_bf16=hf) for piece in group]
            matrix = np.stack(picked, axis=1).reshape(-1, picked[0].shape[1])
            yield np.ascontiguousarray(matrix.view("<u2").T).view(np.uint8) if tensor.transposed else matrix
        return
    for piece in tensor.pieces:
        order = _order(source.config, piece, hf=hf)
        offset = hf_norm_offset(source.config) if hf and piece.part.endswith("norm") else 0.0
        step = max(1, _SLAB_NUMBERS // piece.shape[1]) if len(piece.shape) > 1 else order.size
        for first in range(0, order.size, step):
            rows = np.ascontiguousarray(source.pick(piece.name, order[first : first + step], as_bf16=hf))
            if offset:  # a norm's numbers are steps of 1/128 around 1, so this is exact
                rows = to_bf16(from_bf16(rows.view("<u2")) - np.float32(offset)).view(np.uint8)
            yield rows


def _order(config: ModelConfig, tensor: ModelTensor, *, hf: bool) -> npt.NDArray[np.intp]:
    """Which of the source's rows is each of the file's. Of what is rotated of a head row 2i is the i-th, row 2i + 1 the
    i-th of the second half."""
    order = np.arange(tensor.shape[0])
    heads = interleaved_heads(config, tensor.part, hf=hf)
    if not heads:
        return order
    rotated, rest = np.split(order.reshape(heads, -1), [rotated_rows(config)], axis=1)
    rotated = rotated.reshape(heads, 2, -1).swapaxes(1, 2).reshape(heads, -1)
    return np.concatenate([rotated, rest], axis=1).reshape(-1)


def _aligned(size: int) -> int:
    return -(-size // 32) * 32  # GGUF's alignment, where a file names none


def _reserve(file: BinaryIO, size: int, path: Path) -> None:
    """Take the space now, so that a full disk is noticed before any work."""
    if (free := shutil.disk_usage(path if path.is_dir() else path.parent).free) < size:
        raise _too_full(path, size, free)
    os.posix_fallocate(file.fileno(), 0, size)


def _too_full(path: Path, size: int, free: int) -> StorageError:
    return disk_full("the weights need", size, f"where {path} shall be there are", free, _ELSEWHERE)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextlib.contextmanager
def _storing(path: Path, temporaries: Sequence[Path]) -> Iterator[None]:
    """Turn what the operating system says into one line, and leave no unfinished file behind."""
    try:
        with unfinished(*temporaries):
            yield
    except OSError as error:
        raise storage_error(path, error, _ELSEWHERE) from error
