"""From a model to its slices: each tensor is read once, a run of its rows at a time, and dealt to the tiles that own it.

A matrix that is stored in the format it shall have is taken over as it is, whole rows always, and columns where their
borders are borders of the format's blocks; else its numbers are rounded or quantized. Peak memory: a run of rows of
SLAB_NUMBERS numbers, as stored and as f32, and what quantizing them needs, or one of SLAB_BYTES: 32 MB, whatever the size
of the tensors.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from tpimpi.errors import InputError, ModelError, StorageError
from tpimpi.formats import (
    BLOCK_WEIGHTS,
    F32,
    PANEL_ROWS,
    WEIGHT_FORMATS,
    Bytes,
    encode,
    holds_infinities,
    is_quantized,
    pack,
    row_bytes,
    weight_bytes,
)
from tpimpi.model_formats import LayerFormats, ModelFormats
from tpimpi.plan import Block, Plan, Span, attention_tiles
from tpimpi.quantize import Quantizer, quantize
from tpimpi.slicefile import slice_name
from tpimpi.sliceheader import Header
from tpimpi.slicelayout import Record, slice_records
from tpimpi.slicewriter import SliceWriter, storage_error, stored_bytes
from tpimpi.sources import FLOAT_FORMATS, Source, decode

SLAB_NUMBERS = 1 << 20  # of a tensor, worked on at a time; at least 16 rows
SLAB_BYTES = (
    8 << 20
)  # the same, where columns are only taken over: many tiles have few of them, and each piece takes 0.1 ms

Progress = Callable[[int, int], None]  # bytes written so far, bytes in all

_KEPT = {"f32": "f32", "bf16": "bf16", "f16": "bf16", "q8_0": "q8_0", "q4_0": "q4_0", "q4_1": "q4_1"}
# Uniform steps of at most 4 bits, which q4_1 has too; every other type of a GGUF file becomes q8_0.
_FINE_IN_Q4_1 = ("q4_k", "q3_k", "q2_k", "tq1_0", "tq2_0")
_MATRICES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_RESIDENT_TENSORS = {
    "attn_norm": "layers.{}.input_layernorm.weight",
    "mlp_norm": "layers.{}.post_attention_layernorm.weight",
    "q_norm": "layers.{}.self_attn.q_norm.weight",
    "k_norm": "layers.{}.self_attn.k_norm.weight",
    "o_bias": "layers.{}.self_attn.o_proj.bias",
    "down_bias": "layers.{}.mlp.down_proj.bias",
    "norm": "norm.weight",
}
_EMBEDDING = "embed_tokens.weight"


def choose_formats(source: Source, wanted: str) -> ModelFormats:
    """The formats of a source's slices for `--format`. Raises InputError for a format that there is not.

    `auto` keeps each tensor's own; f16 becomes bf16, and the types of GGUF that slices do not have become q4_1 (those of at
    most 4 bits and uniform steps: q4_k, q3_k, q2_k) or q8_0 (all others).
    """
    config = source.config
    if wanted == "auto":
        layers = [
            LayerFormats(**{part: _own(source, _tensor(layer, part)) for part in LayerFormats._fields})
            for layer in range(config.layers)
        ]
        return ModelFormats(tuple(layers), _own(source, _head(source)), _own(source, _EMBEDDING))
    return wanted_formats(wanted, config.layers)


def wanted_formats(wanted: str, layers: int) -> ModelFormats:
    """The formats of a model of so many layers for a `--format` other than auto. Raises InputError as choose_formats."""
    if wanted not in WEIGHT_FORMATS:
        raise InputError(
            f"format is {wanted!r}, must be auto, {', '.join(WEIGHT_FORMATS[:-1])} or {WEIGHT_FORMATS[-1]}"
        )
    return ModelFormats.of(wanted, layers)


def _own(source: Source, tensor: str) -> str:
    stored = source.tensors()[tensor].format
    return _KEPT.get(stored) or ("q4_1" if stored in _FINE_IN_Q4_1 else "q8_0")


def _tensor(layer: int, part: str) -> str:
    return f"layers.{layer}.{_MATRICES[part]}.weight"


def _head(source: Source) -> str:
    return _EMBEDDING if source.config.tied_head else "lm_head.weight"


def requantized(source: Source, plan: Plan, formats: ModelFormats) -> str:
    """What slicing quantizes a second time, in one line: "q4_k is re-quantized to q4_1, q6_k to q8_0"; "" if nothing."""
    pairs: dict[tuple[str, str], None] = {}
    divided: set[str] = set()
    seen: set[tuple[str, LayerFormats]] = set()
    for layer, here in enumerate(formats.layers):
        for part, fmt in zip(LayerFormats._fields, here, strict=True):
            pairs[source.tensors()[_tensor(layer, part)].format, fmt] = None
        stored = source.tensors()[_tensor(layer, "o")].format
        if stored == here.o and is_quantized(stored) and (stored, here) not in seen:
            seen.add((stored, here))
            if not all(_on_blocks(columns, source, _tensor(layer, "o")) for columns in _o_columns(source, plan, here)):
                divided.add(stored)
    pairs[source.tensors()[_head(source)].format, formats.head] = None
    pairs[source.tensors()[_EMBEDDING].format, formats.embedding] = None
    changes = [f"{old} to {new}" for old, new in pairs if old not in FLOAT_FORMATS and is_quantized(new) and old != new]
    words = [changes[0].replace(" to ", " is re-quantized to "), *changes[1:]] if changes else []
    for stored in sorted(divided):
        words.append(
            f"o_proj is re-quantized in its own {stored}, as heads of {source.config.head_dim} columns are cut "
            f"within its blocks of {BLOCK_WEIGHTS}"
        )
    return ", ".join(words)


def _o_columns(source: Source, plan: Plan, formats: LayerFormats) -> Iterator[Span]:
    for share in plan.shares:
        for tile in attention_tiles(source.config, share, formats):
            yield _times(tile.heads, source.config.head_dim)


def _on_blocks(columns: Span, source: Source, tensor: str) -> bool:
    """Whether these columns of a tensor are whole blocks."""
    whole = source.tensors()[tensor].shape[1]
    return columns.start % BLOCK_WEIGHTS == 0 and (columns.stop % BLOCK_WEIGHTS == 0 or columns.stop == whole)


def _is_taken_over(source: Source, tensor: str, fmt: str, columns: Span) -> bool:
    """Whether these columns are stored as they shall be."""
    same = source.tensors()[tensor].format == fmt
    return same and (not is_quantized(fmt) or _on_blocks(columns, source, tensor))


def make_header(source: Source, plan: Plan, rank: int, formats: ModelFormats) -> Header:
    """The header of one rank's slice: every tile with its parts, in the order of use."""
    config = source.config
    tokenizer = {name: len(content) for name, content in source.tokenizer_assets().items()} if rank == 0 else {}
    records = slice_records(config, plan.shares[rank], rank, formats, tokenizer)
    return Header(rank, formats, source.path.stem, source.fingerprint(), config, plan, tuple(records))


