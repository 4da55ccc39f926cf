"""How a run starts and ends: every rank opens its slice, says what memory it needs, and takes what rank 0 allots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, astuple
from typing import Any

from tpimpi.engine import protocol
from tpimpi.engine.budget import Needs, allowances
from tpimpi.engine.engine import Engine, EngineConfig, identity
from tpimpi.engine.figures import RankFigures
from tpimpi.engine.rank_memory import MemoryAllotment, RankMemory
from tpimpi.engine.trace import RankTrace
from tpimpi.errors import SliceError
from tpimpi.star import Star
from tpimpi.star.control import encode_note, on_every_rank
from tpimpi.system.memory import Place, places
from tpimpi.weights.slices.header import Header


def open_engine(star: Star, settings: EngineConfig) -> Engine:
    """Every rank: set up the star as the settings say, and open our slice. Raises SliceError (see Engine)."""
    star.configure(timeout=settings.timeout, allreduce=settings.allreduce, wire=settings.wire)
    return Engine(star, settings)


def open_engines(star: Star, settings: EngineConfig) -> Engine:
    """Rank 0: tell the others the settings, open our slice, and hear whether every rank could open its own.

    `allot_memory` is to follow.
    """
    star.broadcast_note(encode_note(settings=asdict(settings)))
    opened: list[Engine] = []

    def take() -> Engine:
        opened.append(open_engine(star, settings))
        return opened[0]

    try:
        engine, notes = on_every_rank(star, take)
        for rank, note in enumerate(notes[1:], start=1):
            _check_alike(engine.header, rank, note)
    except BaseException:
        for engine in opened:
            engine.close()
        raise
    return engine


def allot_memory(
    star: Star, engines: Sequence[Engine], context: int, tokenizer_bytes: int = 0
) -> tuple[RankMemory, list[MemoryAllotment]]:
    """Rank 0: every rank takes memory for `context` positions in all of its engines, as far as its promise allows, and
    begins to read. `tokenizer_bytes` is what our tokenizer takes, for the figures.

    Returns our own, and what every rank's memory buys, in rank order. Raises InputError where a rank's promise is too small.
    """
    star.broadcast_note(encode_note(context=context))
    memory = RankMemory(engines, tokenizer_bytes)
    notes = [json.loads(note) for note in star.gather_notes(memory_note(memory, context))]
    settings = memory.settings
    promises: list[int | None] = [None] * star.rank.size
    watched = [0] * star.rank.size
    if settings.window is None and settings.memory is not None:
        promises = list(settings.memory)
    elif settings.window is None:
        hosts = {rank: note["host"] for rank, note in enumerate(notes)}
        needs = {rank: Needs(**note["needs"]) for rank, note in enumerate(notes)}
        found = allowances({r: [Place(*p) for p in note["places"]] for r, note in enumerate(notes)}, hosts, needs)
        promises = [found[rank] for rank in range(star.rank.size)]
        watched = [list(hosts.values()).count(hosts[rank]) for rank in range(star.rank.size)]
    star.broadcast_note(encode_note(promises=promises, watched=watched))
    try:
        on_every_rank(star, lambda: memory.plan(context, promises[0], watched[0]))
        star.broadcast_note(encode_note(measure=True))  # all at the same time, as they will read
        allotment, notes = on_every_rank(star, memory.allot_memory)
    except BaseException:
        memory.close()
        raise
    return memory, [allotment, *(MemoryAllotment(**note) for note in notes[1:])]


def memory_note(memory: RankMemory, context: int) -> bytes:
    """What a rank needs, and what its host has."""
    found = [astuple(place) for place in places()]
    return encode_note(host=memory.star.rank.host, needs=asdict(memory.needs(context)), places=found)


def start(star: Star) -> None:
    """Rank 0: all is well; from now on the others follow."""
    star.broadcast_note(encode_note(start=True))


def finish(star: Star, memory: RankMemory) -> tuple[list[list[RankFigures]], list[RankTrace]]:
    """Rank 0: end the run on every rank. For each engine the figures of every rank, in rank order; and their traces."""
    protocol.finish(star)
    figures: list[list[RankFigures]] = [[] for _ in memory.engines]
    for note in star.gather_notes(figures_note(memory)):
        for found, values in zip(figures, json.loads(note), strict=True):
            found.append(RankFigures(**values))
    traces = []
    if memory.settings.trace:
        offsets = star.clock_offsets()
        notes = enumerate(star.gather_notes(memory.trace().note()))
        traces = [RankTrace.from_note(rank, note, offsets[rank]) for rank, note in notes]
    memory.close()
    return figures, traces


def figures_note(memory: RankMemory) -> bytes:
    return json.dumps([asdict(figures) for figures in memory.figures()]).encode()


def _check_alike(header: Header, rank: int, note: dict[str, Any]) -> None:
    for name, value in identity(header).items():
        if note[name] != value:
            raise SliceError(
                f"the slice of r{rank} {note['host']} has {name} {note[name]}, rank 0's has {value}; "
                "use slices that were made together"
            )
