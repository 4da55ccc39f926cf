"""The memory of one rank: planned, taken, and kept within its bounds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tpimpi.engine.budget import RESERVE, Budget, Needs, make_budget
from tpimpi.engine.engine import Engine
from tpimpi.engine.figures import RankFigures, disk_lines
from tpimpi.engine.memory_guard import MemoryGuard
from tpimpi.engine.needs import work_bytes
from tpimpi.engine.trace import RankTrace, Recorder
from tpimpi.engine.window import FEWEST_TILES, USUAL_TILES, ring_bytes
from tpimpi.errors import InputError
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.direct_io import MEASURED, PIECE
from tpimpi.system.memory import peak_rss_bytes, resident_bytes
from tpimpi.system.units import show_size

MEASURING = 0.4  # seconds for which all ranks read at once, to find what the disk gives


@dataclass(frozen=True)
class MemoryAllotment:
    """What a rank's memory buys, as it tells rank 0: in bytes, but for `reads` in flight and a rate in bytes a second."""

    rank: int
    host: str
    promise: int | None  # of --memory, or what auto found; None where --window decides
    base: int
    cache: int
    work: int  # with the reserve
    buffers: int
    pinned: int
    streamed: int  # for each token
    reads: int
    disk_bytes_per_s: float  # while the others measured too; 0 where nothing is streamed
    device: int  # st_dev of the slice
    direct: bool  # reads go past the page cache
    most_context: int | None  # positions that the memory has room for, at most


