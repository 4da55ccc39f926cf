"""What --memory does: speed against the disk's, memory against the promise, overlap, and the plain window beside it.

    python -m bench.studies.memory_scheduler line --slices DIR --json line.json --plot line.png
    python -m bench.studies.memory_scheduler overlap --slices DIR
    python -m bench.studies.memory_scheduler windows --slices DIR
    python -m bench.studies.memory_scheduler big --slices DIR --remove

DIR gets the slices if it has none: Llama 2 7B's shape, q4_0, 2 ranks, 3.9 GB (`big`: 70B, 8 ranks, 39 GB, which --remove
removes at the end, if they were made here). The disk's rate is that of `bench disk` with as many readers as ranks, reads as
large as most tiles, and the number of reads in flight that is fastest, right before and right after each run. Where there
are control groups (Linux, root) the ranks run in them: see bench/limits.

line      from the smallest budget to everything pinned, with a hard limit that is the promise, and without. `/ disk` is the
          time for a token over that of reading what is streamed for it; `/ line` is it over the straight line from the
          smallest budget to everything pinned.
overlap   with each multiplication done several times over (slowed.py), and with the disk slowed: a token should take as long
          as the larger of computing alone (everything pinned) and reading alone, not the sum.
windows   --window 2 and 4, which is the paper's scheduler, and budgets, in turn.
big       the 70B shape with 512 MiB a rank, and with the smallest budget that works.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.limits import Group, LimitError, available
from bench.studies.measured_runs import (
    RefusedError,
    Setup,
    Values,
    direct_rate,
    figures,
    groups_of,
    mb,
    median_of,
    peaks,
    prepare,
    show,
)
from tpimpi.system.units import parse_size
from tpimpi.weights.slices.names import slice_name

MIB = 1 << 20


# 1 and 2: the line


def line(options: argparse.Namespace) -> None:
    """Budgets from the smallest to everything pinned, with hard limits and without, beside the disk."""
    setup, _ = prepare(options, "llama-2-7b", 2, 4 * 10**9)
    budgets = list(dict.fromkeys([setup.smallest(), *options.budgets.split(",")]))
    smallest, pinned = budgets[0], budgets[-1]
    if options.memory not in budgets:
        sys.exit(f"--memory is {options.memory}, must be one of --budgets ({options.budgets})")
    for number in range(options.rounds):
        before = setup.disk()
        for budget in budgets:
            if number >= options.other_rounds and budget != options.memory:
                continue
            for limit in (parse_size(budget, "--budgets"), None) if setup.found["groups"] else (None,):
                with groups_of(setup, limit) as groups:
                    try:
                        report = setup.run("--memory", budget, inside=groups)
                    except RefusedError as refused:
                        print(f"{budget} was refused, {refused}; left out", file=sys.stderr, flush=True)
                        continue
                    after = setup.disk()
                    found = figures(report, groups, (before, after))
                before = after
                of_disk = "-" if found["of_disk"] is None else f"{found['of_disk']:.3f}"
                hits = "" if limit is None else f", {sum(found['limit_hits'])} times at the limit"
                print(
                    f"round {number + 1}: {budget}, {'no' if limit is None else 'hard'} limit: "
                    f"{found['s_per_token']:.3f} s/token, / disk {of_disk}{hits}",
                    file=sys.stderr,
                    flush=True,
                )
                setup.note(runs=[{"budget": budget, "limit": limit, **found}])
    summary = summarize_line(setup.found["runs"], smallest, pinned)
    read = [bytes_read(setup.run("--memory", pinned, "--max-tokens", tokens)) for tokens in ("1", str(setup.tokens))]
    setup.note(summary=summary, read_when_pinned=read)
    show(
        f"{setup.slices}: {setup.ranks} ranks, tile {setup.tile / MIB:.1f} MiB; medians (MB, s)",
        ("budget", "limit", "runs", "streamed", "pinned", "disk GB/s", "s/token", "/ disk", "/ line", "peak", "hits"),
        [
            (
                *(row["budget"], "hard" if row["limited"] else "none", str(row["runs"])),
                *(mb(row["streamed_bytes_per_token"]), mb(row["pinned_bytes"]), f"{row['disk_bytes_per_s'] / 1e9:.2f}"),
                *(f"{row['s_per_token']:.3f}", "-" if row["of_disk"] is None else f"{row['of_disk']:.3f}"),
                *("-" if row["of_line"] is None else f"{row['of_line']:.3f}", mb(row["peak_bytes"])),
                "-" if row["limit_hits"] is None else str(row["limit_hits"]),
            )
            for row in summary
        ],
    )
    print(
        f"--memory {pinned}: {read[0] / 1e6:.3f} MB read for 1 token, {read[1] / 1e6:.3f} for {setup.tokens}",
        flush=True,
    )
    if options.plot is not None:
        plot_line(setup.found["runs"], options.plot)


def bytes_read(report: Values) -> int:
    """By all ranks, in the whole run."""
    return sum(rank["bytes_read"] for rank in report["ranks"])


def summarize_line(runs: Sequence[Values], smallest: str, pinned: str) -> list[Values]:
    """A row for each budget, with a limit and without: medians over its runs, and the sum of the times at the limit."""
    rows = []
    for budget, limited in dict.fromkeys((run["budget"], run["limit"] is not None) for run in runs):
        these = [run for run in runs if (run["budget"], run["limit"] is not None) == (budget, limited)]
        group_peaks = [peak for run in these for peak in run.get("group_peak_bytes", []) if peak is not None]
        rows.append(
            {
                "budget": budget,
                "limited": limited,
                "runs": len(these),
                **{name: median_of(these, name) for name in ("streamed_bytes_per_token", "s_per_token", "of_disk")},
                "pinned_bytes": sum(rank["pinned_bytes"] for rank in these[0]["ranks"]),
                "disk_bytes_per_s": median(rate for run in these for rate in run["disk_bytes_per_s"]),
                "peak_bytes": max(group_peaks) if group_peaks else max(run["peak_rss_bytes"] for run in these),
                "limit_hits": sum(sum(run["limit_hits"]) for run in these) if limited else None,
                "of_line": None,
            }
        )
    ends = [[run for run in runs if run["budget"] == budget] for budget in (smallest, pinned)]
    if all(ends):
        (x0, y0), (x1, y1) = (
            [median_of(end, name) or 0.0 for name in ("streamed_bytes_per_token", "s_per_token")] for end in ends
        )
        for row in rows:
            if x0 != x1:
                row["of_line"] = row["s_per_token"] / (
                    y1 + (y0 - y1) * (row["streamed_bytes_per_token"] - x1) / (x0 - x1)
                )
    return rows


def plot_line(runs: Sequence[Values], path: Path) -> None:
    """s/token against bytes streamed per token, with the disk's line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for limited, marker, label in ((False, "o", "no limit"), (True, "x", "hard limit = the promise")):
        points = [
            (run["streamed_bytes_per_token"] / 1e9, run["s_per_token"])
            for run in runs
            if (run["limit"] is not None) == limited
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=label, alpha=0.7)
    rate = median(rate for run in runs for rate in run["disk_bytes_per_s"])
    most = max(run["streamed_bytes_per_token"] for run in runs) / 1e9
    axes.plot([0, most], [0, most * 1e9 / rate], "-", color="gray", label=f"the disk: {rate / 1e9:.2f} GB/s (median)")
    axes.set_xlabel("streamed for a token, all ranks (GB)")
    axes.set_ylabel("seconds a token")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=150)
    print(f"drawn: {path}", file=sys.stderr)


