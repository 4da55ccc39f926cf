"""Building tiles: each tensor is read once, a run of its rows at a time, and written to the tiles that own it.

A matrix that is stored in the format it shall have is taken over as it is, whole rows always, and columns where they are
cut at multiples of 32; else its numbers are rounded or quantized, blocks of 256 where they lie in the whole matrix, so that
its numbers do not depend on how it is cut. Only what is missing somewhere is
written, and a tensor of which nothing is missing is not read. Peak memory: a run of rows of SLAB_NUMBERS numbers, as stored
and as f32, and what quantizing them needs, or one of SLAB_BYTES: 32 MB, whatever the size of the tensors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from tpimpi.compute.arrays import F32, Array, Bytes
from tpimpi.compute.formats import FORMATS, is_quantized
from tpimpi.compute.formats.base import PANEL_ROWS, Quantizer
from tpimpi.compute.formats.packed import encode, holds_infinities, pack, row_bytes, weight_bytes
from tpimpi.errors import ModelError
from tpimpi.models.blocks import LAYER_KINDS, Block
from tpimpi.models.tensors import EMBEDDING_NAME, NORM_NAME, head_name, layer_specs, part_name
from tpimpi.weights.slices.header import Header, tile_spans
from tpimpi.weights.slices.layout import Part, Record, times
from tpimpi.weights.slices.partition import Span
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import Source, decode

SLAB_NUMBERS = 1 << 20  # of a tensor, worked on at a time; at least 16 rows
# The same, where columns are only taken over: many tiles have few of them, and each piece takes 0.1 ms.
SLAB_BYTES = 8 << 20


class TileWriter(Protocol):
    """Takes a rank's tiles: writes them to its file, or sends them to its host."""

    @property
    def header(self) -> Header:
        """Of the rank's slice."""

    @property
    def missing(self) -> Sequence[int]:
        """Records whose tiles it wants, in order."""

    def write(self, index: int, name: str, values: Array) -> None:
        """Take the next piece of part `name` of record `index`: its parts in order, a part's pieces from front to back."""


def on_blocks(columns: Span, source: Source, tensor: str) -> bool:
    """Whether these columns of a tensor may be cut out as they are stored."""
    info = source.tensors()[tensor]
    unit = FORMATS[info.format].cut_weights
    return columns.start % unit == 0 and (columns.stop % unit == 0 or columns.stop == info.shape[1])


def _is_taken_over(source: Source, tensor: str, fmt: str, columns: Span) -> bool:
    """Whether these columns are stored as they shall be."""
    same = source.tensors()[tensor].format == fmt
    return same and (not is_quantized(fmt) or on_blocks(columns, source, tensor))


def build_tiles(
    source: Source,
    writers: Sequence[TileWriter],
    table: SliceWriter | None,
    report: Callable[[int], None],
    quantizer: Quantizer,
) -> None:
    """Give every writer its missing tiles, in the order of the model, and `table` the rows of the embedding that it lacks.

    `report` gets the bytes written so far. Raises ModelError.
    """
    _Builder(source, writers, table, report, quantizer).build()


def bytes_to_build(writers: Sequence[TileWriter], table: SliceWriter | None) -> int:
    """How many bytes `build_tiles` will report in the end."""
    total = sum(
        part.nbytes for writer in writers for index in writer.missing for part in writer.header.records[index].parts
    )
    if table is not None:
        width = row_bytes(table.header.formats.embedding, table.header.config.hidden)
        total += sum(rows.size for rows in table.missing_rows) * width
    return total


_Target = tuple[TileWriter, int, Record, Span]  # a tile in its slice, and its columns of the MLP or rows of the head


def _expert(tile: _Target) -> int:
    return tile[2].expert


