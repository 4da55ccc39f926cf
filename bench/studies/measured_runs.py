"""Runs of tpimpi, measured beside the disk, in control groups where there are any; for memory_scheduler and pressure."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.limits import Group, RankGroups, available
from tpimpi.diagnostics.bench.disk import BUFFERED, DIRECT
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "1 2 3 4 5 6 7 8"  # token ids: slices of synth have no tokenizer
PROGRAM = ("-m", "tpimpi")
MIB = 1 << 20
RUN_TIMEOUT_S = 3600
SPARE_BYTES = 5 * 10**9  # of the disk, left free beside slices
Values = dict[str, Any]


class RefusedError(Exception):
    """A run said that its budget is too small; `least` is the budget that it asked for, as --memory takes it."""

    def __init__(self, least: str) -> None:
        super().__init__(f"refused: at least {least}")
        self.least = least


# Runs


@dataclass
class Setup:
    """What all runs of an experiment have in common. `tile` in bytes."""

    slices: Path
    ranks: int
    tokens: int
    context: int
    seconds: float  # of each measurement of the disk
    tile: int = 8 * MIB
    json: Path | None = None
    found: Values = field(default_factory=dict)

    def note(self, **values: Any) -> None:
        """Add to what is written as JSON, and write it."""
        for name, value in values.items():
            if isinstance(value, list) and isinstance(self.found.get(name), list):
                self.found[name] += value
            else:
                self.found[name] = value
        if self.json is not None:
            self.json.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def run(
        self,
        *options: str,
        inside: RankGroups | None = None,
        around: Group | None = None,
        program: Sequence[str] = PROGRAM,
        prompt: Sequence[str] = ("--prompt", PROMPT),
    ) -> Values:
        """The report of a run with these options, each rank in its group of `inside`, the whole job in `around`.

        Raises RefusedError; anything else that goes wrong ends the experiment.
        """
        mpirun = shutil.which("mpirun")
        if mpirun is None:
            sys.exit("no mpirun: source .venv/bin/activate")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            command = [sys.executable, *program, "--slices", str(self.slices), "--raw", *prompt]
            command += ["--ignore-eos", "--max-tokens", str(self.tokens), "--context", str(self.context)]
            command += ["--speculate", "off", "--report", str(report), "--quiet", *options]
            if inside is not None:
                command = inside.command(command)
            hostfile = str(ROOT / "hostfiles" / "local.txt")
            command = [mpirun, "-np", str(self.ranks), "--hostfile", hostfile, *command]
            done = _call(command if around is None else around.command(command))
            if done.returncode == 2 and (match := re.search(r"at least ([\d.]+ ?[kMGT]?i?B)", done.stderr)):
                raise RefusedError(match[1].replace(" ", ""))
            if done.returncode != 0:
                sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stderr}")
            result: Values = json.loads(report.read_text(encoding="utf-8"))
            return result

    def disk(self, around: Group | None = None) -> Values:
        """What `bench disk` says, with a reader for each rank."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "disk.json")
            command = [sys.executable, *PROGRAM, "bench", "disk", str(self.slices), "--readers", str(self.ranks)]
            command += ["--size", str(self.tile), "--seconds", str(self.seconds), "--json", str(report)]
            done = _call(command if around is None else around.command(command))
            if done.returncode != 0:
                sys.exit(f"bench disk ended with exit code {done.returncode}:\n{done.stderr}")
            found: Values = json.loads(report.read_text(encoding="utf-8"))
            return found

    def smallest(self) -> str:
        """The smallest budget that a run accepts, as --memory takes it."""
        budget = "1M"
        for _ in range(2 * self.ranks + 2):
            try:
                self.run("--memory", budget, "--max-tokens", "1")
                return budget
            except RefusedError as refused:
                budget = refused.least
        sys.exit(f"no smallest budget: {budget} was named by a refusal, and refused")


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=RUN_TIMEOUT_S
    )


