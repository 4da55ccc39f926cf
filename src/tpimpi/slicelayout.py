"""What a rank's slice file holds: its tiles and their parts, from the config and the plan alone.

Pure: slicing writes what stands here, SliceFile refuses a file that holds anything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tpimpi.config import ModelConfig
from tpimpi.formats import DTYPES
from tpimpi.plan import HEAD, Block, Share, Span, attention_tiles, head_tiles, mlp_tiles

NONE = Span(0, 0)
ALIGNMENT = 4096  # of each dataset in the file, and of each part in a buffer
RESIDENT = Block("resident", -1)
TOKENIZER = Block("tokenizer", -1)


@dataclass(frozen=True)
class Part:
    """One tensor's piece within a tile."""

    name: str
    format: str  # f32, bf16, or bytes
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.format].itemsize


@dataclass(frozen=True)
class Record:
    """What the header says of one tile."""

    path: str
    block: Block
    parts: tuple[Part, ...]
    heads: Span = NONE
    kv_heads: Span = NONE
    q_to_kv: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size in a buffer, where each part starts at a multiple of ALIGNMENT."""
        return sum(aligned(part.nbytes) for part in self.parts)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def slice_records(
    config: ModelConfig, share: Share, rank: int, fmt: str, tokenizer: Mapping[str, int]
) -> Iterator[Record]:
    """Every tile of a rank's file with its parts, in the order of use. `tokenizer` holds the sizes of its files by name.

    One by one: a hostile config can promise more tiles than memory holds.
    """
    weight = DTYPES[fmt].itemsize
    yield _resident(config, rank)
    for layer in range(config.layers):
        attn, mlp = Block("attn", layer), Block("mlp", layer)
        for index, tile in enumerate(attention_tiles(config, share, weight)):
            rows = {"q": tile.heads.size, "k": tile.kv_heads.size, "v": tile.kv_heads.size}
            rows = {name: heads * config.head_dim for name, heads in rows.items() if heads}
            parts = [Part(name, fmt, (size, config.hidden)) for name, size in rows.items()]
            if config.qkv_bias:
                parts += [Part(f"{name}_bias", "f32", (size,)) for name, size in rows.items()]
            if tile.heads.size:
                parts.append(Part("o", fmt, (config.hidden, rows["q"])))
            path = f"layers/{layer:04d}/attn/tile-{index:03d}"
            yield Record(path, attn, tuple(parts), tile.heads, tile.kv_heads, tile.q_to_kv)
        for index, columns in enumerate(mlp_tiles(config, share, weight)):
            parts = [Part(name, fmt, (columns.size, config.hidden)) for name in ("gate", "up")]
            if config.mlp_bias:
                parts += [Part(f"{name}_bias", "f32", (columns.size,)) for name in ("gate", "up")]
            parts.append(Part("down", fmt, (config.hidden, columns.size)))
            yield Record(f"layers/{layer:04d}/mlp/tile-{index:03d}", mlp, tuple(parts))
    if rank == 0:
        for index, rows_of_head in enumerate(head_tiles(config, weight)):
            part = Part("rows", fmt, (rows_of_head.size, config.hidden))
            yield Record(f"head/tile-{index:03d}", HEAD, (part,))
        texts = tuple(Part(name, "bytes", (size,)) for name, size in tokenizer.items())
        yield Record("tokenizer/tile-000", TOKENIZER, texts)


def _resident(config: ModelConfig, rank: int) -> Record:
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("attn_norm", "mlp_norm"), (config.layers, config.hidden))
    if config.qk_norm:
        shapes |= dict.fromkeys(("q_norm", "k_norm"), (config.layers, config.head_dim))
    if rank == 0:
        if config.o_bias:
            shapes["o_bias"] = (config.layers, config.hidden)
        if config.mlp_bias:
            shapes["down_bias"] = (config.layers, config.hidden)
        shapes["norm"] = (config.hidden,)
    parts = tuple(Part(name, "f32", shape) for name, shape in shapes.items())
    return Record("resident/tile-000", RESIDENT, parts)
