"""How a run starts and ends: every rank opens its slice, says what memory it needs, and takes what rank 0 allots."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

from tpimpi.engine import protocol
from tpimpi.engine.allotment import MemoryAllotment
from tpimpi.engine.budget import allowances
from tpimpi.engine.chunk import mixture_chunk
from tpimpi.engine.engine import EngineConfig, OpenedEngine, identity
from tpimpi.engine.figures import RankFigures
from tpimpi.engine.notes import Allotted, Figures, MemoryNeeds, MemoryPromises, OpenEngine, PlanMemory, SliceIdentity
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.trace import RankTrace
from tpimpi.errors import SliceError
from tpimpi.star import Star
from tpimpi.star.control import Done, Proceed, gather_notes, on_every_rank, receive_note, report_errors, send_note
from tpimpi.system.memory import places


def open_engine(star: Star, settings: EngineConfig) -> OpenedEngine:
    """Every rank: set up the star as the settings say, and open our slice. Raises what OpenedEngine does."""
    star.configure(timeout=settings.timeout, allreduce=settings.allreduce, wire=settings.wire)
    return OpenedEngine(star, settings)


def open_engines(star: Star, settings: EngineConfig) -> OpenedEngine:
    """Rank 0: tell the others the settings, open our slice, and hear whether every rank could open its own."""
    send_note(star, OpenEngine(settings))
    with ExitStack() as undo:
        engine, notes = on_every_rank(
            star, lambda: undo.enter_context(closing(open_engine(star, settings))), SliceIdentity
        )
        for rank, note in enumerate(notes, start=1):
            _check_alike(slice_identity(engine), rank, note)
        undo.pop_all()
    return engine


def allot_memory(
    star: Star,
    engines: Sequence[OpenedEngine],
    context: int,
    tokenizer_bytes: int = 0,
    draft_engine: OpenedEngine | None = None,
) -> tuple[RankMemory, list[MemoryAllotment]]:
    """Rank 0: every rank takes memory for `context` positions in all of its engines, as far as its promise allows, and
    begins to read. `tokenizer_bytes` is what our tokenizer takes, for the figures. Of what we may take, some is for
    the model of `draft_engine`.

    Returns our own, and what every rank's memory buys, in rank order. Raises InputError where a rank's promise is too small.
    """
    with ExitStack() as undo:
        for engine in engines:
            undo.enter_context(closing(engine))
        send_note(star, PlanMemory(context))
        planner = MemoryPlanner(engines, tokenizer_bytes, draft_engine)
        allowed = _promises(planner, context)
        send_note(star, allowed)
        planner.use_chunk(allowed.chunk)
        plan, _ = on_every_rank(star, lambda: planner.plan(context, allowed.promises[0], allowed.watched_by[0]), Done)
        send_note(star, Proceed())  # all at the same time, as they will read
        memory, others = on_every_rank(star, lambda: undo.enter_context(closing(plan.take())), Allotted)
        undo.pop_all()
    return memory, [memory.allotment, *(note.allotment for note in others)]


def take_allotment(star: Star, engines: Sequence[OpenedEngine], context: int) -> RankMemory:
    """Other ranks: their part of `allot_memory`. Raises Stopped where a rank's promise is too small."""
    planner, rank = MemoryPlanner(engines), star.rank.index
    gather_notes(star, _memory_needs(planner, context))
    allowed = receive_note(star, MemoryPromises)
    planner.use_chunk(allowed.chunk)
    plan = report_errors(star, lambda: planner.plan(context, allowed.promises[rank], allowed.watched_by[rank]))
    gather_notes(star, Done())
    receive_note(star, Proceed)
    memory = report_errors(star, plan.take)
    gather_notes(star, Allotted(memory.allotment))
    return memory


def _promises(planner: MemoryPlanner, context: int) -> MemoryPromises:
    """Rank 0: what each rank may take, once every rank has said what it needs; and a chunk that fits into that."""
    star, settings = planner.star, planner.settings
    notes = gather_notes(star, _memory_needs(planner, context))
    promises: list[int | None] = [None] * star.rank.size
    watched_by = [0] * star.rank.size
    if settings.window is None and settings.memory is not None:
        promises = list(settings.memory)
    elif settings.window is None:
        hosts = {rank: note.host for rank, note in enumerate(notes)}
        needs = {rank: note.needs for rank, note in enumerate(notes)}
        found = allowances({rank: note.places for rank, note in enumerate(notes)}, hosts, needs)
        promises = [found[rank] for rank in range(star.rank.size)]
        watched_by = [list(hosts.values()).count(hosts[rank]) for rank in range(star.rank.size)]
    bounds, chunk = [promise for promise in promises if promise is not None], None
    if bounds and len(planner.engines) == 1 and planner.engines[0].chunk_follows_memory:
        chunk = mixture_chunk([note.needs for note in notes], bounds, context)
    return MemoryPromises(promises, watched_by, chunk)


def slice_identity(engine: OpenedEngine) -> SliceIdentity:
    """What the slices of a run have in common, and this rank's host."""
    return SliceIdentity(host=engine.star.rank.host, **identity(engine.header))


def _memory_needs(planner: MemoryPlanner, context: int) -> MemoryNeeds:
    """What this rank needs for `context` positions, and what its host has."""
    return MemoryNeeds(planner.star.rank.host, planner.needs(context), places())


def start(star: Star) -> None:
    """Rank 0: all is well; from now on the others follow."""
    send_note(star, Proceed())


def finish(star: Star, memory: RankMemory) -> tuple[list[list[RankFigures]], list[RankTrace]]:
    """Rank 0: end the run on every rank. For each engine the figures of every rank, in rank order; and their traces."""
    protocol.finish(memory.engines[0].model, star)
    figures: list[list[RankFigures]] = [[] for _ in memory.engines]
    for note in gather_notes(star, Figures(memory.figures())):
        for found, figure in zip(figures, note.figures, strict=True):
            found.append(figure)
    traces = []
    if memory.settings.trace:
        offsets = star.clock_offsets()
        own = memory.trace()
        notes = enumerate(gather_notes(star, own.note()))
        traces = [RankTrace.from_note(rank, note, offsets[rank]) for rank, note in notes]
        traces[0] = replace(traces[0], passes=own.passes)
    memory.close()
    return figures, traces


def send_figures(star: Star, memory: RankMemory) -> None:
    """Other ranks: their part of `finish`, once rank 0 has said that the run is over."""
    gather_notes(star, Figures(memory.figures()))
    if memory.settings.trace:
        star.clock_offsets()
        gather_notes(star, memory.trace().note())


def _check_alike(ours: SliceIdentity, rank: int, theirs: SliceIdentity) -> None:
    for name in ("fingerprint", "format", "shares"):
        its, wanted = getattr(theirs, name), getattr(ours, name)
        if its != wanted:
            raise SliceError(
                f"the slice of r{rank} {theirs.host} has {name} {its}, rank 0's has {wanted}; "
                "use slices that were made together"
            )