def prepare(options: argparse.Namespace, shape: str, ranks: int, needed: int) -> tuple[Setup, bool]:
    """The setup, with slices of `needed` bytes made where there are none; and whether they were made."""
    folder: Path = options.slices
    missing = [rank for rank in range(ranks) if not (folder / slice_name(rank, ranks)).exists()]
    if missing:
        place = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
        free = shutil.disk_usage(place).free
        if free < needed + SPARE_BYTES:
            sys.exit(
                f"{place} has {free / 1e9:.1f} GB free, the slices take {needed / 1e9:.1f}, and {SPARE_BYTES / 1e9:.0f} are "
                "left to others; give --slices elsewhere"
            )
        command = [sys.executable, *PROGRAM, "synth", "--shape", shape, "--ranks", str(ranks), "--format", "q4_0"]
        subprocess.run([*command, "--out", str(folder)], check=True, stdin=subprocess.DEVNULL)
    setup = Setup(folder, ranks, options.tokens, options.context, options.seconds, json=options.json)
    setup.tile = common_tile(folder / slice_name(0, ranks))
    why = available()
    setup.note(
        machine={"system": platform.platform(), "cores": len(os.sched_getaffinity(0))},
        slices=str(folder),
        ranks=ranks,
        tokens=options.tokens,
        context=options.context,
        tile_bytes=setup.tile,
        groups=why is None,
        runs=[],
    )
    if why is not None:
        print(f"without control groups, so without limits: {why}", file=sys.stderr)
    return setup, bool(missing)


def common_tile(path: Path) -> int:
    """Bytes of a read for `bench disk`: the size that most of the streamed bytes have, from 1 to 64 MiB."""
    file = SliceFile(path)
    sizes: Counter[int] = Counter()
    for record in file.records:
        if record.block.kind in ("attn", "mlp", "head"):
            sizes[record.nbytes // 4096 * 4096] += record.nbytes
    file.close()
    return min(max(sizes.most_common(1)[0][0], MIB), 64 * MIB)


@contextlib.contextmanager
def groups_of(setup: Setup, memory: int | list[int] | None) -> Iterator[RankGroups | None]:
    """A group for each rank, with this limit, or each with its own, where there are groups."""
    if not setup.found["groups"]:
        yield None
        return
    with RankGroups(f"tpimpi-{os.getpid()}", setup.ranks, memory=memory) as groups:
        yield groups


def direct_rate(disk: Values) -> float:
    """Bytes a second of O_DIRECT with the number of reads in flight that suits it; without O_DIRECT of what there is."""
    rates = {how: [float(row["rate"]) for row in disk["rows"] if row["how"] == how] for how in (DIRECT, BUFFERED)}
    return max(rates[DIRECT] or rates[BUFFERED])


def figures(
    report: Values, groups: RankGroups | None = None, disks: Sequence[Values] = (), read_bps: int | None = None
) -> Values:
    """What is of interest in a report, in what the groups say, and of the disk before and after.

    `read_bps` is what the disk was limited to: the kernel lets each short measurement read a little more than that.
    """
    ranks = report["ranks"]
    streamed = sum(rank["streamed_bytes_per_token"] for rank in ranks)
    found = {
        "s_per_token": report["s_per_token"],
        "ttft_s": report["ttft_s"],
        "token_ids": report["token_ids"],
        "streamed_bytes_per_token": streamed,
        "ranks": [{name: value for name, value in rank.items() if name != "timeline"} for rank in ranks],
        "peak_rss_bytes": max(rank["peak_rss_bytes"] for rank in ranks),
    }
    if groups is not None:
        found["group_peak_bytes"] = [group.peak() for group in groups.groups]
        found["limit_hits"] = [group.limit_hits() for group in groups.groups]
    if disks:
        found["disk_bytes_per_s"] = [min(direct_rate(disk), read_bps or float("inf")) for disk in disks]
        found["disks"] = [disk["rows"] for disk in disks]
        found["reading_s"] = streamed / (sum(found["disk_bytes_per_s"]) / len(disks))
        found["of_disk"] = found["s_per_token"] / found["reading_s"] if streamed else None
    return found


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table, on stdout."""
    table = Table(box=None, pad_edge=False, header_style="none")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    print(f"\n{title}\n", flush=True)
    Console(width=160, highlight=False, color_system=None).print(table)


def mb(nbytes: float | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e6:.0f}"


def peaks(found: Values) -> str:
    """The highest peak of the ranks' groups, in MB, or "-"."""
    known = [peak for peak in found.get("group_peak_bytes", []) if peak is not None]
    return mb(max(known)) if known else "-"


def median_of(runs: Sequence[Values], name: str) -> float | None:
    """Median of the runs' figures that are there."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return median(values) if values else None
