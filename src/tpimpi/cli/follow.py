"""What ranks other than 0 do: they follow what rank 0 says in notes, then its commands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.notes import OpenEngine, PlanMemory
from tpimpi.engine.protocol import follow
from tpimpi.engine.ranks import gather_rank_infos
from tpimpi.engine.startup import open_engine, send_figures, slice_identity, take_allotment
from tpimpi.errors import StarError
from tpimpi.star import Star
from tpimpi.star import settle as link_settle
from tpimpi.star.control import Proceed, Task, gather_notes, receive_note, receive_task, report_errors
from tpimpi.weights import notes as distribute_notes
from tpimpi.weights import receive


def _look_at_this_rank(star: Star, task: Task) -> None:
    from tpimpi.diagnostics.doctor.rank_facts import take_part

    take_part(star, task)


def _time_sums(star: Star, task: Task) -> None:
    from tpimpi.diagnostics.bench.allreduce import follow

    follow(star, task)


def _measure_layers(star: Star, task: Task) -> None:
    from tpimpi.diagnostics.planner.measure_layers import take_part_in_measuring

    take_part_in_measuring(star, task)


def _measure_disk(star: Star, task: Task) -> None:
    from tpimpi.diagnostics.planner.measure_disks import take_part_in_disks

    take_part_in_disks(star, task)


def _tell_slices(star: Star, task: Task) -> None:
    from tpimpi.weights.find import tell_slices

    tell_slices(star, task)


# What rank 0 may ask for before a run, or instead of one: by a note with the `task` of that name, which the function gets.
# Modules that most runs do without are imported when they are needed, for the memory that they take.
TASKS: dict[str, Callable[[Star, Task], None]] = {
    distribute_notes.TASK: receive.receive_slices,
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
    gather_rank_infos(star, arguments, TASKS)
    with ExitStack() as stack:
        engines: list[OpenedEngine] = []
        while not isinstance(note := receive_task(star, OpenEngine, PlanMemory), PlanMemory):
            if isinstance(note, Task):
                _do_task(star, note)
                continue
            settings = note.settings
            engine = report_errors(star, lambda settings=settings: open_engine(star, settings))  # type: ignore[misc]
            engines.append(stack.enter_context(closing(engine)))
            gather_notes(star, slice_identity(engine))
        memory = stack.enter_context(closing(take_allotment(star, engines, note.context)))
        receive_note(star, Proceed)
        follow([engine.model for engine in memory.engines], star, engines[0].page_files, memory.live)
        send_figures(star, memory)


def _do_task(star: Star, task: Task) -> None:
    if task.name not in TASKS:
        raise StarError(f"rank 0 asks for the task {task.name!r}, which is not one of {', '.join(TASKS)}")
    TASKS[task.name](star, task)
