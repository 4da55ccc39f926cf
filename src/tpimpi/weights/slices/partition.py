"""Who owns what: the query heads, KV heads and MLP columns of each rank, and the tiles they are cut into.

Pure arithmetic on a `ModelConfig`; nothing here reads or writes. Query heads are divided contiguously in proportion
to the shares; a KV head whose group of query heads is divided is held by each rank that needs it, so any number of
ranks works, also more ranks than KV heads or than query heads. Columns are divided in runs of 32 (the block of some
quantized formats, and where blocks of 256 may be cut). Within a share, tiles are cut at multiples of 64, so that
pairs of blocks, which are packed together, stay together, and at borders of blocks of 256 where there are such.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from tpimpi.compute.formats import FORMATS
from tpimpi.compute.formats.packed import weight_bytes
from tpimpi.errors import InputError
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import LayerFormats

RUN_COLUMNS = 32
TILE_RUN = 64  # tiles of columns or of the head are cut at multiples of it: pairs of blocks, and panels of 16 rows
TILE_LIMIT_BYTES = 16 * 2**20  # bytes; a tile is never larger unless a single head or run of 64 columns already is
TILE_TARGET_BYTES = 8 * 2**20  # bytes; below this, neighbouring KV heads (or columns) share a tile


class Span(NamedTuple):
    """A half-open run of indices."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


_NO_COLUMNS = Span(0, 0)


@dataclass(frozen=True)
class Share:
    """What one rank owns in every layer."""

    heads: Span  # query heads
    kv_heads: Span  # KV heads that those query heads read; may overlap with a neighbour's
    columns: Span  # columns of the intermediate vector of a dense layer's MLP
    expert_columns: Span = _NO_COLUMNS  # of every expert's
    shared_columns: Span = _NO_COLUMNS  # of the shared experts', together

    @property
    def usual_columns(self) -> Span:
        """Of a mixture those of an expert, else those of a layer's MLP."""
        return self.expert_columns if self.expert_columns.size else self.columns

    def mlp_columns(self, config: ModelConfig, layer: int) -> Span:
        """Columns of what every position goes through in the feed-forward block of a layer."""
        return self.columns if config.router(layer) is None else self.shared_columns


@dataclass(frozen=True)
class Partition:
    """All ranks' shares, in rank order; `proportions` are what they were divided by."""

    proportions: tuple[float, ...]
    shares: tuple[Share, ...]

    @property
    def ranks(self) -> int:
        return len(self.shares)

    def describe(self) -> str:
        """The proportions as the user writes them: 4,2,2,1. Other proportions have another text."""
        return describe_shares(self.proportions)


@dataclass(frozen=True)
class AttentionTile:
    """Some query heads of a rank, and the KV heads whose K and V this tile computes and puts into the cache.

    `q_to_kv[i]` is the index, within the rank's own `Share.kv_heads`, of the KV head that query head i of this tile
    reads. A group too large for one tile is continued in tiles that have query heads only: they read what an earlier
    tile of the same block cached.
    """

    heads: Span
    kv_heads: Span
    q_to_kv: tuple[int, ...]


