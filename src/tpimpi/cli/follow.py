"""What ranks other than 0 do: they follow what rank 0 says in notes, then its commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from typing import Any

from tpimpi.engine.engine import Engine, EngineConfig, identity
from tpimpi.engine.protocol import follow
from tpimpi.engine.rank_memory import RankMemory
from tpimpi.engine.ranks import greet
from tpimpi.engine.startup import figures_note, memory_note, open_engine
from tpimpi.star import Star
from tpimpi.star import settle as link_settle
from tpimpi.star.control import encode_note, receive_note, report_errors
from tpimpi.weights import distribute

Task = Callable[[Star, dict[str, Any]], None]


def _look_at_this_rank(star: Star, note: dict[str, Any]) -> None:
    from tpimpi.diagnostics.doctor.rank_facts import take_part

    take_part(star, note)


def _time_sums(star: Star, note: dict[str, Any]) -> None:
    from tpimpi.diagnostics.bench.allreduce import follow

    follow(star, note)


def _measure_layers(star: Star, note: dict[str, Any]) -> None:
    from tpimpi.diagnostics.planner.measure_layers import take_part_in_measuring

    take_part_in_measuring(star, note)


def _measure_disk(star: Star, note: dict[str, Any]) -> None:
    from tpimpi.diagnostics.planner.measure_disks import take_part_in_disks

    take_part_in_disks(star, note)


def _tell_slices(star: Star, note: dict[str, Any]) -> None:
    from tpimpi.weights.find import tell_slices

    tell_slices(star, note)


# What rank 0 may ask for before a run, or instead of one: by a note with the `task` of that name, which the function gets.
# Modules that most runs do without are imported when they are needed, for the memory that they take.
TASKS: dict[str, Task] = {
    distribute.TASK: distribute.receive_slices,
    link_settle.TASK: link_settle.follow,
    "doctor": _look_at_this_rank,
    "bench allreduce": _time_sums,
    "measure": _measure_layers,
    "disk": _measure_disk,
    "find-slices": _tell_slices,
}


def take_part(star: Star, arguments: Sequence[str]) -> None:
    """Ranks other than 0: the whole run, with an engine for each model that rank 0 opens (a run has one).

    `arguments` are this process's, of which rank 0 gets a hash. Raises Stopped where rank 0 ended the run before it began.
    """
    greet(star, arguments, TASKS)
    with ExitStack() as stack:
        engines: list[Engine] = []
        while "context" not in (note := receive_note(star)):
            if "task" in note:
                TASKS[note["task"]](star, note)
                continue
            settings = EngineConfig(**note["settings"])
            engine = report_errors(star, lambda settings=settings: open_engine(star, settings))  # type: ignore[misc]
            engines.append(stack.enter_context(closing(engine)))
            star.gather_notes(encode_note(host=star.rank.host, **identity(engine.header)))
        memory = RankMemory(engines)
        stack.enter_context(closing(memory))
        context = note["context"]
        star.gather_notes(memory_note(memory, context))
        note = receive_note(star)
        rank = star.rank.index
        report_errors(star, lambda: memory.plan(context, note["promises"][rank], note["watched"][rank]))
        star.gather_notes(encode_note())
        receive_note(star)
        allotment = report_errors(star, memory.allot_memory)
        star.gather_notes(encode_note(**asdict(allotment)))
        receive_note(star)
        follow([engine.model for engine in engines], star)
        star.gather_notes(figures_note(memory))
        if memory.settings.trace:
            star.clock_offsets()
            star.gather_notes(memory.trace().note())
