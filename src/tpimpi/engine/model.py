"""The model on one rank: where the window, the layers and the star meet.

Compute never talks, reading never computes: `Model._through_layers` is where they meet, a block in four steps: norm, partial
(of this rank's tiles), star (the sum over all ranks), residual (through a norm of its own in some families).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.backends import Backend
from tpimpi.compute.kv import KVPages, Rows
from tpimpi.engine.experts import Experts, Routed
from tpimpi.engine.needs import kv_shape_of
from tpimpi.engine.overlap import DENSE_CHUNK, HalfChunk, Need, Steps, go_through_blocks, half_chunks
from tpimpi.engine.trace import COMPUTE, STAR, Recorder
from tpimpi.engine.window import Window
from tpimpi.models.blocks import HEAD, Block, layer_blocks
from tpimpi.models.kv.cache import FULL, KINDS, WINDOWED, KVCache, StepRows, pages_of
from tpimpi.models.kv.pages import NO_PAGE, first_seen
from tpimpi.models.layer_spec import Rope
from tpimpi.models.layers.attention import QKNorm, attention_partial
from tpimpi.models.layers.head import head_logits, scaled_logits
from tpimpi.models.layers.mlp import mlp_partial
from tpimpi.models.layers.norms import pre_norm
from tpimpi.models.layers.projections import Projections, TileHeads
from tpimpi.models.layers.rope import Angles, angles, rope_frequencies
from tpimpi.star import Star
from tpimpi.weights.slices.file import Tile
from tpimpi.weights.slices.header import Header

KV_RESERVES = 16  # steps in which pages take the memory that they may have
_NOT_RECORDED = contextlib.nullcontext()


def block_order(header: Header) -> list[Block]:
    """The cycle of blocks that a rank goes through for each token; only rank 0 has the head."""
    layers = [block for layer in range(header.config.layers) for block in layer_blocks(header.config, layer)]
    return [*layers, HEAD] if header.rank == 0 else layers


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
        experts: Experts | None = None,
        chunk: int = DENSE_CHUNK,
        predict: int = 0,
        make_room: Callable[[int, int], None] = lambda context, more: None,
        recorder: Recorder | None = None,
    ) -> None:
        """`resident` are the small arrays that are kept in memory (see slices/file); `kv` is one of KV_FORMATS;
        `chunk` is how many positions of a prompt are to be computed at once, `predict` how many experts of a layer to read
        before they are chosen; `make_room` is called before a cache is made, with the number of positions of a sequence,
        and how many bytes it takes beyond that sequence's."""
        self.config, self.share = header.config, header.share
        self.resident, self.window, self.star, self.backend = resident, window, star, backend
        self.cache: KVCache | None = None
        self.length = 0  # positions of the sequence, so far
        self._most_kv_bytes = self._kv_reserved = 0  # of pages: at most, and what there is room for now
        # Its pages of each kind; None: several sequences have pages, see `open_pages`.
        self._tables: tuple[I32, ...] | None = None
        self._first_held = 0  # the first of its pages of windowed layers that others have not taken the place of
        self.kv_shape = kv_shape_of(header, kv, chunk)
        self._window = max(self.config.attention_windows, default=0)
        self.context = 0  # positions that the sequence may have
        self.experts, self.chunk, self._predict = experts, chunk, predict
        self.compute_seconds = 0.0
        self._make_room, self.recorder = make_room, recorder
        self._blocks = [block for block in block_order(header) if block != HEAD]
        self._layers = [self.config.layer(index) for index in range(self.config.layers)]
        self._frequencies: dict[Rope, F32] = {}

    @property
    def has_one_sequence(self) -> bool:
        """Whether the cache is that of `begin`, for `forward`; else of `open_pages`, for `step`."""
        return self._tables is not None

    @property
    def choices(self) -> int:
        """A hash of the experts chosen so far, 0 in a dense model; see protocol."""
        return 0 if self.experts is None else self.experts.choices

    def begin(self, context: int, keep: int = 0) -> None:
        """Start a sequence of at most `context` positions, which has the first `keep` positions of the one before.

        See `can_keep` for `keep`: forward then goes on from there.
        """
        assert self.can_keep(keep, context)
        self.length, self._first_held = keep, self._first_held if keep else 0
        if self.cache is None or self.context != context or self._tables is None:
            before, tables = (self.cache, self._tables) if keep else (None, None)
            self.cache = self._tables = None  # give the old one back before the new one is made
            self._make_room(context, 0)
            self.context, pages, self._kv_reserved = context, self.kv_shape.pages_of_one(context), 0
            self.cache = KVCache(self.kv_shape, pages)
            self._tables = tuple(np.arange(pages[FULL], dtype=np.int32) % max(1, count) for count in pages)
            if before is not None and tables is not None:
                held = (slice(0, pages_of(keep)), slice(self._first_held, pages_of(keep)))
                there, here = (
                    [of[run].tolist() for of, run in zip(some, held, strict=True)] for some in (tables, self._tables)
                )
                self.cache.take_over(before, [list(zip(*pair, strict=True)) for pair in zip(there, here, strict=True)])
            self._frequencies = self._frequencies_for(context)

    def open_pages(self, context: int, pages: Sequence[int], units: int) -> None:
        """Have at most so many pages of each kind, for sequences of at most `context` positions each.

        All together they are no more than `units` pages of one layer. Memory is taken as they are written."""
        self.cache = self._tables = None
        self.context, self.length, self._kv_reserved = context, 0, -1
        self.cache, self._most_kv_bytes = KVCache(self.kv_shape, pages), units * self.kv_shape.unit_bytes
        self._reserve()
        self._frequencies = self._frequencies_for(context)

    def release_pages(self, kind: int, pages: Iterable[int]) -> None:
        """Give the memory of pages of a kind back, which nobody uses."""
        assert self.cache is not None, "pages that were not opened"
        self.cache.release(kind, pages)
        self._reserve()

    def take_pages(self, tables: Sequence[Sequence[int]]) -> None:
        """These pages of each kind (-1: none) will be written from a file, and take memory from now on."""
        assert self.cache is not None, "pages that were not opened"
        self.cache.note_read(tables)
        if not self.has_one_sequence:
            self._reserve()

    def _reserve(self) -> None:
        """Have room for the pages that were written, and some more, so that pinned tiles give way now and then alone."""
        assert self.cache is not None
        more = self._most_kv_bytes // KV_RESERVES
        wanted = min(self._most_kv_bytes, -(-self.cache.filled_bytes // max(more, 1)) * more + more)
        if wanted != self._kv_reserved:
            self._make_room(self.context, wanted - self.kv_shape.nbytes(self.context))
            self._kv_reserved = wanted

    def most_kept(self, context: int) -> int:
        """How many of this sequence's first positions one of at most `context` positions may have; the same on every rank.

        None where the rotary angles of one differ from those of the other (see rope_frequencies)."""
        if self.cache is None:
            return 0
        return min(self.length, context) if self.has_same_angles(self.context, context) else 0

    def can_keep(self, positions: int, context: int) -> bool:
        """Whether a sequence of at most `context` positions may begin with so many of this one; the same on every rank.

        They are at most what `most_kept` says, and layers with windows must have all that the next row sees."""
        return not positions or (
            positions <= self.most_kept(context) and first_seen(positions, self._window) >= self._first_held
        )

    def tables_of(self, positions: int, first: int | None = None) -> list[list[int]]:
        """Where the one sequence has its first positions: pages of each kind. Of windowed layers those from the `first` on,
        where others have not taken their place, NO_PAGE before."""
        assert self._tables is not None
        first = self._first_held if first is None else first
        full, windowed = (table[: pages_of(positions)].tolist() for table in self._tables)
        return [full, [NO_PAGE if number < first else page for number, page in enumerate(windowed)]]

    def has_taken(self, positions: int, tables: Sequence[Sequence[int]]) -> None:
        """The one sequence has its first positions, which were read into the pages of `tables`."""
        self.length, self._first_held = positions, sum(page == NO_PAGE for page in tables[WINDOWED])

    def has_same_angles(self, context: int, other: int) -> bool:
        """Whether rotary angles are the same for sequences of at most so many positions as of at most so many others."""
        if context == other:
            return True
        ropes, others = self._frequencies_for(context), self._frequencies_for(other)
        return all(np.array_equal(ropes[rope], others[rope]) for rope in ropes)

    def _frequencies_for(self, context: int) -> dict[Rope, F32]:
        ropes = {spec.rope for spec in self._layers if spec.rope is not None}
        return {rope: rope_frequencies(rope, context) for rope in ropes}

    def forward(self, x: F32, start: int, *, head: bool = True) -> F32:
        """As `step`, of the one sequence, at positions from `start`."""
        assert self._tables is not None, "forward before begin"
        if self.kv_shape.ring is not None:
            self._first_held = max(self._first_held, pages_of(start + x.shape[0]) - self.kv_shape.ring)
            assert first_seen(start, self._window) >= self._first_held, "a row would see pages that are not there"
        hidden = self.step(x, StepRows.of_one(start, x.shape[0], self._tables), head=head)
        self.length = start + x.shape[0]
        return hidden

    def step(self, x: F32, rows: StepRows, *, head: bool = True) -> F32:
        """Run hidden vectors `x` [n, hidden] of n rows, the same on every rank, through all layers.

        Returns the hidden vectors after the last layer, [n, hidden], the same bits on every rank. Unless `head`, their
        logits will not be asked for.
        """
        assert self.cache is not None, "a step before begin"
        self.cache.note_written(rows)
        if not self.has_one_sequence:
            self._reserve()
        if not head:
            self.window.skip(HEAD)
        x = x.copy()
        # A half would read experts that the other half wants too.
        runs = half_chunks(x.shape[0], self.star.rank.size if self.experts is None else 1)
        with self._computing():
            halves = [HalfChunk(self._through_layers(x[run], rows[run], len(runs) > 1)) for run in runs]
            go_through_blocks(self._blocks, self.window, halves)
        return x

    def _through_layers(self, x: F32, rows: StepRows, overlapped: bool) -> Steps:
        """Take `x` [n, hidden] of these rows through all layers, in place.

        See overlap.py for the `yield`s: each lets the other half of the chunk go on where it is `overlapped`.
        """
        rotary, of_kind = self._angles(rows.position), [rows.of(kind) for kind in KINDS]
        h = partial = x
        projections = None
        for place, block in enumerate(self._blocks):
            spec = self._layers[block.layer]
            if self.experts is not None and block.kind != "mlp":
                self.experts.expect(x, block.layer, rows.position, self._predict)
            if not (spec.parallel and block.kind == "mlp"):  # which goes on with what its attention read and made
                h, partial = self._normed(x, block), np.zeros_like(x)
            if block.kind == "qkv":  # whose partial is of sums of squares
                projections, partial = (
                    Projections(self.backend, self.config.head_dim),
                    np.zeros((x.shape[0], 2), np.float32),
                )
            routed = self._routed(h, block, rows.position)
            number = 0
            while (tile := (yield Need.TILE)) is not None:
                with self._recorded(COMPUTE, place, number):
                    partial += self._tile_partial(h, tile, of_kind, rotary, projections)
                number += 1
            if routed is not None and self.experts is not None:
                with self._recorded(COMPUTE, place, number):
                    self.experts.add_partial(partial, h, routed)
            self._add_bias(partial, block)
            if spec.parallel and block.kind == "attn":
                continue
            total = self.star.start(partial, background=overlapped, exact=block.kind == "qkv")
            yield Need.SUM
            with self._recorded(STAR, place):
                total.wait()
            if projections is not None and block.kind == "qkv":
                self._finish(projections, partial, block.layer, of_kind, rotary)
            else:
                x += self._to_residual(partial, block)

    def _normed(self, x: F32, block: Block) -> F32:
        """What a block reads, [n, hidden]."""
        spec = self._layers[block.layer]
        if not spec.pre_norms:
            return x
        weight = self.resident["mlp_norm" if block.kind == "mlp" else "attn_norm"][block.layer]
        if block.kind == "mlp" and spec.router is not None:  # from which experts are chosen, the same on every rank
            return self.backend.fixed_rms_norm(x, weight, self.config.norm_eps)
        return pre_norm(self.backend, spec.norm, x, weight, self.config.norm_eps)

    def _routed(self, h: F32, block: Block, position: I32) -> Routed | None:
        """The experts of a block, from its normed vectors `h` [n, hidden] at `position` [n]; None: it has none."""
        if self.experts is None or block.kind != "mlp" or self._layers[block.layer].router is None:
            return None
        return self.experts.route(h, block.layer, position)

    def _to_residual(self, total: F32, block: Block) -> F32:
        """What is added to the residual, from a block's sum over all ranks, [n, hidden]: the same bits on every rank."""
        spec = self._layers[block.layer]
        if spec.post_norms:
            weight = self.resident[f"{block.kind}_post_norm"][block.layer]
            total = self.backend.fixed_rms_norm(total, weight, self.config.norm_eps)
        return total if spec.residual_scale == 1 else total * np.float32(spec.residual_scale)

    def _angles(self, position: I32) -> dict[Rope, Angles]:
        """Rotary angles of these positions, for each rope that the layers have."""
        return {rope: angles(rope, frequencies, position) for rope, frequencies in self._frequencies.items()}

    def _tile_partial(
        self,
        h: F32,
        tile: Tile,
        of_kind: Sequence[Rows],
        rotary: Mapping[Rope, Angles],
        projections: Projections | None,
    ) -> F32:
        """What one tile adds to its block: [n, hidden] from `h` [n, hidden], or [n, 2] sums of squares."""
        record = tile.record
        if projections is not None and record.block.kind == "qkv":
            first = -(-self.share.heads.start // (self.config.heads // self.config.kv_heads))
            counted = (max(record.kv_heads.start, min(first, record.kv_heads.stop)), record.kv_heads.stop)
            return projections.add(h, tile, TileHeads(record.heads, record.kv_heads, counted))
        if projections is not None and record.block.kind == "attn":
            layer = record.block.layer
            spec = self._layers[layer].attention
            return projections.attention(tile, record.heads, *self._kv(layer, of_kind), spec, record.q_to_kv)
        if record.block.kind == "attn":
            return self._attention(h, tile, of_kind, rotary)
        of = self._layers[record.block.layer]
        return mlp_partial(self.backend, h, tile, of.activation, of.activation_limit)

    def _kv(self, layer: int, of_kind: Sequence[Rows]) -> tuple[KVPages, Rows]:
        """A layer's pages, and the rows with the tables of its kind."""
        assert self.cache is not None, "a step before begin"
        return self.cache.of(layer), of_kind[self.kv_shape.kinds[layer]]

    def _finish(
        self,
        projections: Projections,
        squares: F32,
        layer: int,
        of_kind: Sequence[Rows],
        rotary: Mapping[Rope, Angles],
    ) -> None:
        rope = self._layers[layer].rope
        norm = QKNorm(self.resident["q_norm"][layer], self.resident["k_norm"][layer], self.config.norm_eps)
        turned = None if rope is None else rotary[rope]
        projections.finish(squares, norm, *self._kv(layer, of_kind), self.share.kv_heads.start, turned)

    def logits(self, x: F32) -> F32:
        """Rank 0: final norm and output head of hidden vectors `x` [n, hidden]; returns [n, vocab]."""
        with self._computing():
            config = self.config
            h = pre_norm(self.backend, config.norm, x, self.resident["norm"], config.norm_eps)
            found, done = np.empty((x.shape[0], config.vocab), np.float32), 0
            for number, tile in enumerate(self.window.tiles(HEAD)):
                with self._recorded(COMPUTE, len(self._blocks), number):
                    of_tile = head_logits(self.backend, h, tile)
                    found[:, done : done + of_tile.shape[1]] = of_tile
                    done += of_tile.shape[1]
            return scaled_logits(found[:, :done], config.logit_scale, config.logit_softcap)

    def _attention(self, h: F32, tile: Tile, of_kind: Sequence[Rows], rotary: Mapping[Rope, Angles]) -> F32:
        record, layer, config = tile.record, tile.record.block.layer, self.config
        spec = self._layers[layer]
        norm = None
        if config.qk_norm:
            norm = QKNorm(self.resident["q_norm"][layer], self.resident["k_norm"][layer], config.norm_eps)
        return attention_partial(
            self.backend,
            h,
            tile,
            *self._kv(layer, of_kind),
            spec.attention,
            record.kv_heads.start - self.share.kv_heads.start,
            record.q_to_kv,
            None if spec.rope is None else rotary[spec.rope],
            norm,
            self.resident["sinks"][layer, slice(*record.heads)] if config.attention_sinks else None,
        )

    def _add_bias(self, partial: F32, block: Block) -> None:
        # Only rank 0's file has the biases of the output projections, so each is added once.
        if block.kind == "qkv":
            return
        bias = self.resident.get("o_bias" if block.kind == "attn" else "down_bias")
        if bias is not None:
            partial += bias[block.layer]

    def _recorded(self, kind: int, place: int, tile: int = -1) -> contextlib.AbstractContextManager[None]:
        """For the trace: what is inside is done for the block at `place` in the order."""
        return _NOT_RECORDED if self.recorder is None else self.recorder.span(kind, place, tile)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Count the time spent inside, less what went to the disk and the star."""
        began, elsewhere = time.monotonic(), self._elsewhere()
        yield
        waited = self._elsewhere() - elsewhere
        self.compute_seconds += time.monotonic() - began - waited

    def _elsewhere(self) -> float:
        """Seconds that went to the disk and the star so far."""
        experts = 0.0 if self.experts is None else self.experts.cache.wait_seconds
        return self.window.wait_seconds + experts + self.star.seconds
