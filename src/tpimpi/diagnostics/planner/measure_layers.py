"""All ranks measured together: rank 0 says what, every rank runs its `LayerBenchmark` at the same time, and tells."""

from __future__ import annotations

import contextlib
from dataclasses import astuple, dataclass

from tpimpi.diagnostics.planner.layer_benchmark import LayerBenchmark, LayerBenchmarkConfig, LayerTiming
from tpimpi.engine.overlap import largest_sum
from tpimpi.star import Star, choose
from tpimpi.star.codec import wire_of
from tpimpi.star.control import (
    Done,
    Note,
    Proceed,
    Task,
    TaskNote,
    gather_notes,
    on_every_rank,
    receive_note,
    report_errors,
    send_note,
)
from tpimpi.system.memory import places, release_freed_memory, resident_bytes


@dataclass(frozen=True)
class RankMeasurement:
    """What one rank found. `places` are those of memory.places; `head` of rank 0: (bytes, seconds, processor seconds)."""

    rank: int
    host: str
    threads: int
    backend: str
    processors: float
    timings: list[LayerTiming]
    head: tuple[int, float, float] | None
    base: int
    places: list[tuple[str, int, int]]
    allreduce: str  # the rule by which sums were made


class MeasureLayers(TaskNote, frozen=True, tag="measure"):
    """Hub: this is measured now."""

    wanted: LayerBenchmarkConfig


class MeasuredNote(Note, frozen=True):
    """What the sender found; None of a rank that does not take part."""

    measurement: RankMeasurement | None


class AllreduceRule(Note, frozen=True):
    """Hub: sums are made by this rule."""

    rule: str


def measure(star: Star, settings: LayerBenchmarkConfig) -> list[RankMeasurement]:
    """Rank 0: have the first `settings.ranks` ranks measured together; what each found, in rank order.

    Raises InputError and the like where a rank cannot take part.
    """
    send_note(star, MeasureLayers(settings))
    benchmark, _ = on_every_rank(star, lambda: LayerBenchmark(star.rank, settings), Done)
    send_note(star, Proceed())
    notes = gather_notes(star, MeasuredNote(_run_benchmark(star, benchmark)))
    return [note.measurement for note in notes if note.measurement is not None]


def take_part_in_measuring(star: Star, task: Task) -> None:
    """Another rank's side of `measure`."""
    wanted = task.note(MeasureLayers).wanted
    if star.rank.index >= wanted.ranks:  # idle, as in a run without it
        gather_notes(star, Done())
        receive_note(star, Proceed)
        star.first(wanted.ranks)
        gather_notes(star, MeasuredNote(None))
        return
    benchmark = report_errors(star, lambda: LayerBenchmark(star.rank, wanted))
    gather_notes(star, Done())
    receive_note(star, Proceed)
    gather_notes(star, MeasuredNote(_run_benchmark(star, benchmark)))


def _run_benchmark(star: Star, benchmark: LayerBenchmark) -> RankMeasurement:
    """Every rank that takes part, at the same time: measure, and give the memory back."""
    settings = benchmark.settings
    few = star.first(settings.ranks)
    assert few is not None
    few.wire = wire_of(settings.wire)
    # Also so that a rank waits in the way that suits the links.
    links = few.measure_links(
        largest_sum(settings.config["hidden"], settings.ranks) if settings.allreduce == "auto" else 0
    )
    if few.rank.is_hub:
        rule = (
            settings.allreduce
            if settings.allreduce != "auto"
            else choose(links.times, few.rank.size)
            if links.times
            else "star"
        )
        send_note(few, AllreduceRule(rule))
    else:
        rule = receive_note(few, AllreduceRule).rule
    few.algorithm = rule
    with contextlib.closing(benchmark):
        processors, timings = benchmark.processors(), benchmark.timings(few)
        head = benchmark.head() if few.rank.is_hub else None
    few.free_buffers()  # what a run holds for its messages is counted with the work
    release_freed_memory()
    return RankMeasurement(
        rank=star.rank.index,
        host=star.rank.host,
        threads=benchmark.threads,
        backend=benchmark.backend.name,
        processors=max(processors, benchmark.used),  # it may have met a bad moment
        timings=timings,
        head=head,
        base=resident_bytes(),
        places=[astuple(place) for place in places()],
        allreduce=rule,
    )
