"""From a model to its slices: each tensor is read once (or a run of its rows at a time) and dealt to the tiles that own it.

Peak memory: one tensor as f32 and one part of it (o_proj or down_proj, whose columns are dealt); everything else is read
by runs of rows that are at most a tile.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tpimpi.errors import InputError, StorageError
from tpimpi.formats import F32, WEIGHT_FORMATS, encode
from tpimpi.plan import Block, Plan, Span
from tpimpi.slicefile import slice_name
from tpimpi.sliceheader import Header
from tpimpi.slicelayout import Part, Record, slice_records
from tpimpi.slicewriter import SliceWriter, storage_error, stored_bytes
from tpimpi.sources import Source

EMBEDDING_ROWS = 4096  # rows of the embedding table that are converted at a time

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all


def choose_format(source: Source, wanted: str) -> str:
    """The slice format for `--format`: `auto` is bf16 for bf16 and f16 sources, else f32 (which loses nothing)."""
    if wanted == "auto":
        return "bf16" if source.native_format() in ("bf16", "f16") else "f32"
    if wanted not in WEIGHT_FORMATS:
        raise InputError(f"format is {wanted!r}, must be auto, {' or '.join(WEIGHT_FORMATS)}")
    return wanted


def make_header(source: Source, plan: Plan, rank: int, fmt: str) -> Header:
    """The header of one rank's slice: every tile with its parts, in the order of use."""
    config = source.config
    tokenizer = {name: len(content) for name, content in source.tokenizer_assets().items()} if rank == 0 else {}
    records = slice_records(config, plan.shares[rank], rank, fmt, tokenizer)
    return Header(rank, fmt, source.path.stem, source.fingerprint(), config, plan, tuple(records))


_RESIDENT_TENSORS = {
    "attn_norm": "layers.{}.input_layernorm.weight",
    "mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "q_norm": "layers.{}.self_attn.q_norm.weight",
    "k_norm": "layers.{}.self_attn.k_norm.weight",
    "o_bias": "layers.{}.self_attn.o_proj.bias",
    "down_bias": "layers.{}.mlp.down_proj.bias",
    "norm": "norm.weight",
}


def slice_model(
    source: Source, plan: Plan, fmt: str, folder: Path, progress: Progress = lambda done, total: None
) -> None:
    """Write `rank-R-of-N.h5` for every rank of `plan` into `folder`.

    All files are written under temporary names and renamed once the last is whole. Raises ModelError, StorageError.
    """
    _refuse_what_cannot_be_replaced(folder, plan.ranks)
    headers = [make_header(source, plan, rank, fmt) for rank in range(plan.ranks)]
    total = sum(stored_bytes(header, embedding=header.rank == 0) for header in headers)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise storage_error(folder, error) from error
    if free < total:
        raise StorageError(
            f"disk full: the slices need {total / 1e9:.2f} GB, {folder} has {free / 1e9:.2f} GB free; "
            "free some space there, or choose another place with --out or TPIMPI_CACHE"
        )
    remove_leftovers(folder)
    writers: list[SliceWriter] = []
    try:
        for header in headers:
            embedding = (source.config.vocab, source.config.hidden) if header.rank == 0 else None
            writers.append(SliceWriter(folder / slice_name(header.rank, plan.ranks), header, embedding=embedding))
        _Dealer(source, writers, lambda done: progress(min(done, total), total)).deal()
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.abort()
    progress(total, total)


