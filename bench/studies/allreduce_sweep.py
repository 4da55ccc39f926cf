"""Every way of adding over the ranks, in an emulated home: times against latency, and against the number of ranks. As root.

    python -m bench.studies.allreduce_sweep [--ranks 2,4,8] [--latency 0.3,1,2,5] [--bandwidth 300Mbit/s]
        [--mpi openmpi,mpich] [--sizes 8192,1048576] [--repeats N] [--out DIR] [--json FILE]

It runs `python -m tpimpi bench allreduce --seal off`, as the library's sums cannot be sealed, in one home for each number of
ranks, with the link set anew between the runs, and prints a table for each size. With `--out docs` it draws
allreduce-latency.svg and allreduce-ranks.svg there, of the first MPI and the first size, and writes all that was measured
into the file of `--json`. The cores of this machine carry all the ranks, so large sums (1048576 numbers) show mostly what
those cores can move; run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.home import Home, Link
from bench.home.devices import parse_bandwidth
from tpimpi.diagnostics.plots import Line, plot_lines

RUN_TIMEOUT_S = 600


def measure(home: Home, ranks: int, mpi: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What one run of `bench allreduce` measured."""
    path = folder / "found.json"
    command = [sys.executable, "-m", "tpimpi", "bench", "allreduce", "--seal", "off", "--quiet", "--json", str(path)]
    command += ["--sizes", options.sizes, "--repeats", str(options.repeats)]
    process = home.mpirun(command, ranks=ranks, mpi=mpi, stdout=subprocess.DEVNULL)
    if process.wait(RUN_TIMEOUT_S):
        raise SystemExit(f"bench allreduce with {ranks} ranks under {mpi} ended with {process.returncode}")
    return dict(json.loads(path.read_text()))


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each MPI, number of ranks, latency and size; latencies in ms."""
    rows: list[dict[str, Any]] = []
    bandwidth = parse_bandwidth(options.bandwidth, "--bandwidth") if options.bandwidth else None
    with tempfile.TemporaryDirectory() as folder:
        for ranks in map(int, options.ranks.split(",")):
            with Home(ranks, Link()) as home:
                for latency in map(float, options.latency.split(",")):
                    home.set_link(Link(latency / 1e3, 0.0, bandwidth))
                    for mpi in options.mpi.split(","):
                        found = measure(home, ranks, mpi, options, Path(folder))
                        for row in found["rows"]:
                            rows.append({"mpi": mpi, "ranks": ranks, "latency_ms": latency, **row})
                        print(
                            f"{mpi}, {ranks} ranks, {latency:g} ms: auto {found['rules']}", file=sys.stderr, flush=True
                        )
    return rows


def print_tables(rows: list[dict[str, Any]]) -> None:
    """A table for each size; milliseconds."""
    for size in dict.fromkeys(row["numbers"] for row in rows):
        chosen = [row for row in rows if row["numbers"] == size]
        names = list(chosen[0]["seconds"])
        print(
            f"\n{size} numbers, ms\n\n| MPI | ranks | one way | two hops | {' | '.join(names)} | star / two hops | auto |"
        )
        print("|" + "---|" * (len(names) + 6))
        for row in chosen:
            times = " | ".join(f"{row['seconds'][name] * 1e3:.2f}" for name in names)
            where = f"{row['mpi']} | {row['ranks']} | {row['latency_ms']:g} | {row['two_hops'] * 1e3:.2f}"
            print(f"| {where} | {times} | {row['star_by_two_hops']:.2f} | {row['auto']} |")


def draw(rows: list[dict[str, Any]], out: Path) -> None:
    """The two pictures, of the first MPI and the first size."""
    mpi, size = rows[0]["mpi"], rows[0]["numbers"]
    chosen = [row for row in rows if (row["mpi"], row["numbers"]) == (mpi, size)]
    for name, along, across, title in (
        ("latency", "latency_ms", "ranks", "{} ranks"),
        ("ranks", "ranks", "latency_ms", "{:g} ms one way"),
    ):
        panels = []
        for fixed in dict.fromkeys(row[across] for row in chosen):
            some = [row for row in chosen if row[across] == fixed]
            x = [float(row[along]) for row in some]
            lines = [Line(key, x, [row["seconds"][key] * 1e3 for row in some]) for key in some[0]["seconds"]]
            lines.append(Line("two hops", x, [row["two_hops"] * 1e3 for row in some], limit=True))
            panels.append((f"{title.format(fixed)}, {size} numbers", lines))
        ticks = sorted({float(row[along]) for row in chosen})
        labels = ("latency one way, ms" if name == "latency" else "ranks", "milliseconds")
        plot_lines(panels, out / f"allreduce-{name}.svg", labels, "--out", ticks=ticks)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Every way of adding over the ranks, in an emulated home.")
    parser.add_argument("--ranks", default="2,4,8", help="default %(default)s")
    parser.add_argument("--latency", default="0.3,1,2,5", help="ms one way (default %(default)s)")
    parser.add_argument("--bandwidth", help="of each link, 300Mbit/s say (default: none set)")
    parser.add_argument("--mpi", default="openmpi,mpich", help="default %(default)s")
    parser.add_argument("--sizes", default="8192,1048576", help="numbers (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds of each run (default %(default)s)")
    parser.add_argument("--out", type=Path, help="draw the pictures into this folder")
    parser.add_argument("--json", type=Path, help="write all that was measured")
    options = parser.parse_args()
    rows = sweep(options)
    print_tables(rows)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    if options.out is not None:
        draw(rows, options.out)


if __name__ == "__main__":
    main()
