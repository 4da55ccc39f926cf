"""What a rank's slice file holds: its tiles and their parts, from the config, the partition and the formats alone.

Pure: slicing writes what stands here, SliceFile refuses a file that holds anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tpimpi.compute.arrays import Bytes
from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.base import PANEL_ROWS, UINT8
from tpimpi.compute.formats.packed import Matrix, packed_bytes
from tpimpi.models.blocks import HEAD, Block, experts_block, layer_blocks
from tpimpi.models.config import ModelConfig
from tpimpi.models.tensors import layer_norms
from tpimpi.models.weight_formats import LayerFormats, ModelFormats
from tpimpi.weights.slices.partition import Share, Span, attention_tiles, head_tiles, mlp_tiles

NONE = Span(0, 0)
ALIGNMENT_BYTES = 4096  # of each dataset in the file, and of each part in a buffer
RESIDENT = Block("resident", -1)
TOKENIZER = Block("tokenizer", -1)
MATRICES = frozenset({"q", "k", "v", "o", "gate", "up", "down", "rows"})  # parts in packed form
_BYTES = "bytes"  # the format of a part that is no numbers: a tokenizer's file


@dataclass(frozen=True)
class Part:
    """One tensor's piece within a tile."""

    name: str
    format: str  # a weight format, or bytes
    shape: tuple[int, ...]  # of a matrix [rows, columns], however it is stored
    first: int = 0  # of a cut of columns: where in a block of 256 the first one stands

    @property
    def is_matrix(self) -> bool:
        """Whether it is stored in packed form."""
        return self.name in MATRICES and self.format != _BYTES

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the dataset."""
        return UINT8 if self.format == _BYTES else FORMATS[self.format].dtype

    @property
    def dataset_shape(self) -> tuple[int, ...]:
        """f32 [panels, columns, 16]; bf16 [panels, ceil(columns / 2), 16, 2]; else [panels, bytes]; no matrix: its shape."""
        if not self.is_matrix:
            return self.shape
        rows, columns = self.shape
        return (-(-rows // PANEL_ROWS), *FORMATS[self.format].panel_shape(columns, self.first))

    @property
    def nbytes(self) -> int:
        if self.is_matrix:
            rows, columns = self.shape
            return packed_bytes(self.format, rows, columns, self.first)
        return math.prod(self.shape) * self.dtype.itemsize

    def matrix(self, data: Bytes) -> Matrix:
        """A matrix of these bytes, which are not copied."""
        rows, columns = self.shape
        return Matrix(self.format, rows, columns, data, self.first)


@dataclass(frozen=True)
class Record:
    """What the header says of one tile."""

    path: str
    block: Block
    parts: tuple[Part, ...]
    heads: Span = NONE
    kv_heads: Span = NONE
    q_to_kv: tuple[int, ...] = ()
    expert: int = -1  # whose tile it is; -1: no expert's

    @property
    def nbytes(self) -> int:
        """Size in a buffer, where each part starts at a multiple of ALIGNMENT_BYTES."""
        return sum(aligned(part.nbytes) for part in self.parts)

    def spans(self) -> Iterator[tuple[int, int, Part]]:
        """Where each part lies in the tile's buffer: (start, stop, part)."""
        position = 0
        for part in self.parts:
            yield position, position + part.nbytes, part
            position += aligned(part.nbytes)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def embedding_dataset(config: ModelConfig, fmt: str) -> tuple[tuple[int, int], np.dtype[Any]]:
    """Shape and dtype of the embedding table's dataset, in row form: [vocab, hidden], or [vocab, bytes a row] of blocks."""
    form = FORMATS[fmt]
    return (config.vocab, form.row_bytes(config.hidden) // form.dtype.itemsize), form.dtype


def slice_records(
    config: ModelConfig, share: Share, rank: int, formats: ModelFormats, tokenizer: Mapping[str, int]
) -> Iterator[Record]:
    """Every tile of a rank's file with its parts, in the order of use. `tokenizer` holds the sizes of its files by name.

    One by one: a hostile config can promise more tiles than memory holds.
    """
    yield _resident(config, rank, formats.router)
    for layer in range(len(formats.layers)):
        yield from layer_records(config, share, rank, formats, layer)
    if rank == 0:
        for index, rows_of_head in enumerate(head_tiles(config, formats.head)):
            part = Part("rows", formats.head, (rows_of_head.size, config.hidden))
            yield Record(f"head/tile-{index:03d}", HEAD, (part,))
        texts = tuple(Part(name, _BYTES, (size,)) for name, size in tokenizer.items())
        yield Record("tokenizer/tile-000", TOKENIZER, texts)


def layer_records(config: ModelConfig, share: Share, rank: int, formats: ModelFormats, layer: int) -> Iterator[Record]:
    """The tiles of one layer, in the order of use."""
    here = formats.layers[layer]
    yield from _attention_records(config, share, layer, here)
    for index, columns in enumerate(mlp_tiles(config, share.mlp_columns(config, layer), here)):
        parts = [Part(name, getattr(here, name), (columns.size, config.hidden)) for name in ("gate", "up")]
        if config.mlp_bias:
            parts += [Part(f"{name}_bias", "f32", (columns.size,)) for name in ("gate", "up")]
        parts.append(_cut("down", here.down, config.hidden, columns))
        yield Record(f"layers/{layer:04d}/mlp/tile-{index:03d}", Block("mlp", layer), tuple(parts))
    if config.router(layer) is not None and (expert := _expert_parts(config, share, rank, here)):
        for number in range(config.experts):
            path = f"{experts_dataset(layer)}/{number:04d}"
            yield Record(path, experts_block(layer), expert, expert=number)


def _attention_records(config: ModelConfig, share: Share, layer: int, formats: LayerFormats) -> Iterator[Record]:
    """The tiles of a layer's attention: whole ones, or first those of the projections, then those of the output."""
    for block in layer_blocks(config, layer)[:-1]:
        for index, tile in enumerate(attention_tiles(config, share, formats)):
            heads = {"q": tile.heads.size, "k": tile.kv_heads.size, "v": tile.kv_heads.size}
            rows = {name: count * config.head_dim for name, count in heads.items() if count}
            parts: list[Part] = []
            kv_heads = NONE
            if block.kind == "qkv" or not config.qk_norm_over_all:
                parts = [Part(name, getattr(formats, name), (size, config.hidden)) for name, size in rows.items()]
                if config.qkv_bias:
                    parts += [Part(f"{name}_bias", "f32", (size,)) for name, size in rows.items()]
                kv_heads = tile.kv_heads
            if block.kind == "attn" and tile.heads.size:
                parts.append(_cut("o", formats.o, config.hidden, times(tile.heads, config.head_dim)))
            if parts:
                path = f"layers/{layer:04d}/{block.kind}/tile-{index:03d}"
                yield Record(path, block, tuple(parts), tile.heads, kv_heads, tile.q_to_kv)


def experts_dataset(layer: int) -> str:
    """The dataset of a layer's experts: uint8 [experts, bytes of a tile], each tile as it lies in a buffer."""
    return f"layers/{layer:04d}/experts"


def _expert_parts(config: ModelConfig, share: Share, rank: int, formats: LayerFormats) -> tuple[Part, ...]:
    """The parts of an expert's tile, the same of all experts of a layer. Rank 0 adds the bias of down, so it has that."""
    columns, parts = share.expert_columns, []
    if columns.size:
        parts += [Part(n, getattr(formats, f"expert_{n}"), (columns.size, config.hidden)) for n in ("gate", "up")]
        if config.expert_bias:
            parts += [Part(f"{name}_bias", "f32", (columns.size,)) for name in ("gate", "up")]
    if config.expert_bias and rank == 0:
        parts.append(Part("down_bias", "f32", (config.hidden,)))
    if columns.size:
        parts.append(_cut("down", formats.expert_down, config.hidden, columns))
    return tuple(parts)


def _cut(name: str, fmt: str, rows: int, columns: Span) -> Part:
    """These columns of a matrix of so many rows."""
    return Part(name, fmt, (rows, columns.size), FORMATS[fmt].first_column(columns.start))


def times(heads: Span, size: int) -> Span:
    """The rows or columns of these heads."""
    return Span(heads.start * size, heads.stop * size)


def _resident(config: ModelConfig, rank: int, router: str) -> Record:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.experts:
        shapes["router"] = (config.layers, config.experts, config.hidden)
        if config.router_bias != "none":
            shapes["router_bias"] = (config.layers, config.experts)
    if config.attention_sinks:
        shapes["sinks"] = (config.layers, config.heads)
    for name, shape in layer_norms(config).items():
        shapes[name] = (config.layers, *shape)
    if rank == 0:
        if config.o_bias:
            shapes["o_bias"] = (config.layers, config.hidden)
        if config.mlp_bias:
            shapes["down_bias"] = (config.layers, config.hidden)
        shapes["norm"] = (config.hidden,)
    parts = [Part(name, router if name == "router" else "f32", shape) for name, shape in shapes.items()]
    if config.trace_positions:
        parts.append(Part("trace", _BYTES, (2 * config.trace_positions * config.layers * config.experts_per_token,)))
    return Record("resident/tile-000", RESIDENT, tuple(parts))