def _refuse_what_cannot_be_replaced(folder: Path, ranks: int) -> None:
    """Raise StorageError where a directory has the name of a slice: found while renaming, it would leave a mixed set."""
    for rank in range(ranks):
        path = folder / slice_name(rank, ranks)
        try:
            in_the_way = path.is_dir() and not path.is_symlink()
        except OSError as error:
            raise storage_error(path, error) from error
        if in_the_way:
            raise StorageError(
                f"cannot write {path}: a directory of that name is there; remove it, or choose another --out"
            )


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed slicing left; those of a live process stay."""
    for path in folder.glob(".rank-*.partial"):
        pid = path.name.split(".")[-2]
        if not (pid.isdigit() and Path("/proc", pid).exists() and int(pid) != os.getpid()):
            with contextlib.suppress(OSError):  # it is in nobody's way
                path.unlink()


class _Dealer:
    """Reads the source in the order of the model and hands every tile its parts."""

    def __init__(self, source: Source, writers: Sequence[SliceWriter], report: Callable[[int], None]) -> None:
        self.source, self.writers, self.report = source, writers, report
        self.config = source.config
        self.done = 0

    def deal(self) -> None:
        fmt, config = self.writers[0].header.format, self.config
        by_block: dict[Block, list[tuple[SliceWriter, int, Record]]] = {}
        for writer in self.writers:
            for index, record in enumerate(writer.header.records):
                by_block.setdefault(record.block, []).append((writer, index, record))
        for block, tiles in by_block.items():
            if block.kind == "resident":
                self._resident(tiles)
            elif block.kind == "tokenizer":
                assets = self.source.tokenizer_assets()
                for name, content in assets.items():
                    self._write(*tiles[0][:2], name, np.frombuffer(content, np.uint8))
            elif block.kind == "head":
                name = "embed_tokens.weight" if config.tied_head else "lm_head.weight"
                first = 0
                for writer, index, record in tiles:
                    rows = record.parts[0].shape[0]
                    self._write(writer, index, "rows", encode(self.source.read(name, slice(first, first + rows)), fmt))
                    first += rows
            elif block.kind == "attn":
                self._attention(block.layer, tiles, fmt)
            else:
                self._mlp(block.layer, tiles, fmt)
        for first in range(0, config.vocab, EMBEDDING_ROWS):
            last = min(first + EMBEDDING_ROWS, config.vocab)
            rows_of_table = encode(self.source.read("embed_tokens.weight", slice(first, last)), fmt)
            self.writers[0].write_embedding(first, rows_of_table)
            self._count(rows_of_table.nbytes)

    def _write(self, writer: SliceWriter, index: int, name: str, values: np.ndarray) -> None:
        writer.write(index, name, values)
        self._count(values.nbytes)

    def _count(self, nbytes: int) -> None:
        self.done += nbytes
        self.report(self.done)

    def _vector(self, name: str) -> F32:
        return self.source.read(name).reshape(-1)

    def _resident(self, tiles: list[tuple[SliceWriter, int, Record]]) -> None:
        values: dict[str, F32] = {}
        for writer, index, record in tiles:
            for part in record.parts:
                if part.name not in values:
                    name = _RESIDENT_TENSORS[part.name]
                    if "{}" in name:
                        layers = range(self.config.layers)
                        values[part.name] = np.stack([self._vector(name.format(layer)) for layer in layers])
                    else:
                        values[part.name] = self._vector(name)
                self._write(writer, index, part.name, values[part.name])

    def _attention(self, layer: int, tiles: list[tuple[SliceWriter, int, Record]], fmt: str) -> None:
        prefix, size = f"layers.{layer}.self_attn.", self.config.head_dim
        for writer, index, record in tiles:
            for part in record.parts[:-1] if record.heads.size else record.parts:
                heads = record.heads if part.name.startswith("q") else record.kv_heads
                self._rows(writer, index, part, prefix + part.name[0] + "_proj", _times(heads, size), fmt)
        columns = [(writer, index, _times(record.heads, size)) for writer, index, record in tiles if record.heads.size]
        self._columns(columns, "o", prefix + "o_proj.weight", fmt)

    def _mlp(self, layer: int, tiles: list[tuple[SliceWriter, int, Record]], fmt: str) -> None:
        prefix = f"layers.{layer}.mlp."
        columns: list[tuple[SliceWriter, int, Span]] = []
        first = 0  # tiles come in rank order and cover the columns without a gap
        for writer, index, record in tiles:
            span = Span(first, first + record.parts[0].shape[0])
            for part in record.parts[:-1]:
                self._rows(writer, index, part, prefix + part.name.removesuffix("_bias") + "_proj", span, fmt)
            columns.append((writer, index, span))
            first = span.stop
        self._columns(columns, "down", prefix + "down_proj.weight", fmt)

    def _rows(self, writer: SliceWriter, index: int, part: Part, tensor: str, rows: Span, fmt: str) -> None:
        if part.name.endswith("_bias"):
            self._write(writer, index, part.name, self._vector(tensor + ".bias")[slice(*rows)])
        else:
            self._write(writer, index, part.name, encode(self.source.read(tensor + ".weight", slice(*rows)), fmt))

    def _columns(self, tiles: list[tuple[SliceWriter, int, Span]], part: str, tensor: str, fmt: str) -> None:
        whole = self.source.read(tensor)
        for writer, index, columns in tiles:
            self._write(writer, index, part, encode(np.ascontiguousarray(whole[:, slice(*columns)]), fmt))


def _times(heads: Span, size: int) -> Span:
    return Span(heads.start * size, heads.stop * size)