# 4: overlap


def overlap(options: argparse.Namespace) -> None:
    """A token takes the larger of computing and reading, with either of them slowed."""
    setup, _ = prepare(options, "llama-2-7b", 2, 4 * 10**9)

    def compute(times: float) -> float:
        """s/token with everything pinned."""
        report = setup.run("--memory", options.pinned, program=slowed(times))
        if any(rank["streamed_bytes_per_token"] for rank in report["ranks"]):
            sys.exit(f"--pinned is {options.pinned}, which does not pin everything; give more")
        return float(report["s_per_token"])

    streamed = figures(setup.run("--memory", options.memory))["streamed_bytes_per_token"]
    rate = direct_rate(setup.disk())
    reading, one, four = streamed / rate, compute(1), compute(4)
    equal = max(1.0, 1 + (reading - one) / max((four - one) / 3, 1e-9))
    equal = max(1.0, 1 + (equal - 1) * (reading - one) / max(compute(equal) - one, 1e-9))  # nearer, from near there
    print(
        f"reading {reading:.2f} s, computing {one:.2f} s: {equal:.2f} times as much multiplying takes as long",
        file=sys.stderr,
        flush=True,
    )
    cases: list[tuple[str, float, int | None]] = [
        ("computing as slow as reading", equal, None),
        ("computing twice as slow", 2 * equal, None),
    ]
    why = available("io")
    if why is None:
        limit = int(rate / 2) if options.read_bps is None else parse_size(options.read_bps, "--read-bps")
        slower = equal * rate / limit
        cases += [("disk slowed", equal, limit), ("disk slowed, computing not", 1, limit)]
        cases += [("disk slowed, computing as slow", slower, limit)]
    else:
        print(f"without a slower disk: {why}", file=sys.stderr)
    for number in range(options.rounds):
        for name, times, read_bps in cases:
            with contextlib.ExitStack() as stack:
                around = None
                if read_bps is not None:
                    group = Group(f"tpimpi-{os.getpid()}", read_bps=read_bps, device=setup.slices)
                    around = stack.enter_context(group)
                computing, before = compute(times), setup.disk(around)
                report = setup.run("--memory", options.memory, around=around, program=slowed(times))
                found = figures(report, None, (before, setup.disk(around)), read_bps)
            larger = max(computing, found["reading_s"])
            found |= {"case": name, "times": times, "read_bps": read_bps, "computing_s": computing}
            found |= {"of_larger": found["s_per_token"] / larger, "sum_s": computing + found["reading_s"]}
            setup.note(runs=[found])
            print(f"round {number + 1}: {name}: {found['of_larger']:.3f}", file=sys.stderr, flush=True)
    rows = []
    for name, times, _ in cases:
        these = [run for run in setup.found["runs"] if run["case"] == name]
        seconds = (median_of(these, key) or 0.0 for key in ("computing_s", "reading_s", "sum_s", "s_per_token"))
        rows.append((name, f"{times:.2f}", *(f"{s:.2f}" for s in seconds), f"{median_of(these, 'of_larger'):.3f}"))
    columns = ("", "times", "computing", "reading", "their sum", "s/token", "/ the larger")
    show(f"--memory {options.memory}, medians of {options.rounds} (s)", columns, rows)


