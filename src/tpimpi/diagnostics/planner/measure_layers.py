"""All ranks measured together: rank 0 says what, every rank runs its `LayerBenchmark` at the same time, and tells."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

from tpimpi.diagnostics.planner.layer_benchmark import LayerBenchmark, LayerTiming, MeasureTask
from tpimpi.engine.overlap import largest_sum
from tpimpi.star import Star, choose
from tpimpi.star.codec import wire_of
from tpimpi.star.control import encode_note, on_every_rank, receive_note, report_errors
from tpimpi.system.memory import places, resident_bytes


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

    @classmethod
    def from_note(cls, note: Mapping[str, Any]) -> RankMeasurement:
        values = {name: note[name] for name in cls.__dataclass_fields__}
        return cls(**{**values, "timings": [LayerTiming(**timing) for timing in note["timings"]]})


# A layer of weights that are made up


# All ranks together


def measure(star: Star, task: MeasureTask) -> list[RankMeasurement]:
    """Rank 0: have the first `task.ranks` ranks measured together; what each found, in rank order.

    Raises InputError and the like where a rank cannot take part.
    """
    star.broadcast_note(encode_note(task="measure", **asdict(task)))
    benchmark, _ = on_every_rank(star, lambda: LayerBenchmark(star.rank, task))
    star.broadcast_note(encode_note(go=True))
    notes = star.gather_notes(encode_note(**asdict(_run_benchmark(star, benchmark))))
    return [RankMeasurement.from_note(json.loads(note)) for note in notes[: task.ranks]]


def take_part_in_measuring(star: Star, note: Mapping[str, Any]) -> None:
    """Another rank's side of `measure`."""
    task = MeasureTask(**{name: note[name] for name in MeasureTask.__dataclass_fields__})
    if star.rank.index >= task.ranks:  # idle, as in a run without it
        star.gather_notes(encode_note())
        receive_note(star)
        star.first(task.ranks)
        star.gather_notes(encode_note())
        return
    benchmark = report_errors(star, lambda: LayerBenchmark(star.rank, task))
    star.gather_notes(encode_note())
    receive_note(star)
    star.gather_notes(encode_note(**asdict(_run_benchmark(star, benchmark))))


def _run_benchmark(star: Star, benchmark: LayerBenchmark) -> RankMeasurement:
    """Every rank that takes part, at the same time: measure, and give the memory back."""
    task = benchmark.task
    few = star.first(task.ranks)
    assert few is not None
    few.wire = wire_of(task.wire)
    # Also so that a rank waits in the way that suits the links.
    links = few.measure_links(largest_sum(task.config["hidden"], task.ranks) if task.allreduce == "auto" else 0)
    if few.rank.is_hub:
        rule = (
            task.allreduce
            if task.allreduce != "auto"
            else choose(links.times, few.rank.size)
            if links.times
            else "star"
        )
        few.broadcast_note(encode_note(rule=rule))
    else:
        rule = receive_note(few)["rule"]
    few.algorithm = rule
    with contextlib.closing(benchmark):
        processors, timings = benchmark.processors(), benchmark.timings(few)
        head = benchmark.head() if few.rank.is_hub else None
    few.free_buffers()  # what a run holds for its messages is counted with the work
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
    )
