"""Where rows of experiments run: in an emulated home of their own, or on machines that a launcher reaches."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.experiments.models import FOLDER, Models
from bench.experiments.rows import Row
from bench.home import Home
from bench.home.devices import Device, Link, equal_devices, parse_bandwidth, parse_duration
from bench.limits import Group
from tpimpi.errors import TpimpiError

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 5.0  # for a launcher to end
Figures = dict[str, Any]


class RunError(TpimpiError):
    """A run ended otherwise than it should."""


@dataclass(frozen=True)
class Site:
    """Where rows run: the work folder, and the launcher's words if it is not an emulated home ("mpirun -np {ranks} …")."""

    work: Path
    launch: str = ""

    @property
    def models(self) -> Models:
        return Models(self.work / FOLDER)

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """For the files of one run, where all machines see it."""
        self.work.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.work)


def devices_of(row: Row, folder: Path) -> list[Device]:
    """The row's devices, with its limits; `folder` is on the disk whose reading is limited, that of the slices."""
    return [
        Device(
            device.name,
            cores=row.cores,
            memory=row.memory_bytes,
            read_bps=row.read_bps,
            cache=folder / device.name if row.read_bps else None,  # the limit is that of the cache's disk
        )
        for device in equal_devices(row.devices)
    ]


def link_of(row: Row) -> Link:
    """The row's link."""
    latency = parse_duration(row.latency, "latency") if row.latency else 0.0
    return Link(latency, 0.0, parse_bandwidth(row.bandwidth, "bandwidth") if row.bandwidth else None)


@dataclass(frozen=True)
class FinishedRun:
    """How a run ended; `groups` are its devices', read before they were removed."""

    code: int
    out: str
    err: str
    peaks: list[int | None]
    hits: int


def finish(process: subprocess.Popen[str], timeout: float) -> tuple[int, str, str]:
    """Exit code, output and errors of the process; killed after `timeout` seconds. Raises RunError then."""
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        process.terminate()  # so that the launcher ends its ranks
        try:
            process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunError(f"it took over {timeout:.0f} s") from None
        raise
    return process.returncode, out, err


def run(row: Row, site: Site, arguments: Sequence[str], stdin: Path | None = None) -> FinishedRun:
    """tpimpi with these arguments, a rank on each of the row's devices. Raises RunError where it takes too long."""
    command = [sys.executable, "-m", "tpimpi", *arguments]
    if stdin is not None:  # not by way of the launcher: some never say that it ends
        command = ["sh", "-c", 'exec "$@" <"$0"', str(stdin), *command]
    timeout = 300 + 5 * row.expected_s
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    if site.launch:
        words = shlex.split(site.launch.replace("{ranks}", str(row.devices)))
        process = subprocess.Popen([*words, *command], start_new_session=True, **pipes)
        return FinishedRun(*finish(process, timeout), [], 0)
    with site.folder() as folder, Home(devices_of(row, Path(folder)), link_of(row)) as home:
        process = home.mpirun(command, mpi=row.mpi, **pipes)
        code, out, err = finish(process, timeout)
        groups: list[Group] = [group for group in home.groups if group is not None]
        limited = [group for group in groups if row.memory_bytes]
        return FinishedRun(
            code, out, err, [group.peak() for group in groups], sum(group.limit_hits() for group in limited)
        )


def last_line(text: str) -> str:
    """Of what a run printed, the last line of ours, or the last of all; for a message."""
    lines = [line for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("tpimpi", "r0", "r1", "error"))]
    return (ours or lines or ["it said nothing"])[-1][:300]
