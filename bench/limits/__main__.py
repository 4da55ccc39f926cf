"""Run a program with less memory, processor or disk than the machine has, in control groups; Linux, as root.

    python -m bench.limits --memory 700M --cpu 0.5 -- COMMAND…
    mpirun -np 2 … python -m bench.limits --each-rank --memory 700M -- python -m tpimpi …

The peak, and how often it was at the limit, go to stderr at the end; the exit code is the command's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from bench.limits.groups import Group
from tpimpi.errors import TpimpiError
from tpimpi.system.units import parse_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", metavar="SIZE", help="such as 700M or 512MiB")
    parser.add_argument("--cpu", type=float, metavar="CORES", help="such as 0.5")
    parser.add_argument("--read-bps", metavar="SIZE", help="bytes a second")
    parser.add_argument(
        "--device", type=Path, metavar="PATH", help="on the disk that --read-bps is for (default: here)"
    )
    parser.add_argument("--each-rank", action="store_true", help="started by mpirun: a group for each rank")
    parser.add_argument("--name", default=f"tpimpi-{os.getpid()}", help="of the group")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND…")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command; give one after --")
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
    if options.each_rank and rank is None:
        parser.error("--each-rank, but mpirun gave no rank")
    try:
        return run_limited(
            command,
            f"{options.name}-r{rank}" if options.each_rank else options.name,
            label=f"limits r{rank}" if options.each_rank else "limits",
            memory=None if options.memory is None else parse_size(options.memory, "--memory"),
            cpu=options.cpu,
            read_bps=None if options.read_bps is None else parse_size(options.read_bps, "--read-bps"),
            device=(options.device or Path()) if options.read_bps else None,
        )
    except TpimpiError as error:
        print(f"limits: {error}", file=sys.stderr)
        return 2


def run_limited(command: Sequence[str], name: str, *, label: str, memory: int | None, **limits: object) -> int:
    """Run `command` in a group of its own, say on stderr what it took, and return its exit code."""
    with Group(name, memory=memory, **limits) as group, _signals_as_exits():  # type: ignore[arg-type]
        # What the launcher hands down stays open: MPICH's ranks find it by a file descriptor.
        process = subprocess.Popen(group.command(command), close_fds=False)
        try:
            code = process.wait()
        finally:
            process.kill()
        peak, hits = group.peak(), group.limit_hits()
    of = "" if memory is None else f" of {memory / 1e6:.0f} MB, {hits} times at the limit"
    print(f"{label}: peak {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'}{of}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as an exception does, so that groups are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
