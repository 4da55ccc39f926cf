"""`bench allreduce`: every algorithm over sizes, beside two hops, which a sum through one hub takes at least.

Each round has every wire, size and algorithm in turn, so that what disturbs the machine meets all alike. An algorithm's time
is from the end of one sum to the end of the next, on rank 0, while every rank does nothing else: so no rank's head start
counts. A hop is half of a ping-pong of the same size between rank 0 and another rank, of the slowest link.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tpimpi.diagnostics.bench.options import AllreduceBenchOptions
from tpimpi.errors import InputError
from tpimpi.star import Star, choose, parse_rule
from tpimpi.star.codec import wire_of
from tpimpi.star.control import Task, TaskNote, send_note
from tpimpi.star.settle import check_sealed
from tpimpi.system.files import write_json
from tpimpi.system.terminal import print_table as show_table

TASK = "bench allreduce"
SUMS_IN_A_ROW = 5  # of which the first does not count
LARGE_SUM_NUMBERS = 1 << 17  # from here on two sums in a row are enough


@dataclass
class Row:
    """Numbers of one size over one wire; seconds, medians of all rounds."""

    wire: str
    numbers: int
    two_hops: float
    seconds: dict[str, float]
    auto: str  # what auto would take

    @property
    def ratio(self) -> float | None:
        """The star's time, in two hops."""
        return self.seconds["star"] / self.two_hops if "star" in self.seconds else None


@dataclass
class Found:
    """What was measured over the links between `hosts`."""

    hosts: list[str]
    library: str  # the MPI library
    latencies: list[float]  # seconds one way, to ranks 1, 2, …
    rules: dict[str, str]  # wire -> what auto chose
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "star_by_two_hops": row.ratio} for row in self.rows]
        return {**asdict(self), "rows": rows}


class BenchAllreduce(TaskNote, frozen=True, tag=TASK):
    """Hub: sums of so many numbers are timed now, each algorithm over each wire, in so many rounds."""

    sizes: list[int]
    algorithms: list[str]
    wires: list[str]
    rounds: int


def bench(options: AllreduceBenchOptions, star: Star, hosts: list[str]) -> None:
    """Rank 0: the whole command. Raises InputError, StorageError."""
    if star.rank.size == 1:
        raise InputError("bench allreduce measures between ranks; start it with mpirun -np 2, or more")
    if tuple(options.algorithms) == ("library",):
        check_sealed(star, "library")
    found = measure(star, hosts, options)
    print_table(found)
    if options.json is not None:
        write_json(options.json, found.as_json(), "--json")
    if options.plot is not None:
        draw(found, options.plot)


def measure(star: Star, hosts: list[str], options: AllreduceBenchOptions) -> Found:
    """Rank 0: measure, while the others `follow`."""
    sizes, algorithms, wires, rounds = options.sizes, options.algorithms, options.wires, options.rounds
    send_note(star, BenchAllreduce(list(sizes), list(algorithms), list(wires), rounds))
    found = Found(hosts, star.library, [], {})
    for wire in wires:
        star.wire = wire_of(wire)
        links = star.measure_links(max(sizes))
        found.latencies, found.rules[wire] = links.latencies, choose(links.times, star.rank.size)
    times: dict[tuple[str, int, str], list[float]] = {}
    for number in range(rounds):
        if not options.quiet:
            print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for key, samples in _round(star, sizes, algorithms, wires):
            times.setdefault(key, []).extend(samples)
    for wire in wires:
        for size in sizes:
            hops = max(median(times[wire, size, f"rank {rank}"]) for rank in range(1, star.rank.size))
            seconds = {name: median(times[wire, size, name]) for name in algorithms if (wire, size, name) in times}
            auto = next(name for most, name in parse_rule(found.rules[wire]) if size <= most)
            found.rows.append(Row(wire, size, hops, seconds, auto))
    return found


def follow(star: Star, task: Task) -> None:
    """Other ranks: their part of that."""
    note = task.note(BenchAllreduce)
    for wire in note.wires:
        star.wire = wire_of(wire)
        star.measure_links()
    for _ in range(note.rounds):
        for _ in _round(star, note.sizes, note.algorithms, note.wires):
            pass


def _round(
    star: Star, sizes: Sequence[int], algorithms: Sequence[str], wires: Sequence[str]
) -> Iterator[tuple[tuple[str, int, str], list[float]]]:
    """One round: (wire, numbers, algorithm, or the rank of a ping-pong) -> seconds of each."""
    for wire in wires:
        star.wire = wire_of(wire)
        for size in sizes:
            times = SUMS_IN_A_ROW if size < LARGE_SUM_NUMBERS else 2
            values = np.zeros(size, np.float32)
            for rank in range(1, star.rank.size):
                yield (wire, size, f"rank {rank}"), [star.ping(rank, values) for _ in range(times)][1:]
            for name in algorithms:
                if name == "library" and (wire != "f32" or star.sealed):
                    continue
                star.algorithm = name
                ends = []
                for _ in range(times):
                    star.allreduce(values)
                    ends.append(time.monotonic())
                yield (wire, size, name), [b - a for a, b in itertools.pairwise(ends)]


def print_table(found: Found) -> None:
    """On standard output: milliseconds."""
    from rich.table import Table

    slowest, count = max(found.latencies), len(set(found.hosts))
    hosts = f"{count} hosts" if count > 1 else "one host"
    print(f"{len(found.hosts)} ranks on {hosts} · {found.library} · one way {slowest * 1e3:.2f} ms")
    for wire, rule in found.rules.items():
        rows = [row for row in found.rows if row.wire == wire]
        table = Table(box=None, pad_edge=False, header_style="none", title=f"wire {wire}, ms", title_justify="left")
        names = list(dict.fromkeys(name for row in rows for name in row.seconds))
        for name in ("numbers", "two hops", *names, "star / two hops"):
            table.add_column(name, justify="right")
        table.add_column("auto")
        for row in rows:
            cells = [f"{row.seconds[name] * 1e3:.3f}" for name in names]
            ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
            table.add_row(str(row.numbers), f"{row.two_hops * 1e3:.3f}", *cells, ratio, row.auto)
        show_table(table, 160)
        print(f"auto: {rule} (numbers, at most)")


def draw(found: Found, path: Path) -> None:
    """Time against size as a PNG, of the first wire. Raises StorageError."""
    from tpimpi.diagnostics.plots import Line, plot_lines

    rows = [row for row in found.rows if row.wire == found.rows[0].wire]
    sizes = [row.numbers * 4 / 1e3 for row in rows]
    lines = [Line(name, sizes, [row.seconds[name] * 1e3 for row in rows]) for name in rows[0].seconds]
    lines.append(Line("two hops", sizes, [row.two_hops * 1e3 for row in rows], limit=True))
    title = f"allreduce, {len(found.hosts)} ranks"
    plot_lines([(title, lines)], path, ("kilobytes (f32)", "milliseconds"))