class _Slab:
    """A run of rows of a matrix of the source, read when it is first asked for."""

    def __init__(self, source: Source, tensor: str, rows: slice, quantizer: Quantizer) -> None:
        self.source, self.tensor, self.quantizer = source, tensor, quantizer
        self.info = source.tensors()[tensor]
        self._blocks = source.read_blocks(tensor, rows)
        self._numbers: F32 | None = None

    def packed(self, fmt: str, columns: Span) -> Bytes:
        """These columns in packed form. Raises ModelError for numbers that blocks cannot hold."""
        return pack(self.stored(fmt, columns), fmt, columns.size, FORMATS[fmt].first_column(columns.start)).data

    def stored(self, fmt: str, columns: Span) -> Bytes:
        """These columns in row form: uint8 [rows, bytes a row]. Raises ModelError for numbers that blocks cannot hold."""
        form = FORMATS[fmt]
        first = form.first_column(columns.start)
        start, width = columns.start - first, self.info.shape[1]
        try:
            if _is_taken_over(self.source, self.tensor, fmt, columns):
                begin = form.row_bytes(start)
                cut = self._blocks[:, begin : begin + form.row_bytes(columns.size, first)]
                if is_quantized(fmt) and holds_infinities(cut, fmt):
                    raise ValueError("holds scales that are not finite")
                return cut
            if self._numbers is None:
                self._numbers = decode(self.info.format, self._blocks)
            stop = columns.stop
            if form.block_weights > form.cut_weights and start % form.block_weights == 0:
                stop = min(width, start + form.blocks(columns.size, first) * form.block_weights)
            return encode(self._numbers[:, start:stop], fmt, self.quantizer)
        except ValueError as error:
            remedy = "download it again, or choose another --format" if "over" in str(error) else "download it again"
            raise ModelError(f"{self.source.path}: tensor {self.tensor} {error}; {remedy}") from error


