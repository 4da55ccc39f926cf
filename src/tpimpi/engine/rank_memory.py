"""The memory of one rank, in three steps: what it needs, a plan for what it may take, and the memory itself.

MemoryPlanner  --plan-->  MemoryPlan  --take-->  RankMemory
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial

from tpimpi.engine.allotment import MemoryAllotment
from tpimpi.engine.budget import RESERVE_BYTES, Budget, Needs, caches_beside_tiles, make_budget
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.expert_slots import min_slots
from tpimpi.engine.figures import LiveFigures, RankFigures
from tpimpi.engine.memory_guard import MemoryGuard
from tpimpi.engine.needs import needs_together
from tpimpi.engine.pinned_check import PinnedCheck
from tpimpi.engine.readers import DEFAULT_READS, Readers
from tpimpi.engine.ring import FEWEST_TILES, ring_bytes
from tpimpi.engine.trace import RankTrace, Recorder
from tpimpi.engine.window import Window
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import PAGE, pages_of
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.direct_io import DEPTHS, READ_BYTES, TRIAL_BUFFER_BYTES, Trial
from tpimpi.system.memory import peak_rss_bytes, resident_bytes
from tpimpi.system.units import show_size

DISK_TRIAL_S = 0.4  # so long all ranks read at once, to find what the disk gives


class MemoryPlanner:
    """What a rank needs for its opened engines. Nothing that they will need may be in memory yet when this is made."""

    def __init__(
        self, engines: Sequence[OpenedEngine], tokenizer_bytes: int = 0, draft_engine: OpenedEngine | None = None
    ) -> None:
        """`tokenizer_bytes` is what the tokenizer took (rank 0), for the figures. `draft_engine` (rank 0) is to have memory
        for all of its model, which it takes by itself."""
        self.engines, self.tokenizer_bytes, self.draft_engine = list(engines), tokenizer_bytes, draft_engine
        self.star, self.settings = engines[0].star, engines[0].settings
        self.draft_waits = False  # whether tiles have the memory of the draft model for now
        self.draft_sequences = 1  # of which the draft model has keys and values
        self.base = resident_bytes()

    def needs(self, context: int, *, with_draft: bool | None = None) -> Needs:
        """What this rank needs to hold `context` positions of each model; of a draft model where it has its memory, or as
        `with_draft` says."""
        with_draft = not self.draft_waits if with_draft is None else with_draft
        needs = needs_together([engine.needs(self.base, context) for engine in self.engines])
        if (beside := self._draft_needs(context)) is not None:
            needs = replace(needs, work=max(needs.work, beside.work))
        if beside is not None and with_draft:
            # Work, as it is not resident yet: of what is, a host's free memory is without.
            needs = replace(needs, work=needs.work + beside.tiles + beside.experts, cache=needs.cache + beside.cache)
        recorders = [engine.recorder for engine in self.engines if engine.recorder is not None]
        return replace(needs, work=needs.work + sum(recorder.max_bytes for recorder in recorders))

    def _draft_needs(self, context: int) -> Needs | None:
        """What a draft model needs, where there is one."""
        if self.draft_engine is None:
            return None
        needs = self.draft_engine.needs(0, min(context, self.draft_engine.header.config.context))
        return replace(needs, cache=needs.cache * self.draft_sequences)

    def draft_bytes(self, context: int) -> int:
        """Memory of a draft model that has room for `context` positions; 0 without one."""
        beside = self._draft_needs(context)
        return 0 if beside is None else beside.tiles + beside.experts + beside.cache

    def use_chunk(self, positions: int | None) -> None:
        """Compute so many positions of a prompt at once; None: as many as before."""
        for engine in self.engines:
            engine.chunk = positions or engine.chunk

    def plan(self, context: int, promise: int | None, watched_by: int) -> MemoryPlan:
        """What `promise` bytes buy for `context` positions, and how many reads in flight the disk wants, which is tried.

        `promise` is None where --window decides. `watched_by` is how many ranks of ours look after the host's free memory
        (--memory auto), 0 where none does. Raises InputError where the promise is too small.
        """
        if self.draft_engine is not None:
            self.draft_sequences = caches_beside_tiles(self.needs(context), promise, self.settings.parallel)
        needs, budget = self.needs(context), None
        if promise is not None:
            whose = f"--memory {'auto finds' if watched_by else 'is'} {show_size(promise)}"
            budget = make_budget(needs, promise, whose)
            takes_from_tiles = budget.pinned < needs.tiles or budget.experts < needs.experts
            # A draft that is `auto` is loaded where it pays: see serving/draft_choice.py.
            if self.draft_engine is not None and self.settings.draft is None and takes_from_tiles:
                self.draft_waits = True
                needs, budget = self.needs(context), self._without_draft(needs, budget, context)
        plan = MemoryPlan(self, context, promise, watched_by, needs, budget)
        return replace(plan, trials=[plan.trial(engine) for engine in self.engines])

    def _without_draft(self, needs: Needs, budget: Budget, context: int) -> Budget:
        """`budget`, with the memory of the draft model for tiles too, or of a mixture for experts. Its ring is the same, as
        that stays when the draft model comes."""
        more = self.draft_bytes(context)
        pinned = min(needs.tiles, budget.pinned + more)
        experts = min(needs.experts, budget.experts + more - pinned + budget.pinned)
        return replace(budget, pinned=pinned, experts=experts)


@dataclass(frozen=True)
class DiskTrial:
    """Where an engine will stream: reads for measuring, and how many in flight the disk wants."""

    trial: Trial
    reads: int


@dataclass(frozen=True)
class MemoryPlan:
    """What the memory of a rank will be used for; see `MemoryPlanner.plan`."""

    planner: MemoryPlanner
    context: int
    promise: int | None
    watched_by: int
    needs: Needs
    budget: Budget | None  # None where --window decides
    trials: Sequence[DiskTrial | None] = ()  # for each engine; None where all of it stays in memory

    def take(self) -> RankMemory:
        """Measure what the disk gives, while the other ranks do, and start reading for good."""
        rates = list(map(self._rate, self.planner.engines, self.trials))
        with ExitStack() as undo:
            windows, caches = [], []
            for engine, trial in zip(self.planner.engines, self.trials, strict=True):
                readers = Readers(self.reads(engine, trial))
                windows.append(undo.enter_context(closing(self._open_window(engine, readers))))
                caches.append(undo.enter_context(closing(self._open_experts(engine, readers))))
            memory = RankMemory(self, windows, caches, max(rates))
            undo.pop_all()
        return memory

    def streams(self, engine: OpenedEngine) -> bool:
        """Whether something of this engine is read for each token."""
        window = self.planner.settings.window
        blocks = isinstance(window, int) and window < len(engine.order)
        return (
            blocks or (self.budget is not None and self.budget.pinned < self.needs.tiles) or self.reads_experts(engine)
        )

    def reads_experts(self, engine: OpenedEngine) -> bool:
        """Whether experts of this engine are read while it computes."""
        few = (
            isinstance(self.planner.settings.window, int)
            if self.budget is None
            else self.budget.experts < self.needs.experts
        )
        return few and bool(engine.expert_records)

    def trial(self, engine: OpenedEngine) -> DiskTrial | None:
        """Try how many reads in flight the disk of this engine's slice wants."""
        if not self.streams(engine):
            return None
        records = [*engine.records, *(engine.expert_records.values() if self.reads_experts(engine) else ())]
        trial = engine.file.trial(records)
        return DiskTrial(trial, engine.file.measure(partial(trial.depth, self._trial_buffer())))

    def reads(self, engine: OpenedEngine, trial: DiskTrial | None) -> int:
        """How many reads are in flight; where all experts will stay, they are read while the first tokens are computed."""
        return trial.reads if trial is not None else DEPTHS[0] if engine.expert_records else DEFAULT_READS

    def _rate(self, engine: OpenedEngine, trial: DiskTrial | None) -> float:
        """Bytes a second that the disk gives; 0 where nothing is streamed."""
        if trial is None:
            return 0.0
        return engine.file.measure(partial(trial.trial.rate, self._trial_buffer(), trial.reads, DISK_TRIAL_S))

    def _trial_buffer(self) -> Bytes:
        """Memory to measure with, not more than will be needed anyway."""
        room = self.needs.min_buffers if self.budget is None else self.budget.buffers
        return aligned_buffer(max(READ_BYTES, min(TRIAL_BUFFER_BYTES, room)))

    def _open_window(self, engine: OpenedEngine, readers: Readers) -> Window:
        """The window of one engine, with its part of the budget."""
        blocks = self.planner.settings.window
        pinned, ring = None, None
        if self.budget is not None:
            pinned = self.budget.pinned * engine.tile_bytes // max(1, self.needs.tiles)
            least = ring_bytes(engine.records, FEWEST_TILES)
            ring = max(least, self.budget.buffers * least // max(1, self.needs.min_buffers))
        return engine.open_window(
            pinned=pinned,
            ring=ring,
            blocks=blocks if isinstance(blocks, int) else None,
            readers=readers,
        )

    def _open_experts(self, engine: OpenedEngine, readers: Readers) -> ExpertCache:
        """The expert cache of one engine, with its part of the budget."""
        sizes = [record.nbytes for record in engine.expert_records.values()]
        whole, nbytes = len(sizes) * max(sizes, default=0), None
        if self.budget is not None:
            nbytes = self.budget.experts * whole // max(1, self.needs.experts)
        elif self.reads_experts(engine):  # no tile stays under --window
            nbytes = min_slots(len(sizes)) * max(sizes)
        return engine.open_experts(nbytes=nbytes, readers=readers)


class RankMemory:
    """All the engines of a rank, at work, and the memory that they share, kept within its bounds."""

    def __init__(
        self, plan: MemoryPlan, windows: Sequence[Window], caches: Sequence[ExpertCache], disk_bytes_per_s: float
    ) -> None:
        """`windows` and `caches` are those of the plan's engines; `disk_bytes_per_s` what the disk gave (0 where it was not
        measured)."""
        self._plan, self._fixed = plan, plan.needs.fixed
        self._lent = 0  # bytes, to a draft model
        self._max_pinned = plan.needs.tiles + plan.needs.experts  # where the host's free memory is what bounds it
        self._draft_tiles = 0  # bytes, that a draft model took at most
        if plan.planner.draft_engine is not None and not plan.planner.draft_waits:
            self._draft_tiles = plan.planner.draft_engine.tile_bytes
        self._room = (plan.context, 0)  # what `make_room` was asked for last
        self.star, self.settings = plan.planner.star, plan.planner.settings
        self._rings = sum(window.ring_bytes for window in windows)
        self.engines = [
            opened.start(window, experts, self.make_room)
            for opened, window, experts in zip(plan.planner.engines, windows, caches, strict=True)
        ]
        self.guard = MemoryGuard(
            windows,
            caches,
            promise=None if plan.watched_by else plan.promise,
            watched_by=plan.watched_by,
            stalled=self._say,
            waiting=self._waiting_for_a_row,
        )
        if plan.watched_by:
            self.guard.limit_pinned(self._max_pinned)  # if other programs end, there may be room for more
        self._pinned_check = PinnedCheck(windows, caches) if any(e.opened.audits for e in self.engines) else None
        self.allotment = self._allotment(disk_bytes_per_s)

    def _allotment(self, disk_bytes_per_s: float) -> MemoryAllotment:
        plan, needs, opened = self._plan, self._plan.needs, self._plan.planner.engines
        room, units = None, None
        if plan.promise is not None and needs.cache:
            # A draft model may come at any time, so what it takes is nobody else's room.
            planned = plan.planner.needs(plan.context, with_draft=True)
            spare = plan.promise - planned.fixed - self._rings + planned.cache - planned.min_experts
            pages = range(pages_of(opened[0].header.config.context) + 1)
            found = bisect_right(pages, spare, key=lambda n: plan.planner.needs(n * PAGE, with_draft=True).cache)
            room = PAGE * (found - 1)
            of_draft = planned.cache - plan.planner.needs(plan.context, with_draft=False).cache
            units = max(0, spare - of_draft) // self.engines[0].model.kv_shape.unit_bytes
        return MemoryAllotment(
            rank=self.star.rank.index,
            host=self.star.rank.host,
            promise=plan.promise,
            base=needs.base,
            cache=needs.cache,
            work=needs.work + RESERVE_BYTES,
            buffers=self._rings if any(map(plan.streams, opened)) else 0,
            pinned=sum(engine.window.wanted_bytes for engine in self.engines),
            streamed=sum(engine.window.streamed_bytes for engine in self.engines),
            experts=sum(engine.expert_cache.limit_bytes for engine in self.engines),
            reads=max(map(plan.reads, opened, plan.trials)),
            disk_bytes_per_s=disk_bytes_per_s,
            device=opened[0].file.device,
            direct=opened[0].file.direct,
            max_context=room,
            page_units=units,
        )

    def make_room(self, context: int, more: int = 0) -> None:
        """A sequence of `context` positions is to have room, or pages that take `more` bytes beyond its: where that is more
        than was planned for, fewer tiles can be pinned; they come back when it is less again. InputError where that is not
        enough."""
        self._room = (context, more)
        promise, planned = self._plan.promise, self._plan.needs.fixed + self._lent
        fixed = max(planned, self._plan.planner.needs(context).fixed + more)
        if promise is None or fixed == self._fixed:
            return
        left, least = promise - fixed - self._rings, self._plan.needs.min_experts
        if left < least:
            what = "pages for sequences of " if more > 0 else ""
            raise InputError(
                f"{what}{context} positions need {show_size(least - left)} more than the {show_size(promise)} of --memory; "
                "give more, or a smaller --context"
            )
        self._fixed = fixed
        if self._plan.watched_by:
            left = self._max_pinned if fixed == planned else min(left, self._max_pinned)
        self.guard.limit_pinned(left)

    @property
    def draft_waits(self) -> bool:
        """Whether tiles have the memory of the draft model for now."""
        return self._plan.planner.draft_waits

    @property
    def draft_sequences(self) -> int:
        """Of how many sequences a draft model has keys and values."""
        return self._plan.planner.draft_sequences

    def lend_to_draft(self) -> None:
        """The draft model takes its memory: tiles give way."""
        planner = self._plan.planner
        planner.draft_waits, self._lent = False, planner.draft_bytes(self._plan.context)
        # Now, and not when it is missed; nor do they take again what is free until the draft model has it.
        self._max_pinned = max(self._plan.needs.min_experts, self.guard.wanted - self._lent)
        self._draft_tiles = 0 if planner.draft_engine is None else planner.draft_engine.tile_bytes
        self.make_room(*self._room)

    def take_back_from_draft(self) -> None:
        """The draft model has given its memory back: tiles have it again."""
        needs = self._plan.needs
        self._plan.planner.draft_waits, self._lent = True, 0
        self._max_pinned = needs.tiles + needs.experts
        self.make_room(*self._room)

    def _say(self, line: str) -> None:
        rank = self.star.rank
        where = str(rank) if rank.size > 1 else "tpimpi"
        print(f"{where}: {line} ({self.engines[0].opened.file.path})", file=sys.stderr, flush=True)

    def _waiting_for_a_row(self) -> tuple[float, str] | None:
        return next((engine.opened.file.waiting for engine in self.engines if engine.opened.file.waiting), None)

    @property
    def draft(self) -> int:
        """How many tokens of a draft a step may have."""
        return self._plan.needs.draft

    @property
    def points(self) -> list[list[float]]:
        """The timeline: [time.monotonic(), resident, pinned, buffers]."""
        return self.guard.timeline.points

    def figures(self) -> list[RankFigures]:
        """What each engine did. Memory is the whole rank's."""
        peak = peak_rss_bytes()
        tokenizer = self._plan.planner.tokenizer_bytes
        weights = sum(engine.window.peak_bytes + engine.expert_cache.peak_bytes for engine in self.engines)
        weights += self._draft_tiles
        caches = [engine.model.cache for engine in self.engines]
        cache = sum(cache.filled_bytes for cache in caches if cache is not None)
        began = self.points[0][0] if self.points else 0.0
        return [
            RankFigures(
                rank=self.star.rank.index,
                host=self.star.rank.host,
                heads=engine.opened.header.share.heads.size,
                kv_heads=engine.opened.header.share.kv_heads.size,
                columns=engine.opened.header.share.usual_columns.size,
                memory_bytes=self.allotment.promise,
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
                bytes_read=engine.window.bytes_read + engine.expert_cache.figures.bytes_read,
                read_wait_s=engine.window.wait_seconds + engine.expert_cache.wait_seconds,
                compute_s=engine.model.compute_seconds,
                star_s=self.star.seconds,
                experts=engine.expert_cache.figures if engine.opened.expert_records else None,
                timeline=[[round(t - began, 3), *rest] for t, *rest in self.points],
            )
            for engine in self.engines
        ]

    def live(self) -> LiveFigures:
        """The whole rank as it is now; cheap enough for every second."""
        windows = [engine.window for engine in self.engines]
        caches = [engine.expert_cache for engine in self.engines]
        return LiveFigures(
            resident_bytes=resident_bytes(),
            bytes_read=sum(w.bytes_read for w in windows) + sum(c.figures.bytes_read for c in caches),
            read_wait_s=sum(w.wait_seconds for w in windows) + sum(c.wait_seconds for c in caches),
            compute_s=sum(engine.model.compute_seconds for engine in self.engines),
            star_s=self.star.seconds,
        )

    def trace(self) -> RankTrace:
        """What was recorded; the clock's offset is for rank 0 to fill in."""
        recorder, rank = self.engines[0].opened.recorder or Recorder(0), self.star.rank
        return RankTrace(rank.index, rank.host, 0.0, recorder.pack(), self.points, recorder.dropped, recorder.passes)

    def close(self) -> None:
        """Stop, and give all memory back."""
        if self._pinned_check is not None:
            self._pinned_check.close()
        self.guard.close()
        for engine in self.engines:
            engine.close()