def make_partition(config: ModelConfig, proportions: Sequence[float]) -> Partition:
    """Divide the heads and columns of `config` among len(proportions) ranks, by these proportions.

    Raises InputError where the proportions are not non-negative numbers with a positive, finite sum.
    """
    try:
        proportions = [float(proportion) + 0.0 for proportion in proportions]  # and -0.0 is 0.0
    except OverflowError:
        proportions = [math.inf]
    if any(not 0 <= proportion < math.inf for proportion in proportions) or not 0 < sum(proportions) < math.inf:
        raise InputError(
            f"--shares is {describe_shares(proportions) or 'empty'}; give one number of 0 or more for each rank, not all 0, "
            "such as --shares 2,1,1"
        )
    head_cuts = _cuts(config.heads, proportions)
    columns = _column_cuts(config.intermediate, proportions)
    experts = _column_cuts(config.expert_intermediate, proportions)
    shared = _column_cuts(config.shared_intermediate, proportions)
    group = config.heads // config.kv_heads
    shares = []
    for rank in range(len(proportions)):
        heads = Span(head_cuts[rank], head_cuts[rank + 1])
        kv_heads = Span(heads.start // group, -(-heads.stop // group)) if heads.size else Span(0, 0)
        shares.append(Share(heads, kv_heads, columns[rank], experts[rank], shared[rank]))
    return Partition(tuple(proportions), tuple(shares))


def describe_shares(proportions: Sequence[float]) -> str:
    """Proportions as the user writes them, "4,2,2,1"; other proportions have another text."""
    return ",".join(repr(proportion).removesuffix(".0") for proportion in proportions)


def _column_cuts(columns: int, proportions: Sequence[float]) -> list[Span]:
    """Each rank's of so many columns."""
    cuts = [min(cut * RUN_COLUMNS, columns) for cut in _cuts(-(-columns // RUN_COLUMNS), proportions)]
    return [Span(first, stop) for first, stop in itertools.pairwise(cuts)]


def _cuts(items: int, proportions: Sequence[float]) -> list[int]:
    """Borders of len(proportions) contiguous parts of `items`, each border rounded from its exact place.

    Exact arithmetic: the same proportions give the same borders on every host (Python 3.12 sums floats otherwise than 3.11).
    """
    passed = list(itertools.accumulate(map(Fraction, proportions)))
    return [0, *(math.floor(items * part / passed[-1] + Fraction(1, 2)) for part in passed[:-1]), items]


def attention_tiles(config: ModelConfig, share: Share, formats: LayerFormats) -> Iterator[AttentionTile]:
    """Tiles of one rank's attention, in order.

    A share that is small is one tile. Otherwise tile borders lie on a grid of KV heads that depends on the model and
    the formats, not on the partition, and where a share ends.
    """
    group = config.heads // config.kv_heads
    head_bytes, kv_bytes = _attention_bytes(config, formats)
    whole = head_bytes * share.heads.size + kv_bytes * share.kv_heads.size <= TILE_TARGET_BYTES
    together = _power_of_two_below(TILE_TARGET_BYTES / (head_bytes * group + kv_bytes))
    heads: list[int] = []
    kv_heads: list[int] = []
    next_head, next_kv = share.heads.start, share.kv_heads.start

    def close() -> Iterator[AttentionTile]:
        nonlocal next_head, next_kv
        if heads or kv_heads:
            span, kv_span = Span(next_head, next_head + len(heads)), Span(next_kv, next_kv + len(kv_heads))
            yield AttentionTile(span, kv_span, tuple(h // group - share.kv_heads.start for h in heads))
            next_head, next_kv = span.stop, kv_span.stop
            heads.clear()
            kv_heads.clear()

    for kv_head in range(*share.kv_heads):
        if kv_head % together == 0 and not whole:
            yield from close()
        mine = range(max(kv_head * group, share.heads.start), min((kv_head + 1) * group, share.heads.stop))
        for head in itertools.chain([None], mine):
            more = kv_bytes if head is None else head_bytes
            if len(heads) * head_bytes + len(kv_heads) * kv_bytes + more > TILE_LIMIT_BYTES:
                yield from close()
            if head is None:
                kv_heads.append(kv_head)
            else:
                heads.append(head)
    yield from close()


def _attention_bytes(config: ModelConfig, formats: LayerFormats) -> tuple[float, float]:
    """Bytes of a query head (its rows of q and columns of o), and of a KV head (its rows of k and v)."""
    weights = config.head_dim * config.hidden
    return (
        weights * (weight_bytes(formats.q) + weight_bytes(formats.o)),
        weights * (weight_bytes(formats.k) + weight_bytes(formats.v)),
    )


def mlp_tiles(config: ModelConfig, columns: Span, formats: LayerFormats) -> Iterator[Span]:
    """Runs of one rank's columns of an MLP, in order: each with its rows of gate and up and its columns of down."""
    if not columns.size:
        return iter(())
    column = sum(map(weight_bytes, (formats.gate, formats.up, formats.down)))
    return _runs(columns, config.hidden * column, FORMATS[formats.down].block_weights)


def head_tiles(config: ModelConfig, fmt: str) -> Iterator[Span]:
    """Runs of vocabulary rows of the output head, in order (rank 0 only)."""
    return _runs(Span(0, config.vocab), config.hidden * weight_bytes(fmt))


def _runs(span: Span, item_bytes: float, block: int = 1) -> Iterator[Span]:
    """`span` whole if it is at most TILE_TARGET_BYTES bytes; else cut at multiples of as many items, a multiple of 64.

    `block` > 64: a multiple of that, so that no block is divided where that saves nothing.
    """
    run = block if block > TILE_RUN and block * item_bytes <= TILE_TARGET_BYTES else TILE_RUN
    if span.size * item_bytes <= TILE_TARGET_BYTES:
        return iter([span] if span.size else [])
    step = max(run, int(TILE_TARGET_BYTES / item_bytes) // run * run)
    inside = range((span.start // step + 1) * step, span.stop, step)
    cuts = itertools.chain([span.start], inside, [span.stop])
    return (Span(a, b) for a, b in itertools.pairwise(cuts) if a < b)


def _power_of_two_below(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)
