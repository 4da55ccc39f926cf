"""The model on one rank: where the window, the layers and the star meet."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.backends import Backend
from tpimpi.engine.trace import COMPUTE, STAR, Recorder
from tpimpi.engine.window import Window
from tpimpi.models.blocks import HEAD, Block
from tpimpi.models.kv.cache import KVCache, kv_dtype
from tpimpi.models.layers.attention import QKNorm, attention_partial
from tpimpi.models.layers.head import head_logits
from tpimpi.models.layers.mlp import mlp_partial
from tpimpi.models.layers.rope import Angles, angles, rope_frequencies
from tpimpi.star import Allreduce, Star
from tpimpi.weights.slices.file import Tile
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Record

_NOT_RECORDED = contextlib.nullcontext()


PREFILL_CHUNK = 128  # positions computed at once while a prompt is read
OVERLAP_FROM = 32  # of so many, half are computed while the sum of the others is under way


def block_order(header: Header) -> list[Block]:
    """The cycle of blocks that a rank goes through for each token; only rank 0 has the head."""
    layers = [Block(kind, layer) for layer in range(header.config.layers) for kind in ("attn", "mlp")]
    return [*layers, HEAD] if header.rank == 0 else layers


def work_bytes(
    header: Header, records: Sequence[Record], backend: str, context: int, logits_of: int, *, all_partials: bool = False
) -> int:
    """Memory, at most, of activations and messages on this rank, beside cache and weights.

    Counted for a step of PREFILL_CHUNK positions (or `context`, if that is less), through the `records` of a cycle; and
    on rank 0 the logits of `logits_of` positions. `all_partials`: every rank gets those of all, as the hub does.
    """
    config, ranks = header.config, header.partition.ranks
    positions = min(PREFILL_CHUNK, context)
    # Hidden vectors at once: in step or follow, forward, norm and partial; and those on the star, which the hub has of every
    # rank, the others of two at most; each is held twice while it is received.
    vectors = 7 + 2 * (ranks if header.rank == 0 or all_partials else 2)
    inner = largest = heads = 0
    for record in records:
        rows = {part.name: part.shape[0] for part in record.parts if part.is_matrix}
        inner = max(inner, 3 * rows.get("q", 0) + 4 * rows.get("k", 0), 3 * rows.get("gate", 0))
        heads = max(heads, record.heads.size)
        largest = max(largest, *(math.prod(part.shape) for part in record.parts if part.is_matrix))
    work = 4 * positions * (vectors * config.hidden + inner + max(config.hidden, inner) // 2)
    if (
        backend != "native"
    ):  # which decodes a matrix to use it, and whose library takes memory of its own when it begins
        work += 12 * largest + 48_000_000
        # Nor does it go through the keys and values piece by piece: scores, mask and weights, and keys and values in f32.
        kv_heads = header.share.kv_heads.size
        work += 4 * context * (3 * heads * positions + 4 * max(heads, kv_heads) * config.head_dim)
    if header.rank == 0:
        work += (12 + 12 * (logits_of > 1)) * logits_of * config.vocab + 64 * config.vocab
    return work


def runs_of_positions(positions: int, ranks: int) -> list[slice]:
    """How a chunk goes through a block: whole, or where it is long in two halves, so that the sum of one is under way while
    the other computes. It depends on nothing else, so that the same chunks give the same numbers to the bit."""
    if ranks == 1 or positions < OVERLAP_FROM:
        return [slice(0, positions)]
    half = -(-positions // 2)
    return [slice(0, half), slice(half, positions)]


def largest_sum(hidden: int, ranks: int) -> int:
    """Numbers of the largest sum over so many ranks in any step."""
    return hidden * max(part.stop - part.start for part in runs_of_positions(PREFILL_CHUNK, ranks))


@dataclass
class _Part:
    """Positions that go through a block together."""

    x: F32  # [n, hidden], a view of the chunk's
    rotary: Angles
    h: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))  # [n, hidden], normed
    partial: F32 = field(default_factory=lambda: np.empty((0, 0), np.float32))  # [n, hidden], of the block so far
    sum: Allreduce | None = None  # of `partial`, while it is under way


class Model:
    """One rank's part of a model; all ranks call `begin` and then `forward` together."""

    def __init__(
        self,
        header: Header,
        resident: Mapping[str, Array],
        window: Window,
        star: Star,
        backend: Backend,
        kv: str = "auto",
        *,
        make_room: Callable[[int], None] = lambda context: None,
        recorder: Recorder | None = None,
    ) -> None:
        """`resident` are the small arrays that are kept in memory (see slices/file); `kv` is one of KV_FORMATS;
        `make_room` is called with the number of positions before a cache for them is made."""
        self.config, self.share = header.config, header.share
        self.resident, self.window, self.star, self.backend = resident, window, star, backend
        self.cache: KVCache | None = None
        self._kv_dtype = kv_dtype(kv, itertools.chain(*header.formats.layers))
        self.compute_seconds = 0.0
        self._make_room, self._recorder = make_room, recorder
        self._blocks = [block for block in block_order(header) if block != HEAD]
        self._frequencies = rope_frequencies(self.config)

    def begin(self, context: int) -> None:
        """Start a new sequence of at most `context` positions."""
        if self.cache is None or self.cache.context != context:
            self.cache = None  # give the old one back before the new one is made
            self._make_room(context)
            shape = (self.config.layers, self.share.kv_heads.size, context, self.config.head_dim)
            self.cache = KVCache(*shape, self._kv_dtype)

    def forward(self, x: F32, start: int, *, head: bool = True) -> F32:
        """Run hidden vectors `x` [n, hidden], the same on every rank, through all layers, at positions from `start`.

        Returns the hidden vectors after the last layer, [n, hidden], the same bits on every rank. Unless `head`, their
        logits will not be asked for.
        """
        if not head:
            self.window.skip(HEAD)
        x = x.copy()
        parts = [
            _Part(x[run], angles(self._frequencies, start + run.start, run.stop - run.start))
            for run in runs_of_positions(x.shape[0], self.star.rank.size)
        ]
        with self._computing():
            for place, block in enumerate(self._blocks):
                last = self.window.count(block) - 1
                if self.window.would_wait(block):
                    self._take_sums(parts, place)  # the hub owes them to the others, however long its disk takes
                # Where all tiles are at hand each part goes through them on its own, while the other's sum is under way.
                held = self.window.hold(block) if len(parts) > 1 and last >= 0 else None
                for some in [parts] if held is None else [[part] for part in parts]:
                    for number, tile in enumerate(self.window.tiles(block) if held is None else held):
                        for part in some:
                            if number == 0:
                                self._enter(part, place)
                            with self._recorded(COMPUTE, place, number):
                                self._compute(part, tile)
                            if number == last:
                                self._add_up(part, block, background=len(parts) > 1)
                if last < 0:  # this rank has no part in the block, but in its sums
                    for part in parts:
                        self._enter(part, place)
                        self._add_up(part, block, background=len(parts) > 1)
                # The others of two parts: while the next block begins.
                self._take_sums(parts[:1], place + 1)
            self._take_sums(parts, len(self._blocks))
        return x

    def _compute(self, part: _Part, tile: Tile) -> None:
        if tile.record.block.kind == "attn":
            part.partial += self._attention(part.h, tile, part.rotary)
        else:
            part.partial += mlp_partial(self.backend, part.h, tile)

    def _enter(self, part: _Part, place: int) -> None:
        """Begin the block at `place` in the order."""
        self._take_sums([part], place)
        block = self._blocks[place]
        weight = self.resident[f"{block.kind}_norm"][block.layer]
        part.h = self.backend.rms_norm(part.x, weight, self.config.norm_eps)
        part.partial = np.zeros_like(part.x)

    def _add_up(self, part: _Part, block: Block, *, background: bool) -> None:
        """Begin the sum of the block's partials over all ranks, in the background where something else is to be computed."""
        self._add_bias(part.partial, block)
        part.sum = self.star.start(part.partial, background=background)

    def _take_sums(self, parts: Sequence[_Part], place: int) -> None:
        """Before the block at `place`: wait for the sums of the one before it, and add them."""
        for part in parts:
            if part.sum is not None:
                with self._recorded(STAR, place - 1):
                    part.sum.wait()
                part.x += part.partial
                part.sum = None

    def logits(self, x: F32) -> F32:
        """Rank 0: final norm and output head of hidden vectors `x` [n, hidden]; returns [n, vocab]."""
        with self._computing():
            h = self.backend.rms_norm(x, self.resident["norm"], self.config.norm_eps)
            found = []
            for number, tile in enumerate(self.window.tiles(HEAD)):
                with self._recorded(COMPUTE, len(self._blocks), number):
                    found.append(head_logits(self.backend, h, tile))
            return np.concatenate(found, axis=1)

    def _attention(self, h: F32, tile: Tile, rotary: Angles) -> F32:
        assert self.cache is not None, "forward before begin"
        record, layer, config = tile.record, tile.record.block.layer, self.config
        norm = None
        if config.qk_norm:
            norm = QKNorm(self.resident["q_norm"][layer], self.resident["k_norm"][layer], config.norm_eps)
        return attention_partial(
            self.backend,
            h,
            tile,
            self.cache,
            layer,
            record.kv_heads.start - self.share.kv_heads.start,
            record.q_to_kv,
            rotary,
            config.attention_windows[layer],
            norm,
        )

    def _add_bias(self, partial: F32, block: Block) -> None:
        # Only rank 0's file has the biases of the output projections, so each is added once.
        bias = self.resident.get("o_bias" if block.kind == "attn" else "down_bias")
        if bias is not None:
            partial += bias[block.layer]

    def _recorded(self, kind: int, place: int, tile: int = -1) -> contextlib.AbstractContextManager[None]:
        """For the trace: what is inside is done for the block at `place` in the order."""
        return _NOT_RECORDED if self._recorder is None else self._recorder.span(kind, place, tile)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the time spent inside, less what went to the disk and the star."""
        began, elsewhere = time.monotonic(), self.window.wait_seconds + self.star.seconds
        yield
        waited = self.window.wait_seconds + self.star.seconds - elsewhere
        self.compute_seconds += time.monotonic() - began - waited
