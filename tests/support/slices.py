"""Slice files: all that is in one, and copies that are damaged or forged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from tpimpi.compute.formats.packed import values
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name


def datasets(path: Path) -> dict[str, bytes]:
    """All of a slice but what HDF5 adds."""
    found: dict[str, bytes] = {}

    def note(name: str, thing: h5py.Group | h5py.Dataset) -> None:
        if isinstance(thing, h5py.Dataset):
            found[name] = thing[...].tobytes()

    with h5py.File(path) as file:
        file.visititems(note)
    return found


def spoil(path: Path, dataset: str, at: int = 0) -> None:
    """Change a byte of a dataset, behind HDF5's back."""
    with h5py.File(path) as file:
        offset = file[dataset].id.get_offset() + at
    with path.open("r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 0x55]))


def joined(folder: Path, ranks: int) -> dict[str, np.ndarray]:
    """The numbers of all ranks' tiles, put together, by GGUF's names."""
    names = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}
    names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    pieces: dict[str, list[np.ndarray]] = {}
    kv_heads: dict[str, int] = {}  # the next that is new: neighbours may both have one
    for rank in range(ranks):
        file = SliceFile(folder / slice_name(rank, ranks))
        for record in file.records:
            for part, matrix in file.load(record).matrices.items():
                name = "output" if part == "rows" else f"blk.{record.block.layer}.{names[part]}"
                found = values(matrix)
                if part in ("k", "v"):
                    size = found.shape[0] // record.kv_heads.size
                    found = found[(kv_heads.get(name, 0) - record.kv_heads.start) * size :]
                    kv_heads[name] = record.kv_heads.stop
                pieces.setdefault(name, []).append(found)
        if rank == 0:
            pieces["token_embd"] = [file.embedding_rows(range(160))]
        file.close()
    return {
        name: np.concatenate(found, axis=1 if name.endswith(("attn_output", "ffn_down")) else 0)
        for name, found in pieces.items()
    }


def forged(original: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose header is changed, with checksums that fit it."""
    target = tmp_path / original.name
    shutil.copy(original, target)
    with h5py.File(target, "r+") as file:
        values = json.loads(file["header"][...].tobytes())
        sums = dict(zip((tile["path"] for tile in values["tiles"]), file["checksums"][1:], strict=True))
        change(values)
        header = json.dumps(values).encode()
        del file["header"], file["checksums"]
        file["header"] = np.frombuffer(header, np.uint8)
        tiles = [sums.get(tile.get("path"), 0) for tile in values["tiles"]]
        file["checksums"] = np.array([xxhash.xxh3_64_intdigest(header), *tiles], np.uint64)
    return target


def checked_contents(path: Path) -> dict[str, bytes]:
    """Everything that a run takes from a slice file, every checksum checked."""
    file = SliceFile(path)
    try:
        found = {"header": repr(file.header).encode()}
        for record in file.records:
            tile = file.load(record)
            for name, part in tile.parts.items():
                found[f"{record.path}/{name}"] = part.tobytes()
            for name, matrix in tile.matrices.items():
                found[f"{record.path}/{name}"] = matrix.data.tobytes()
        if file.has_embedding:
            found["embedding"] = file.embedding_rows(range(file.header.config.vocab)).tobytes()
        return found
    finally:
        file.close()