def slowed(times: float) -> tuple[str, ...]:
    """The program of a run with so many times as much multiplying."""
    return "-m", "bench.studies.slowed", f"{times:.4f}"


# 6: the plain window


def windows(options: argparse.Namespace) -> None:
    """The paper's window, and budgets, in turn."""
    setup, _ = prepare(options, "llama-2-7b", 2, 4 * 10**9)
    ways = [("--window", "2"), ("--window", "4"), ("--memory", options.memory), ("--memory", options.pinned)]
    for number in range(options.rounds):
        for way in ways:
            with groups_of(setup, None) as groups:
                found = figures(setup.run(*way, inside=groups), groups)
            setup.note(runs=[{"way": " ".join(way), **found}])
            print(
                f"round {number + 1}: {' '.join(way)}: {found['s_per_token']:.3f} s/token", file=sys.stderr, flush=True
            )
    rows = []
    for way in ways:
        these = [run for run in setup.found["runs"] if run["way"] == " ".join(way)]
        times = [run["s_per_token"] for run in these]
        largest = max(these, key=lambda run: run["peak_rss_bytes"])
        rows.append(
            (
                *(" ".join(way), f"{median(times):.3f}", f"{min(times):.3f}", f"{max(times):.3f}"),
                *(mb(these[0]["streamed_bytes_per_token"]), mb(largest["peak_rss_bytes"]), peaks(largest)),
            )
        )
    if len({tuple(run["token_ids"]) for run in setup.found["runs"]}) != 1:
        print("the runs made different tokens", file=sys.stderr)
    columns = ("", "s/token", "least", "most", "streamed", "peak of a rank", "with page cache")
    show(f"{setup.slices}: medians of {options.rounds} (s, MB)", columns, rows)