class _Builder:
    """Reads the source in the order of the model and hands every tile its parts."""

    def __init__(
        self,
        source: Source,
        writers: Sequence[TileWriter],
        table: SliceWriter | None,
        report: Callable[[int], None],
        quantizer: Quantizer,
    ) -> None:
        self.source, self.writers, self.table, self.report, self.quantizer = source, writers, table, report, quantizer
        self.config = source.config
        self.done = 0

    def build(self) -> None:
        by_block: dict[Block, list[_Target]] = {}
        for writer in self.writers:
            spans = tile_spans(writer.header)
            for index in writer.missing:
                record = writer.header.records[index]
                by_block.setdefault(record.block, []).append((writer, index, record, spans[index]))
        for block in sorted(by_block, key=self._turn):
            tiles = by_block[block]
            if block.kind == "resident":
                self._resident(tiles)
            elif block.kind == "tokenizer":
                for name, content in self.source.tokenizer_assets().items():
                    self._write(tiles[0], name, np.frombuffer(content, np.uint8))
            elif block.kind == "head":
                for tile in tiles:
                    self._rows(tile, "rows", head_name(self.config), tile[3])
            elif block.kind in ("qkv", "attn"):
                self._attention(block.layer, tiles)
            elif block.kind == "mlp":
                self._mlp(block.layer, tiles)
            else:
                self._experts(block.layer, tiles)
        if self.table is not None:
            self._embedding(self.table)

    def _turn(self, block: Block) -> tuple[bool, int, int]:
        """Sorts blocks in the order in which a model's file has them: what is small, the layers, the head."""
        kinds = (*LAYER_KINDS, "experts")
        inside = kinds.index(block.kind) if block.kind in kinds else 0
        return (block.kind in ("head", "tokenizer"), block.layer, inside)

    def _write(self, place: _Target, name: str, values: np.ndarray) -> None:
        place[0].write(place[1], name, values)
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

    def _resident(self, tiles: list[_Target]) -> None:
        values: dict[str, Array] = {}
        for tile in tiles:
            for part in tile[2].parts:
                if part.name not in values:
                    values[part.name] = self._resident_part(part)
                self._write(tile, part.name, values[part.name])

    def _resident_part(self, part: Part) -> Array:
        """The output norm [hidden], or a norm, bias or router of all layers: [layers, …], zeros where a layer has none."""
        if part.name == "norm":
            return self._vector(NORM_NAME)
        if part.name == "trace":
            return np.frombuffer(self.source.trace(), np.uint8)
        values = np.zeros(part.shape, part.dtype)
        for layer in range(self.config.layers):
            specs = layer_specs(self.config, layer)
            own = part.name in specs
            name, kind = (part.name, "weight") if own else (part.name.removesuffix("_bias"), "bias")
            if name not in specs:
                continue
            tensor = part_name(self.config, layer, name, kind)
            if part.format == "f32":
                values[layer] = self.source.read(tensor)
            else:  # a router, which is kept as it is
                values[layer] = self.source.read_blocks(tensor).view(part.dtype)
        return values

    def _attention(self, layer: int, tiles: list[_Target]) -> None:
        size = self.config.head_dim
        for tile in tiles:
            record = tile[2]
            for part in record.parts:
                if part.name != "o":
                    heads = record.heads if part.name.startswith("q") else record.kv_heads
                    self._rows(tile, part.name, part_name(self.config, layer, part.name[0]), times(heads, size))
        with_output = [tile for tile in tiles if tile[2].parts[-1].name == "o"]
        self._columns([(tile, times(tile[2].heads, size)) for tile in with_output], part_name(self.config, layer, "o"))

    def _mlp(self, layer: int, tiles: list[_Target]) -> None:
        for tile in tiles:
            for part in tile[2].parts[:-1]:
                self._rows(tile, part.name, part_name(self.config, layer, part.name.removesuffix("_bias")), tile[3])
        self._columns([(tile, tile[3]) for tile in tiles], part_name(self.config, layer, "down"))

    def _experts(self, layer: int, tiles: list[_Target]) -> None:
        """Expert after expert, each for all ranks."""
        for expert, group in itertools.groupby(sorted(tiles, key=_expert), key=_expert):
            own = list(group)
            for tile in own:
                for part in tile[2].parts:
                    name = part.name.removesuffix("_bias")
                    rows = Span(0, self.config.hidden) if name == "down" else tile[3]
                    if part.name != "down":
                        self._rows(
                            tile, part.name, part_name(self.config, layer, f"expert_{name}", expert=expert), rows
                        )
            cut = [(tile, tile[3]) for tile in own if tile[3].size]
            self._columns(cut, part_name(self.config, layer, "expert_down", expert=expert))

    def _rows(self, tile: _Target, name: str, tensor: str, rows: Span) -> None:
        """A part that is a run of rows of a matrix, or of the bias beside it."""
        if name.endswith("_bias"):
            bias = self._vector(tensor.removesuffix("weight") + "bias")
            self._write(tile, name, bias[slice(*rows)])
            return
        part = next(part for part in tile[2].parts if part.name == name)
        columns = part.shape[1]
        for _, slab in self._slabs(tensor, rows):
            self._write(tile, name, slab.packed(part.format, Span(0, columns)))
            del slab  # before the next one is read

    def _columns(self, tiles: list[tuple[_Target, Span]], tensor: str) -> None:
        """The tiles' columns of a matrix, all of its rows: the last part of each tile, down or o."""
        if not tiles:
            return
        fmt, numbers = tiles[0][0][2].parts[-1].format, SLAB_NUMBERS
        if all(_is_taken_over(self.source, tensor, fmt, columns) for _, columns in tiles):
            numbers = int(SLAB_BYTES / weight_bytes(fmt))
        for _, slab in self._slabs(tensor, Span(0, self.config.hidden), numbers):
            for tile, columns in tiles:
                self._write(tile, tile[2].parts[-1].name, slab.packed(fmt, columns))
            del slab  # before the next one is read

    def _embedding(self, table: SliceWriter) -> None:
        fmt = table.header.formats.embedding
        for wanted in table.missing_rows:
            for first, slab in self._slabs(EMBEDDING_NAME, wanted):
                rows = slab.stored(fmt, Span(0, self.config.hidden))
                table.write_embedding(first, rows)
                self._count(rows.nbytes)
                del slab, rows  # before the next one is read
