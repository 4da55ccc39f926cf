"""A SyntheticSource written as one GGUF file, or as a Hugging Face folder in bf16: the same weights, number for number.

Neither has a tokenizer. GGUF (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): names, keys and types as
llama.cpp's converter writes them; for architecture llama the rows of Q and K are interleaved within each head, and
Llama 3.1's rope scaling is a tensor of factors. Safetensors are specified in sources.safetensors.

Memory: the source's pool, and a run of rows of a million numbers.
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

from tpimpi import __version__
from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import row_bytes
from tpimpi.errors import InputError, StorageError
from tpimpi.models.architectures import ARCHITECTURES
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import hf_name, interleaved_heads, model_tensors
from tpimpi.system.disk import disk_full, storage_error
from tpimpi.system.files import check_folder as check_is_folder
from tpimpi.weights.sources.synthetic import SyntheticSource

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

# Whose tensors are in files what they are in slices, one by one, and whose GGUF metadata are a Llama's.
WRITTEN_FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
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
    """A tensor of the source as a file shall have it."""

    name: str  # in the source
    stored: str  # in the file
    nbytes: int
    interleaved_heads: int = 0


# GGUF


def check_family(config: ModelConfig) -> None:
    """Raise InputError for a family whose files are not written."""
    if config.architecture not in WRITTEN_FAMILIES:
        raise InputError(
            f"this shape is a {config.architecture}; synth writes {', '.join(WRITTEN_FAMILIES)}; choose one of those"
        )


def check_gguf(config: ModelConfig, fmt: str, path: Path) -> None:
    """Raise InputError where GGUF cannot hold such a model, or `path` is no place for a .gguf file."""
    if path.suffix != ".gguf":
        raise InputError(f"--out is {path}, must be the name of a file that ends in .gguf")
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise InputError(f"--out {path} is there and is no regular file; give another name, or remove it")
    check_is_folder(path.parent, "--out")
    block = FORMATS[fmt].block_weights
    for size in (config.hidden, config.intermediate, config.heads * config.head_dim):
        if size % block:
            raise InputError(
                f"this shape has rows of {size} numbers, {fmt} in a GGUF file needs a multiple of {block}; "
                "give --format bf16 or f32"
            )
    check_family(config)
    family = ARCHITECTURES[config.architecture]
    windows = set(config.attention_windows)
    if any(windows) and (family.gguf_windows is None or len(windows) > 1):
        raise InputError("this shape has attention windows, which a GGUF file of it cannot say; write it --as hf")


def write_gguf(source: SyntheticSource, path: Path, progress: Progress) -> None:
    """Write one GGUF file, under a temporary name until it is whole. Raises InputError, StorageError."""
    from gguf import GGMLQuantizationType

    tensors, factors = _gguf_tensors(source), _rope_factors(source.config)
    temporary = _temporary(path)
    with _storing(path, [temporary]):
        check_gguf(source.config, source.formats.layers[0].q, path)
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = _gguf_writer(source, temporary)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for tensor in tensors:
            info = source.tensors()[tensor.name]
            kind = GGMLQuantizationType[info.format.upper()]
            writer.add_tensor_info(tensor.stored, info.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        with contextlib.closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            file = writer.fout[0]
            sizes = [tensor.nbytes for tensor in tensors] + ([] if factors is None else [factors.nbytes])
            total = _aligned(file.tell()) + sum(map(_aligned, sizes))
            _reserve(file, total, path)
            file.seek(_aligned(file.tell()))
            if factors is not None:
                file.write(factors)
                file.seek(_aligned(file.tell()))
            for tensor in tensors:
                for rows in _rows(source, tensor, as_bf16=False):
                    progress(file.tell(), total)
                    file.write(rows)
                file.seek(_aligned(file.tell()))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    progress(total, total)


def _gguf_writer(source: SyntheticSource, path: Path) -> Any:
    """A GGUFWriter with all metadata; nothing is written yet."""
    from gguf import GGUFWriter, LlamaFileType, RopeScalingType

    config, fmt = source.config, source.formats.layers[0].q
    writer = GGUFWriter(path, ARCHITECTURES[config.architecture].gguf_name)
    writer.add_name(source.name.encode("utf-8", "replace").decode())  # of a folder whose name may be no UTF-8
    kind = _FILE_TYPES.get(fmt, f"MOSTLY_{fmt.upper()}")
    if len(set(source.formats.layers)) > 1:  # a mix
        kind = f"MOSTLY_{fmt.upper()}_M"
    writer.add_file_type(LlamaFileType[kind])
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("none")  # llama.cpp then takes the vocabulary's size from its key
    writer.add_vocab_size(config.vocab)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.intermediate)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.attention_windows[0]:
        writer.add_sliding_window(config.attention_windows[0])
    return writer


def _gguf_tensors(source: SyntheticSource) -> list[_Tensor]:
    tensors = []
    for name, tensor in model_tensors(source.config).items():
        info = source.tensors()[name]
        width = row_bytes(info.format, info.shape[1]) if len(info.shape) > 1 else 4
        heads = interleaved_heads(source.config, tensor.part)
        tensors.append(_Tensor(name, tensor.gguf_name, info.shape[0] * width, heads))
    return tensors


def _rope_factors(config: ModelConfig) -> F32 | None:
    """What Llama 3.1's rope scaling divides each frequency by, f32 [head_dim / 2]; None for other models."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_context / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling.factor + smooth)).astype(np.float32)


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
    check_family(source.config)
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
                    for rows in _rows(source, tensor, as_bf16=True):
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
    for name, info in source.tensors().items():
        tensor = _Tensor(name, hf_name(name), 2 * int(np.prod(info.shape)))
        if files[-1] and sum(other.nbytes for other in files[-1]) + tensor.nbytes > MAX_FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    return files


def _safetensors_header(source: SyntheticSource, tensors: Sequence[_Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        shape, place = source.tensors()[tensor.name].shape, [start, start + tensor.nbytes]
        entries[tensor.stored] = {"dtype": "BF16", "shape": shape, "data_offsets": place}
        start += tensor.nbytes
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


# Both


def _rows(source: SyntheticSource, tensor: _Tensor, *, as_bf16: bool) -> Iterator[Bytes]:
    """The tensor's rows in the file's order, a run at a time: uint8 [rows, bytes a row]."""
    info = source.tensors()[tensor.name]
    order = np.arange(info.shape[0])
    if tensor.interleaved_heads:  # row 2i is the i-th of its head, row 2i + 1 the i-th of the head's second half
        order = order.reshape(tensor.interleaved_heads, 2, -1).swapaxes(1, 2).reshape(-1)
    step = max(1, _SLAB_NUMBERS // info.shape[1]) if len(info.shape) > 1 else order.size
    for first in range(0, order.size, step):
        yield np.ascontiguousarray(source.pick(tensor.name, order[first : first + step], as_bf16=as_bf16))


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
        yield
    except OSError as error:
        raise storage_error(path, error, _ELSEWHERE) from error
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):  # what went wrong before is said instead
                temporary.unlink(missing_ok=True)