# 3: 70B


def big(options: argparse.Namespace) -> None:
    """The 70B shape in half a gigabyte a rank, and in as little as works."""
    setup, made = prepare(options, "llama-2-70b", options.ranks, 39_500_000_000)
    try:
        for budget in (options.memory, setup.smallest()):
            limit = parse_size(budget, "--memory")
            before = setup.disk()
            with groups_of(setup, limit) as groups:
                found = figures(setup.run("--memory", budget, inside=groups), groups, (before, setup.disk()))
            setup.note(runs=[{"budget": budget, **found}])
            show_big(setup, budget, found)
    finally:
        if options.remove and made:
            for rank in range(setup.ranks):
                (setup.slices / slice_name(rank, setup.ranks)).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else lies there too
                setup.slices.rmdir()


def show_big(setup: Setup, budget: str, found: Values) -> None:
    """What each rank took, and what the disk gave."""
    rows = []
    for index, rank in enumerate(found["ranks"]):
        in_group = [mb(found[name][index]) if name in found else "-" for name in ("group_peak_bytes",)]
        hits = str(found["limit_hits"][index]) if "limit_hits" in found else "-"
        sizes = (mb(rank[name]) for name in ("pinned_bytes", "buffer_bytes", "streamed_bytes_per_token"))
        rows.append((f"r{rank['rank']} {rank['host']}", mb(rank["peak_rss_bytes"]), *in_group, hits, *sizes))
    columns = ("rank host", "peak", "with page cache", "at the limit", "pinned", "buffers", "streamed a token")
    show(f"--memory {budget}, {setup.ranks} ranks, --context {setup.context} (MB)", columns, rows)
    used, rate = found["streamed_bytes_per_token"] / found["s_per_token"], median(found["disk_bytes_per_s"])
    most = max(rank["streamed_bytes_per_token"] for rank in found["ranks"])
    print(
        f"{found['s_per_token']:.2f} s/token; {found['streamed_bytes_per_token'] / 1e9:.2f} GB a token from one disk that "
        f"all {setup.ranks} ranks share: {used / 1e9:.2f} of the {rate / 1e9:.2f} GB/s that it gives them\n"
        f"with a disk as fast for each rank, reading would take {most / rate:.2f} s a token; computing took "
        f"{max(rank['compute_s'] for rank in found['ranks']) / len(found['token_ids']):.2f} s here, {setup.ranks} ranks on "
        f"{len(os.sched_getaffinity(0))} cores",
        flush=True,
    )


# The program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="line|overlap|windows|big")
    for experiment in (line, overlap, windows, big):
        command = commands.add_parser(experiment.__name__, help=experiment.__doc__, description=experiment.__doc__)
        command.set_defaults(experiment=experiment)
        command.add_argument("--slices", type=Path, required=True, metavar="DIR", help="made if there are none")
        command.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")
        command.add_argument("--seconds", type=float, default=1.0, help="of each way of reading the disk (default 1)")
        command.add_argument("--tokens", type=int, default=3 if experiment is big else 8)
        command.add_argument("--context", type=int, default=2048 if experiment is big else 512)
        command.add_argument("--memory", default="512MiB" if experiment is big else "700M", help="the budget")
        if experiment is not big:
            command.add_argument("--rounds", type=int, default=5 if experiment is line else 3)
            command.add_argument("--pinned", default="3G", help="a budget that pins everything (default 3G)")
    commands.choices["overlap"].add_argument(
        "--read-bps", metavar="SIZE", help="of the slowed disk (default: half its rate)"
    )
    at_line, at_big = commands.choices["line"], commands.choices["big"]
    at_line.add_argument(
        "--budgets", default="700M,1G,1.5G,2G,3G", help="beside the smallest; the last pins everything"
    )
    at_line.add_argument("--other-rounds", type=int, default=2, help="of budgets other than --memory (default 2)")
    at_line.add_argument("--plot", type=Path, metavar="FILE", help="draw the line (needs matplotlib)")
    at_big.add_argument("--ranks", type=int, default=8)
    at_big.add_argument("--remove", action="store_true", help="remove the slices at the end, if they were made here")
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that groups are removed
    try:
        options.experiment(options)
    except LimitError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