def slice_model(
    source: Source,
    plan: Plan,
    formats: ModelFormats,
    folder: Path,
    progress: Progress = lambda done, total: None,
    quantizer: Quantizer = quantize,
) -> None:
    """Write `rank-R-of-N.h5` for every rank of `plan` into `folder`.

    All files are written under temporary names and renamed once the last is whole. `quantizer` may be another
    implementation of `quantize`. Raises ModelError, StorageError.
    """
    _refuse_what_cannot_be_replaced(folder, plan.ranks)
    headers = [make_header(source, plan, rank, formats) for rank in range(plan.ranks)]
    total = sum(map(stored_bytes, headers))
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
    writers: list[SliceWriter] = []
    alone = _lock(folder)
    try:
        remove_leftovers(folder)
        for header in headers:
            writers.append(SliceWriter(folder / slice_name(header.rank, plan.ranks), header))
        _Dealer(source, writers, lambda done: progress(min(done, total), total), quantizer).deal()
        for writer in writers:
            writer.finish()
        for writer in writers:
            writer.publish()
    finally:
        for writer in writers:
            writer.abort()
        os.close(alone)
    progress(total, total)


def _lock(folder: Path) -> int:
    """Keep other slicings, whose files would mix with ours, out of `folder`, until the descriptor it returns is closed."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise storage_error(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise InputError(
            f"another tpimpi is slicing into {folder}; wait until it is done, or choose another --out"
        ) from error
    except OSError:
        pass  # a file system without locks
    return descriptor


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


_Place = tuple[SliceWriter, int, Record]  # a tile in its file


class _Slab:
    """A run of rows of a matrix of the source, read when it is first asked for."""

    def __init__(self, source: Source, tensor: str, rows: slice, quantizer: Quantizer) -> None:
        self.source, self.tensor, self.quantizer = source, tensor, quantizer
        self.info = source.tensors()[tensor]
        self._blocks = source.read_blocks(tensor, rows)
        self._numbers: F32 | None = None

    def stored(self, fmt: str, columns: Span) -> Bytes:
        """These columns in row form: uint8 [rows, bytes a row]. Raises ModelError for numbers that blocks cannot hold."""
        try:
            if _is_taken_over(self.source, self.tensor, fmt, columns):
                first = row_bytes(fmt, columns.start)
                cut = self._blocks[:, first : first + row_bytes(fmt, columns.size)]
                if is_quantized(fmt) and holds_infinities(cut, fmt):
                    raise ValueError("holds scales that are not finite")
                return cut
            if self._numbers is None:
                self._numbers = decode(self.info.format, self._blocks)
            return encode(self._numbers[:, slice(*columns)], fmt, self.quantizer)
        except ValueError as error:
            remedy = "download it again, or choose another --format" if "over" in str(error) else "download it again"
            raise ModelError(f"{self.source.path}: tensor {self.tensor} {error}; {remedy}") from error


class _Dealer:
    """Reads the source in the order of the model and hands every tile its parts."""

    def __init__(
        self, source: Source, writers: Sequence[SliceWriter], report: Callable[[int], None], quantizer: Quantizer
    ) -> None:
        self.source, self.writers, self.report, self.quantizer = source, writers, report, quantizer
        self.config = source.config
        self.done = 0

    def deal(self) -> None:
        by_block: dict[Block, list[_Place]] = {}
        for writer in self.writers:
            for index, record in enumerate(writer.header.records):
                by_block.setdefault(record.block, []).append((writer, index, record))
        for block, tiles in by_block.items():
            if block.kind == "resident":
                self._resident(tiles)
            elif block.kind == "tokenizer":
                for name, content in self.source.tokenizer_assets().items():
                    self._write(tiles[0], name, np.frombuffer(content, np.uint8))
            elif block.kind == "head":
                first = 0
                for tile in tiles:
                    last = first + tile[2].parts[0].shape[0]
                    self._rows(tile, "rows", _head(self.source), Span(first, last))
                    first = last
            elif block.kind == "attn":
                self._attention(block.layer, tiles)
            else:
                self._mlp(block.layer, tiles)
        self._embedding()

    def _write(self, place: _Place, name: str, values: np.ndarray) -> None:
        writer, index, _ = place
        writer.write(index, name, values)
        self._count(values.nbytes)

    def _count(self, nbytes: int) -> None:
        self.done += nbytes
        self.report(self.done)

    def _slabs(self, tensor: str, rows: Span, numbers: int = SLAB_NUMBERS) -> Iterator[tuple[int, _Slab]]:
        """Runs of whole panels of these rows of a matrix, of about so many numbers, each with its first row."""
        columns = self.source.tensors()[tensor].shape[1]
        step = max(1, numbers // columns // PANEL_ROWS) * PANEL_ROWS
        for first in range(rows.start, rows.stop, step):
            yield first, _Slab(self.source, tensor, slice(first, min(first + step, rows.stop)), self.quantizer)

    def _vector(self, name: str) -> F32:
        return self.source.read(name).reshape(-1)

    def _resident(self, tiles: list[_Place]) -> None:
        values: dict[str, F32] = {}
        for tile in tiles:
            for part in tile[2].parts:
                if part.name not in values:
                    name = _RESIDENT_TENSORS[part.name]
                    if "{}" in name:
                        layers = range(self.config.layers)
                        values[part.name] = np.stack([self._vector(name.format(layer)) for layer in layers])
                    else:
                        values[part.name] = self._vector(name)
                self._write(tile, part.name, values[part.name])

    def _attention(self, layer: int, tiles: list[_Place]) -> None:
        size = self.config.head_dim
        for tile in tiles:
            record = tile[2]
            for part in record.parts:
                if part.name != "o":
                    heads = record.heads if part.name.startswith("q") else record.kv_heads
                    self._rows(tile, part.name, _tensor(layer, part.name[0]), _times(heads, size))
        self._columns([(tile, _times(tile[2].heads, size)) for tile in tiles if tile[2].heads.size], "o", layer)

    def _mlp(self, layer: int, tiles: list[_Place]) -> None:
        columns: list[tuple[_Place, Span]] = []
        first = 0  # tiles come in rank order and cover the columns without a gap
        for tile in tiles:
            span = Span(first, first + tile[2].parts[0].shape[0])
            for part in tile[2].parts[:-1]:
                self._rows(tile, part.name, _tensor(layer, part.name.removesuffix("_bias")), span)
            columns.append((tile, span))
            first = span.stop
        self._columns(columns, "down", layer)

    def _rows(self, tile: _Place, name: str, tensor: str, rows: Span) -> None:
        """A part that is a run of rows of a matrix, or of the bias beside it."""
        if name.endswith("_bias"):
            bias = self._vector(tensor.removesuffix("weight") + "bias")
            self._write(tile, name, bias[slice(*rows)])
            return
        part = next(part for part in tile[2].parts if part.name == name)
        columns = part.shape[1]
        for _, slab in self._slabs(tensor, rows):
            self._write(tile, name, pack(slab.stored(part.format, Span(0, columns)), part.format, columns).data)

    def _columns(self, tiles: list[tuple[_Place, Span]], name: str, layer: int) -> None:
        """The tiles' columns of a matrix, all of its rows: the last part of each tile."""
        tensor, fmt, numbers = _tensor(layer, name), tiles[0][0][2].parts[-1].format, SLAB_NUMBERS
        if all(_is_taken_over(self.source, tensor, fmt, columns) for _, columns in tiles):
            numbers = int(SLAB_BYTES / weight_bytes(fmt))
        for _, slab in self._slabs(tensor, Span(0, self.config.hidden), numbers):
            for tile, columns in tiles:
                self._write(tile, name, pack(slab.stored(fmt, columns), fmt, columns.size).data)

    def _embedding(self) -> None:
        fmt = self.writers[0].header.formats.embedding
        for first, slab in self._slabs(_EMBEDDING, Span(0, self.config.vocab)):
            rows = slab.stored(fmt, Span(0, self.config.hidden))
            self.writers[0].write_embedding(first, rows)
            self._count(rows.nbytes)


def _times(heads: Span, size: int) -> Span:
    return Span(heads.start * size, heads.stop * size)
