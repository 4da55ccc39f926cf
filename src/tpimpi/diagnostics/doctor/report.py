"""How `doctor` tells under mpirun what the ranks found: tables and findings on stdout, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from tpimpi import __version__
from tpimpi.diagnostics.doctor.findings import Checkup, Finding
from tpimpi.errors import one_line
from tpimpi.system.terminal import print_table
from tpimpi.system.units import show_rate, show_size, show_time


def as_json(checkup: Checkup, found: Sequence[Finding]) -> dict[str, Any]:
    """What --json writes."""
    ranks = [
        {**asdict(each), "threads": threads} for each, threads in zip(checkup.facts, checkup.threads(), strict=True)
    ]
    for rank, seconds in enumerate(checkup.clocks):
        ranks[rank]["clock_s"] = seconds
    links = [
        {"rank": rank, "interfaces": checkup.carriers(rank), **asdict(look.ping)}
        for rank, look in enumerate(checkup.links, start=1)
    ]
    wrong = sum(finding.wrong for finding in found)
    return {
        "tpimpi": __version__,
        "ranks": ranks,
        "links": links,
        "findings": [asdict(f) for f in found],
        "wrong": wrong,
    }


def print_report(checkup: Checkup, found: Sequence[Finding]) -> None:
    """Tables of ranks and links, then what was found, what is wrong first."""
    for table in _tables(checkup):
        print_table(table, 160)
    for finding in sorted(found, key=lambda finding: not finding.wrong):
        print(one_line(finding.line()))
    wrong = sum(finding.wrong for finding in found)
    print(f"{wrong} thing{'s' if wrong > 1 else ''} wrong" if wrong else "nothing wrong", flush=True)


def _tables(checkup: Checkup) -> Iterator[Any]:
    from rich.table import Table

    def table(*columns: str, left: int = 1) -> Table:
        made = Table(box=None, pad_edge=False, header_style="none")
        for number, name in enumerate(columns):
            made.add_column(name, justify="left" if number < left else "right")
        return made

    facts = checkup.facts
    installed = table("rank host", "tpimpi", "python", "MPI", "mpi4py", "numpy", "kernels", "system", left=8)
    for rank, f in enumerate(facts):
        mpi = f"{f.mpi.kind} {f.mpi.version}".strip() or "-"
        versions = (f.tpimpi, f.python, mpi, f.mpi.mpi4py or "-", f.numpy)
        installed.add_row(checkup.name(rank), *versions, f.kernels or "none", f.system)
    yield installed
    names = ("cores", "threads", "memory", "free", "limit", "disk free", "disk reads", "clock", "slice", "of model")
    threads = checkup.threads()
    has = table("rank host", *names)
    for rank, f in enumerate(facts):
        sizes = [f.memory_total, f.memory_free, f.memory_limit, f.disk_free]
        cores = f"{len(f.cores)} of {f.host_cores}" + ("" if f.quota is None else f" (quota {f.quota:g})")
        clock = f"{checkup.clocks[rank]:+.3f} s" if rank and checkup.clocks else "-"
        shown = [show_size(size) if size else "-" for size in sizes]
        rate = "-" if f.disk_rate is None else f"{show_size(f.disk_rate)}/s"
        slice_and_model = (f.slice.state or "-", f.slice.model or "-")
        has.add_row(checkup.name(rank), cores, str(threads[rank]), *shown, rate, clock, *slice_and_model)
    yield has
    if not checkup.links:
        return
    links = table("link to r0", "interfaces", "one way", "usually", "to it", "from it", left=2)
    for rank, look in enumerate(checkup.links, start=1):
        mine, theirs = checkup.carriers(rank)
        p = look.ping
        same = facts[0].host == facts[rank].host
        over = "memory" if mine is None and theirs is None and same else f"{mine or '?'} to {theirs or '?'}"
        links.add_row(
            checkup.name(rank),
            over,
            show_time(p.latency_s),
            show_time(p.median_s),
            show_rate(p.to_bytes_per_s),
            show_rate(p.from_bytes_per_s),
        )
    yield links