class RankMemory:
    """All the engines of a rank, and the memory that they share: planned, taken, and kept within its bounds."""

    def __init__(self, engines: Sequence[Engine], tokenizer_bytes: int = 0) -> None:
        self.engines, self._tokenizer_bytes = list(engines), tokenizer_bytes
        self.star, self.settings = engines[0].star, engines[0].settings
        self._base = resident_bytes()
        self._promise: int | None = None
        self._budget: Budget | None = None
        self._needs: Needs
        self._watched_by = self._context = self._rings = 0
        self.allotment: MemoryAllotment | None = None
        self.guard: MemoryGuard | None = None

    def needs(self, context: int) -> Needs:
        """What this rank needs to hold `context` positions of each model."""
        engines, logits_of = self.engines, self.settings.logits_of
        everywhere = {"all_partials": self.settings.allreduce.endswith("exchange")}  # also of long sums
        work = [work_bytes(s.header, s.records, s.backend.name, context, logits_of, **everywhere) for s in engines]
        return Needs(
            base=self._base,
            cache=sum(engine.cache_bytes(context) for engine in engines),
            work=max(work) + sum(engine.recorder.most_bytes for engine in engines if engine.recorder is not None),
            least_buffers=sum(ring_bytes(engine.records, FEWEST_TILES) for engine in engines),
            usual_buffers=sum(ring_bytes(engine.records, USUAL_TILES) for engine in engines),
            tiles=sum(engine.tile_bytes for engine in engines),
        )

    def plan(self, context: int, promise: int | None, watched_by: int) -> None:
        """Find out what `promise` bytes buy for `context` positions, and how many reads in flight the disk wants.

        `promise` is None where --window decides. `watched_by` is how many ranks of ours look after the host's free memory
        (--memory auto), 0 where none does. Raises InputError where the promise is too small.
        """
        self._needs = needs = self.needs(context)
        self._promise, self._context, self._watched_by = promise, context, watched_by
        if promise is not None:
            whose = f"--memory {'auto finds' if watched_by else 'is'} {show_size(promise)}"
            self._budget = make_budget(needs, promise, whose)
        for engine in self.engines:
            if self._streams(engine):
                engine.trial = trial = engine.file.trial(engine.records)
                engine.reads = engine.file.measure(partial(trial.depth, self._trial_buffer()))

    def _streams(self, engine: Engine) -> bool:
        blocks = isinstance(self.settings.window, int) and self.settings.window < len(engine.order)
        return blocks or (self._budget is not None and self._budget.pinned < self._needs.tiles)

    def _trial_buffer(self) -> Bytes:
        """Memory to measure with, not more than will be needed anyway."""
        room = self._needs.least_buffers if self._budget is None else self._budget.buffers
        return aligned_buffer(max(PIECE, min(MEASURED, room)))

    def allot_memory(self) -> MemoryAllotment:
        """Measure what the disk gives, while the other ranks do, and start reading for good."""
        needs, rates = self._needs, [0.0]
        for engine in self.engines:
            if engine.trial is not None:
                rates.append(
                    engine.file.measure(partial(engine.trial.rate, self._trial_buffer(), engine.reads, MEASURING))
                )
        for engine in self.engines:
            self._open(engine)
        self._rings = sum(engine.window.ring_bytes for engine in self.engines)
        self.guard = MemoryGuard(
            [engine.window for engine in self.engines],
            promise=None if self._watched_by else self._promise,
            shared_by=self._watched_by,
            stalled=self._say,
            waiting=self._waiting_for_a_row,
        )
        if self._watched_by:
            self.guard.plan(needs.tiles)  # if other programs end, there may be room for more
        per_position, room = sum(engine.cache_bytes(1) for engine in self.engines), None
        if self._promise is not None and per_position:
            room = (self._promise - needs.fixed - self._rings + needs.cache) // per_position
        file = self.engines[0].file
        self.allotment = MemoryAllotment(
            rank=self.star.rank.index,
            host=self.star.rank.host,
            promise=self._promise,
            base=needs.base,
            cache=needs.cache,
            work=needs.work + RESERVE,
            buffers=self._rings if any(map(self._streams, self.engines)) else 0,
            pinned=sum(engine.window.wanted_bytes for engine in self.engines),
            streamed=sum(engine.window.streamed_bytes for engine in self.engines),
            reads=max(engine.reads for engine in self.engines),
            disk_bytes_per_s=max(rates),
            device=file.device,
            direct=file.direct,
            most_context=room,
        )
        return self.allotment

    def _open(self, engine: Engine) -> None:
        """Start the window of one engine, with its part of the budget."""
        needs, window = self._needs, self.settings.window
        pinned, ring = None, None
        if self._budget is not None:
            pinned = self._budget.pinned * engine.tile_bytes // max(1, needs.tiles)
            least = ring_bytes(engine.records, FEWEST_TILES)
            ring = max(least, self._budget.buffers * least // max(1, needs.least_buffers))
        engine.start(pinned, ring, window if isinstance(window, int) else None, self.make_room)

    def make_room(self, context: int) -> None:
        """A longer sequence than was planned for begins: fewer tiles can be pinned. InputError where that is not enough."""
        if self._promise is None or context <= self._context or self.guard is None:
            return
        self._context = context
        left = self._promise - self.needs(context).fixed - self._rings
        if left < 0:
            raise InputError(
                f"{context} positions need {show_size(-left)} more than the {show_size(self._promise)} of --memory; "
                "give more, or a smaller --context"
            )
        self.guard.plan(left)

    def _say(self, line: str) -> None:
        rank = self.star.rank
        where = str(rank) if rank.size > 1 else "tpimpi"
        print(f"{where}: {line} ({self.engines[0].file.path})", file=sys.stderr, flush=True)

    def _waiting_for_a_row(self) -> tuple[float, str] | None:
        return next((engine.file.waiting for engine in self.engines if engine.file.waiting), None)

    @property
    def points(self) -> list[list[float]]:
        """The timeline: [time.monotonic(), resident, pinned, buffers]."""
        return [] if self.guard is None else self.guard.timeline.points

    def figures(self) -> list[RankFigures]:
        """What each engine did. Memory is the whole rank's."""
        peak = peak_rss_bytes()
        tokenizer = self._tokenizer_bytes
        weights = sum(engine.window.most_bytes for engine in self.engines)
        caches = [engine.model.cache for engine in self.engines]
        cache = sum(cache.filled_bytes for cache in caches if cache is not None)
        began = self.points[0][0] if self.points else 0.0
        assert self.allotment is not None
        return [
            RankFigures(
                rank=self.star.rank.index,
                host=self.star.rank.host,
                heads=engine.header.share.heads.size,
                kv_heads=engine.header.share.kv_heads.size,
                columns=engine.header.share.columns.size,
                memory_bytes=self._promise,
                peak_rss_bytes=peak,
                weights_bytes=weights,
                cache_bytes=cache,
                tokenizer_bytes=tokenizer,
                base_bytes=peak - weights - cache - tokenizer,
                pinned_bytes=engine.window.pinned_bytes,
                buffer_bytes=engine.window.buffer_bytes,
                streamed_bytes_per_token=engine.window.streamed_bytes,
                device=self.allotment.device,
                disk_bytes_per_s=self.allotment.disk_bytes_per_s,
                bytes_read=engine.window.bytes_read,
                read_wait_s=engine.window.wait_seconds,
                compute_s=engine.model.compute_seconds,
                star_s=self.star.seconds,
                timeline=[[round(t - began, 3), *rest] for t, *rest in self.points],
            )
            for engine in self.engines
        ]

    def trace(self) -> RankTrace:
        """What was recorded; the clock's offset is for rank 0 to fill in."""
        recorder = self.engines[0].recorder or Recorder(0)
        rank = self.star.rank
        return RankTrace(rank.index, rank.host, 0.0, recorder.pack(), self.points, recorder.dropped)

    def close(self) -> None:
        """Stop, and give all memory back."""
        if self.guard is not None:
            self.guard.close()
        for engine in self.engines:
            engine.close()


def print_memory(ranks: Sequence[MemoryAllotment], *, always: bool) -> None:
    """A table on stderr of what each rank's memory buys; unless `always`, only where something is streamed."""
    from rich.console import Console
    from rich.table import Table

    if not always and not any(rank.streamed for rank in ranks):
        return
    table = Table(box=None, pad_edge=False, header_style="none")
    table.add_column("rank host")
    for name in ("memory", "program", "cache", "work", "buffers", "pinned", "streamed a token"):
        table.add_column(name, justify="right")
    for r in ranks:
        sizes = (r.base, r.cache, r.work, r.buffers, r.pinned, r.streamed)
        promise = "-" if r.promise is None else show_size(r.promise)
        table.add_row(f"r{r.rank} {r.host}", promise, *map(show_size, sizes))
    console = Console(file=sys.stderr, width=140, highlight=False, color_system=None)
    console.print(table)
    for line in disk_lines([(r.host, r.device, r.streamed, r.disk_bytes_per_s) for r in ranks], alone=True):
        print(f"expected: {line}", file=sys.stderr)
    if any(rank.streamed and not rank.direct for rank in ranks):
        names = ", ".join(f"r{rank.rank} {rank.host}" for rank in ranks if not rank.direct)
        print(f"{names}: this file system has no O_DIRECT, so reads go through the page cache, slower", file=sys.stderr)
    sys.stderr.flush()
