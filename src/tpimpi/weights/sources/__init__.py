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
from tpimpi.weights.sources.gguf import open_gguf
from tpimpi.weights.sources.safetensors import TOKENIZER_FILES, open_hf
from tpimpi.weights.sources.source import (
    FLOAT_FORMATS,
    Source,
    TensorInfo,
    decode,
    is_file,
    listed,
    open_file,
    unreadable,
    what_is,
)

__all__ = ["FLOAT_FORMATS", "TOKENIZER_FILES", "Source", "TensorInfo", "decode", "open_source"]


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face directory, a .gguf file, or a directory that holds exactly one .gguf file.

    Reads and checks the headers alone (and the `rope_freqs` of a GGUF file, and a few rows of a head that a tied model
    has twice). ModelError, one line that names the file, for whatever is missing, broken, or unknown.
    """
    path = Path(path)
    try:
        kind = what_is(path)
    except ValueError as error:  # a NUL, or what the file system's encoding has not
        raise ModelError(
            f"{str(path)!a} is no path ({error}); give a Hugging Face directory or a .gguf file"
        ) from error
    if kind == "nothing":
        raise ModelError(f"model not found: {path}; give a Hugging Face directory or a .gguf file")
    if kind == "a directory":
        if is_file(path / "config.json"):
            return open_hf(path)
        found = listed(path, ".gguf")
        if len(found) == 1:
            return open_gguf(found[0])
        what = f"{len(found)} .gguf files ({', '.join(file.name for file in found[:3])}, …)" if found else "no .gguf"
        raise ModelError(f"{path}: holds no config.json and {what}; give a Hugging Face directory or one .gguf file")
    if kind != "a file":
        raise ModelError(f"{path}: is {kind}, neither a directory nor a file; give one of the two")
    try:
        with open_file(path) as file:
            magic = file.read(4)
    except OSError as error:
        raise unreadable(path, error) from error
    if magic != b"GGUF" and path.suffix != ".gguf":
        raise ModelError(f"{path}: is no GGUF file; give a .gguf file, or the directory that holds config.json")
    return open_gguf(path)
