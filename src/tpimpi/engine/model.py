"""The model on one rank: where the window, the layers and the star meet.

Compute never talks, reading never computes: `Model._through_layers` is where they meet, a block in four steps: norm, partial
(of this rank's tiles), star (the sum over all ranks), residual (through a norm of its own in some families).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.backends import Backend
from tpimpi.engine.experts import ChunkExperts, Experts
from tpimpi.engine.needs import kv_shape_of
from tpimpi.engine.overlap import DENSE_CHUNK, Awaits, HalfChunk, HalfChunkWork, go_through_blocks, half_chunks
from tpimpi.engine.partials import Partials, StepState
from tpimpi.engine.trace import COMPUTE, STAR, Recorder
from tpimpi.engine.watch import Watch
from tpimpi.engine.window import Window
from tpimpi.models.blocks import HEAD, Block, layer_blocks
from tpimpi.models.kv.cache import FULL, KINDS, WINDOWED, KVCache, StepRows, pages_of
from tpimpi.models.kv.pages import NO_PAGE, first_seen
from tpimpi.models.layer_spec import Rope
from tpimpi.models.layers.head import head_logits, scaled_logits
from tpimpi.models.layers.norms import pre_norm
from tpimpi.models.layers.projections import Projections
from tpimpi.models.layers.rope import Angles, angles, rope_frequencies
from tpimpi.star import Star
from tpimpi.weights.slices.header import Header

if TYPE_CHECKING:
    from tpimpi.engine.auditor import Auditor

KV_RESERVES = 16  # steps in which pages take the memory that they may have
_NOT_RECORDED = contextlib.nullcontext()


def block_order(header: Header) -> list[Block]:
    """The cycle of blocks that a rank goes through for each token; only rank 0 has the head."""
    layers = [block for layer in range(header.config.layers) for block in layer_blocks(header.config, layer)]
    return [*layers, HEAD] if header.rank == 0 else layers


class Model:
    """One rank's part of a model.

    All ranks call together `begin`, then `forward` (one sequence), or `open_pages`, then `step` (rows of several).
    """

    def __init__(
        self,
        header: Header,
        resident: Mapping[str, Array],
        window: Window,
        star: Star,
        backend: Backend,
        kv_format: str = "auto",
        *,
        experts: Experts | None = None,
        chunk: int = DENSE_CHUNK,
        predict: int = 0,
        make_room: Callable[[int, int], None] = lambda context, more: None,
        recorder: Recorder | None = None,
    ) -> None:
        """`resident` are the small arrays that are kept in memory (see slices/file); `kv_format` is one of KV_FORMATS;
        `chunk` is how many positions of a prompt are to be computed at once, `predict` how many experts of a layer to read
        before they are chosen; `make_room` is called before a cache is made, and as pages fill and are released, with the
        number of positions of a sequence, and how many bytes pages take beyond that sequence's. It may raise InputError,
        and so then do `begin` and `open_pages`."""
        self.config, self.share = header.config, header.share
        self.resident, self.window, self.star, self.backend = resident, window, star, backend
        self.cache: KVCache | None = None
        self.length = 0  # positions of the sequence, so far
        self._max_kv_bytes = self._kv_reserved = 0  # of pages: at most, and what there is room for now
        # Its pages of each kind; None: several sequences have pages, see `open_pages`.
        self._tables: tuple[I32, ...] | None = None
        self._first_held = 0  # the first of its pages of windowed layers that others have not taken the place of
        self.kv_shape = kv_shape_of(header, kv_format, chunk)
        self._attention_window = max(self.config.attention_windows, default=0)
        self.context = 0  # positions that the sequence may have
        self.experts, self.chunk, self._predict = experts, chunk, predict
        self.compute_seconds = 0.0
        self.auditor: Auditor | None = None  # rank 0's, where there is one
        self._make_room, self.recorder = make_room, recorder
        self.blocks = [block for block in block_order(header) if block != HEAD]
        layers = [self.config.layer(index) for index in range(self.config.layers)]
        self.partials = Partials(header, layers, resident, backend)
        self._frequencies: dict[Rope, F32] = {}

    @property
    def has_one_sequence(self) -> bool:
        """Whether the cache is that of `begin`, for `forward`; else of `open_pages`, for `step`."""
        return self._tables is not None

    @property
    def routing_hash(self) -> int:
        """A hash of the experts chosen so far, 0 in a dense model; see protocol."""
        return 0 if self.experts is None else self.experts.routing_hash

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
            self.context, pages, self._kv_reserved = context, self.kv_shape.pages_of_sequence(context), 0
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
        self.cache, self._max_kv_bytes = KVCache(self.kv_shape, pages), units * self.kv_shape.unit_bytes
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
        more = self._max_kv_bytes // KV_RESERVES
        wanted = min(self._max_kv_bytes, -(-self.cache.filled_bytes // max(more, 1)) * more + more)
        if wanted != self._kv_reserved:
            self._make_room(self.context, wanted - self.kv_shape.nbytes(self.context))
            self._kv_reserved = wanted

    def max_kept(self, context: int) -> int:
        """How many of this sequence's first positions one of at most `context` positions may have; the same on every rank.

        None where the rotary angles of one differ from those of the other (see rope_frequencies)."""
        if self.cache is None:
            return 0
        return min(self.length, context) if self.has_same_angles(self.context, context) else 0

    def can_keep(self, positions: int, context: int) -> bool:
        """Whether a sequence of at most `context` positions may begin with so many of this one; the same on every rank.

        They are at most what `max_kept` says, and layers with windows must have all that the next row sees."""
        return not positions or (
            positions <= self.max_kept(context) and first_seen(positions, self._attention_window) >= self._first_held
        )

    def tables_of(self, positions: int, first: int | None = None) -> list[list[int]]:
        """Where the one sequence has its first positions: pages of each kind. Of windowed layers those from the `first` on,
        where others have not taken their place, NO_PAGE before."""
        assert self._tables is not None
        first = self._first_held if first is None else first
        full, windowed = (table[: pages_of(positions)].tolist() for table in self._tables)
        return [full, [NO_PAGE if number < first else page for number, page in enumerate(windowed)]]

    def adopt_pages(self, positions: int, tables: Sequence[Sequence[int]]) -> None:
        """The one sequence has its first positions, which were read into the pages of `tables`."""
        self.length, self._first_held = positions, sum(page == NO_PAGE for page in tables[WINDOWED])

    def has_same_angles(self, context: int, other: int) -> bool:
        """Whether rotary angles are the same for sequences of at most so many positions as of at most so many others."""
        if context == other:
            return True
        ropes, others = self._frequencies_for(context), self._frequencies_for(other)
        return all(np.array_equal(ropes[rope], others[rope]) for rope in ropes)

    def _frequencies_for(self, context: int) -> dict[Rope, F32]:
        ropes = {spec.rope for spec in self.partials.layers if spec.rope is not None}
        return {rope: rope_frequencies(rope, context) for rope in ropes}

    def forward(self, x: F32, start: int, *, head: bool = True, watch: Watch | None = None) -> F32:
        """As `step`, of the one sequence, at positions from `start`."""
        assert self._tables is not None, "forward before begin"
        if self.kv_shape.ring is not None:
            self._first_held = max(self._first_held, pages_of(start + x.shape[0]) - self.kv_shape.ring)
            assert first_seen(start, self._attention_window) >= self._first_held, (
                "a row would see pages that are not there"
            )
        hidden = self.step(x, self.rows_of_sequence(start, x.shape[0]), head=head, watch=watch)
        self.length = start + x.shape[0]
        return hidden

    def rows_of_sequence(self, start: int, n: int) -> StepRows:
        """n positions of the one sequence, from `start` on."""
        assert self._tables is not None, "forward before begin"
        return StepRows.of_sequence(start, n, self._tables)

    def step(self, x: F32, rows: StepRows, *, head: bool = True, watch: Watch | None = None) -> F32:
        """Run hidden vectors `x` [n, hidden] of n rows, the same on every rank, through all layers.

        Returns the hidden vectors after the last layer, [n, hidden], the same bits on every rank. Unless `head`, their
        logits will not be asked for. `watch` keeps what will be audited (rank 0).

        Raises DamagedMemoryError where a pinned tile has changed, SliceError or StorageError where reading fails,
        TpimpiError where a router's numbers are not finite, StarError.
        """
        assert self.cache is not None, "a step before begin"
        self.cache.note_written(rows)
        if not self.has_one_sequence:
            self._reserve()
        if not head:
            self.window.skip(HEAD)
        self.window.raise_damage()
        x, runs = x.copy(), self._runs(x.shape[0])
        with self._computing():
            watches = [None if watch is None else watch.of_run(run) for run in runs]
            experts = None if self.experts is None else ChunkExperts(self.experts, runs)
            ways = [
                self._through_layers(x[run], rows[run], len(runs) > 1, experts, of_run)
                for run, of_run in zip(runs, watches, strict=True)
            ]
            go_through_blocks(self.blocks, self.window, [HalfChunk(way) for way in ways])
        return x

    def _runs(self, rows: int) -> list[slice]:
        """The runs of so many rows that go through the layers by themselves."""
        return half_chunks(rows, self.star.rank.size)

    def rows_of_sum(self, rows: int, row: int) -> int:
        """How many rows there are in a sum that has this row of a step of so many."""
        return next(run.stop - run.start for run in self._runs(rows) if run.start <= row < run.stop)

    def _through_layers(
        self, x: F32, rows: StepRows, overlapped: bool, experts: ChunkExperts | None, watch: Watch | None
    ) -> HalfChunkWork:
        """Take `x` [n, hidden] of these rows through all layers, in place.

        See overlap.py for the `yield`s: each lets the other half of the chunk go on where it is `overlapped`. `experts` are
        of both halves. `watch` is of a sum that will be audited (rank 0).
        """
        step = self.state_of(rows)
        h = partial = x
        projections = None
        for place, block in enumerate(self.blocks):
            spec = self.partials.layers[block.layer]
            if experts is not None and block.kind != "mlp":
                experts.prefetch(x, block.layer, rows.position, self._predict)
            if watch is not None:
                watch.note(x, place)
            if not (spec.parallel and block.kind == "mlp"):  # which goes on with what its attention read and made
                h, partial = self.partials.normed(x, block), self.partials.empty(x, block)
            if block.kind == "qkv":  # whose partial is of sums of squares
                projections = Projections(self.backend, self.config.head_dim)
            chosen = experts if block.kind == "mlp" and spec.router is not None else None
            if chosen is not None:
                h, partial = chosen.route(h, partial, block.layer, rows.position)
            number = 0
            while (tile := (yield Awaits.TILE)) is not None:
                with self._recorded(COMPUTE, place, number):
                    partial += self.partials.of_tile(h, tile, step, projections)
                number += 1
            if chosen is not None:
                yield Awaits.EXPERTS
                if chosen.due:
                    with self._recorded(COMPUTE, place, number):
                        chosen.add_partial()
                h = x  # what was normed needs memory no more
            self.partials.add_bias(partial, block)
            if spec.parallel and block.kind == "attn":
                continue
            seen = None if watch is None else watch.partials_of(partial, place)
            total = self.star.start(partial, background=overlapped, exact=block.kind == "qkv", watch=seen)
            yield Awaits.SUM
            with self._recorded(STAR, place):
                total.wait()
            if projections is not None and block.kind == "qkv":
                self.partials.finish(projections, partial, block.layer, step)
            else:
                x += self.partials.to_residual(partial, block)

    def state_of(self, rows: StepRows) -> StepState:
        """What these rows have beside their hidden vectors."""
        assert self.cache is not None, "a step before begin"
        of_kind = [rows.for_kind(kind) for kind in KINDS]
        return StepState(self.cache, self.kv_shape.kinds, of_kind, self._angles(rows.position))

    def _angles(self, position: I32) -> dict[Rope, Angles]:
        """Rotary angles of these positions, for each rope that the layers have."""
        return {rope: angles(rope, frequencies, position) for rope, frequencies in self._frequencies.items()}

    def logits(self, x: F32) -> F32:
        """Rank 0: final norm and output head of hidden vectors `x` [n, hidden]; returns [n, vocab]."""
        with self._computing():
            config = self.config
            h = pre_norm(self.backend, config.norm, x, self.resident["norm"], config.norm_eps)
            found, done = np.empty((x.shape[0], config.vocab), np.float32), 0
            for number, tile in enumerate(self.window.tiles(HEAD)):
                with self._recorded(COMPUTE, len(self.blocks), number):
                    of_tile = head_logits(self.backend, h, tile)
                    found[:, done : done + of_tile.shape[1]] = of_tile
                    done += of_tile.shape[1]
            return scaled_logits(found[:, :done], config.logit_scale, config.logit_softcap)

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
