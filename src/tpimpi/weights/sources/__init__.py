"""Read a model's tensors one at a time, from a Hugging Face directory (safetensors) or from a GGUF file.

A tensor comes as numbers (`Source.read`) or as the bytes that are stored (`Source.read_blocks`: quantized blocks, or
bf16, f16, f32), whole or a run of rows. Names are canonical (see tpimpi.models.tensors); shapes are [out, in], row-major.
Everything a file says of itself is checked before a tensor is read: header, extents, and that the tensors are exactly
those of the config. Files are read with positioned reads, not mapped: what is not asked for is never in memory, and a
file that shrinks meanwhile is an error instead of a SIGBUS.

`source` holds what every format has in common; `safetensors` and `gguf` each open one, and specify it.
"""

from __future__ import annotations

from pathlib import Path

from tpimpi.errors import ModelError
from tpimpi.weights.sources.describe import ModelFacts, describe_gguf, describe_hf
from tpimpi.weights.sources.gguf import open_gguf
from tpimpi.weights.sources.gguf_header import MAGIC
from tpimpi.weights.sources.gguf_parts import one_model
from tpimpi.weights.sources.hub import in_hub_cache, model_of_snapshot, not_found, resolve_folder
from tpimpi.weights.sources.safetensors import TOKENIZER_FILES, open_hf
from tpimpi.weights.sources.source import Source, decode
from tpimpi.weights.sources.stored import FLOAT_FORMATS, TensorInfo
from tpimpi.weights.sources.weight_file import is_file, listed, open_file, piece_of, unreadable, what_is

__all__ = [
    "FLOAT_FORMATS",
    "TOKENIZER_FILES",
    "ModelFacts",
    "Source",
    "TensorInfo",
    "decode",
    "describe_model",
    "locate_model",
    "open_source",
]


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory, a .gguf file or all parts of a split one, a directory that holds one model in .gguf
    files, or what a Hugging Face cache has of a model: one of its folders, or ORG/NAME.

    Reads and checks the headers alone (and the `rope_freqs` of a GGUF file, and a few rows of a head that a tied model
    has twice). ModelError, one line that names the file, for whatever is missing, broken, or unknown.
    """
    found = locate_model(path)
    return open_hf(found, model_of_snapshot(found)) if _is_hf(found) else open_gguf(found)


def describe_model(path: str | Path) -> ModelFacts:
    """What the model at `path`, as `open_source` takes it, is, whether it can be opened or not. ModelError as there, for
    what is missing or broken."""
    found = locate_model(path)
    return describe_hf(found) if _is_hf(found) else describe_gguf(found)


def locate_model(path: str | Path) -> Path:
    """The directory that holds config.json, or the GGUF file, of the model at `path`. ModelError where there is none."""
    path = Path(path)
    try:
        kind = what_is(path)
    except ValueError as error:  # a NUL, or what the file system's encoding has not
        raise ModelError(
            f"{str(path)!a} is no path ({error}); give a Hugging Face directory or a .gguf file"
        ) from error
    if kind == "nothing":
        cached = in_hub_cache(path)
        if cached is None:
            raise not_found(path)
        path, kind = cached, what_is(cached)
    if kind == "a directory":
        return _in_directory(path)
    if kind != "a file":
        raise ModelError(f"{path}: is {kind}, neither a directory nor a file; give one of the two")
    try:
        with open_file(path) as file:
            magic = file.read(len(MAGIC))
    except OSError as error:
        raise unreadable(path, error) from error
    if magic != MAGIC and path.suffix.lower() != ".gguf":
        remedy = piece_of(path) or "give a .gguf file, or the directory that holds config.json"
        raise ModelError(f"{path}: is no GGUF file; {remedy}")
    return path


def _is_hf(found: Path) -> bool:
    return found.is_dir() and is_file(found / "config.json")


def _in_directory(path: Path) -> Path:
    if is_file(path / "config.json"):
        return path
    found = listed(path, ".gguf")
    if found and (chosen := one_model(found)) is not None:
        return chosen
    if (resolved := resolve_folder(path)) != path:
        return _in_directory(resolved)
    if not found and is_file(path / "adapter_config.json"):
        raise ModelError(
            f"{path}: holds an adapter (adapter_config.json), which changes a model and is none; merge it into its model "
            f"(merge_and_unload of peft) and save that"
        )
    if not found and listed(path, ".safetensors"):
        raise ModelError(
            f"{path}: holds safetensors and no config.json; download the model's config.json and tokenizer into it too"
        )
    what = f"{len(found)} .gguf files ({', '.join(file.name for file in found[:3])}, …)" if found else "no .gguf"
    raise ModelError(f"{path}: holds no config.json and {what}; give a Hugging Face directory or one .gguf file")
