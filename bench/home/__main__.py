"""The emulated home as a command; Linux, as root.

    python -m bench.home run [--devices FILE.toml|N] [-n N] [--latency 2ms] [--jitter 0.2ms] [--bandwidth 300Mbit/s]
                             [--mpi openmpi|mpich] [--mpirun "--mca …"] [--keep DIR] [--timeout S] -- python -m tpimpi …
    python -m bench.home ping [--devices …] [--latency …] …      round trips between the first two devices, beside the wish
    python -m bench.home clean                                   removes what runs that were killed have left

Rank r runs on device r, and mpirun on device 0. Standard input, output and error pass through; the exit code is mpirun's.
At the end, also after Ctrl-C, SIGTERM or an error, all of it is removed; what a run left that was killed with SIGKILL
goes with the next run, or with `clean`. Two homes may stand at once.

With `--keep DIR` the devices' folders stay in DIR, with slices in their caches (but not those with a disk of their own).
All devices share this machine's processors: with more ranks than cores, those that spin while they wait slow the others.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

from bench.home.devices import Link, equal_devices, parse_bandwidth, parse_duration, read_devices
from bench.home.home import Home
from bench.home.sweep import clean
from tpimpi.errors import InputError, TpimpiError

GRACE_S = 10.0  # for mpirun to end after a signal


class _Signals:
    """While mpirun runs the first signal goes to it, and the second ends everything; else a signal ends this program."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[Any] | None = None
        self.from_terminal = False  # mpirun is in our process group, so Ctrl-C reaches it without us
        self.deadline: float | None = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.process is None or self.deadline is not None:
            for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # nothing breaks off the cleaning
                signal.signal(other, signal.SIG_IGN)
            sys.exit(128 + number)
        self.deadline = time.monotonic() + GRACE_S
        if not (self.from_terminal and number == signal.SIGINT):
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)


def _in_foreground() -> bool:
    """Whether standard input is a terminal, and this program in its foreground."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):  # no terminal, or closed
        return False


def _run(options: argparse.Namespace, home: Home, signals: _Signals) -> int:
    end = None if options.timeout is None else time.monotonic() + options.timeout
    # mpirun reads a terminal only in its foreground: so it stays in this program's session and process group there.
    signals.from_terminal = terminal = _in_foreground()
    process = home.mpirun(
        options.command,
        ranks=options.ranks,
        mpi=options.mpi,
        options=shlex.split(options.mpirun or ""),
        start_new_session=not terminal,
    )
    signals.process = process
    while True:
        try:
            code = process.wait(0.2)
            return code if code >= 0 else 128 - code
        except subprocess.TimeoutExpired:
            if signals.deadline is not None and time.monotonic() > signals.deadline:
                print(f"home: mpirun did not end within {GRACE_S:.0f} s of the signal; killed", file=sys.stderr)
                return 137
            if end is not None and time.monotonic() > end:
                print(f"home: mpirun took over {options.timeout:g} s; killed", file=sys.stderr)
                return 124


def _seconds(text: str) -> float:
    if not 0 < (seconds := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"is {text}, must be more than 0 seconds")
    return seconds


def _ping(home: Home, link: Link) -> None:
    if len(home.names) < 2:
        raise InputError("ping needs two devices; give --devices 2, or more")
    home.ping(0, 1, 3)
    home.traffic()
    trips = home.ping(0, 1, 200, 0.005)
    seen = home.traffic()
    if trips:
        print(
            f"{home.names[0]} to {home.names[1]}: {2e3 * link.latency_s:.3f} ms wished; median {1e3 * median(trips):.3f}, "
            f"least {1e3 * min(trips):.3f}, most {1e3 * max(trips):.3f} ms of {len(trips)}; frames left "
            f"{seen.mean_late_us:.0f} us too late, at most {seen.max_late_us:.0f}"
        )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "ping", "clean"))
    parser.add_argument("--devices", default="4", metavar="FILE.toml|N", help="or so many equal ones (default 4)")
    parser.add_argument("-n", dest="ranks", type=int, metavar="N", help="ranks (default: one for each device)")
    parser.add_argument("--latency", metavar="TIME", help="one way, such as 2ms")
    parser.add_argument("--jitter", metavar="TIME", help="more or less, such as 0.2ms")
    parser.add_argument("--bandwidth", metavar="RATE", help="each way, such as 300Mbit/s")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--mpirun", metavar="OPTIONS", help="more options for mpirun, as one text")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the devices' own folders there")
    parser.add_argument("--timeout", type=_seconds, metavar="S", help="kill it after so many seconds; exit code 124")
    argv = sys.argv[1:]
    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.command = argv[at + 1 :]
    if options.what == "run" and not options.command:
        parser.error("no command; give one after --")
    return options


@contextlib.contextmanager
def _home(options: argparse.Namespace) -> Iterator[tuple[Home, Link]]:
    if options.devices.isdecimal():
        devices, link = equal_devices(int(options.devices)), Link()
    else:
        devices, link = read_devices(Path(options.devices))
    if options.latency is not None:
        link = replace(link, latency_s=parse_duration(options.latency, "--latency"))
    if options.jitter is not None:
        link = replace(link, jitter_s=parse_duration(options.jitter, "--jitter"))
    if options.bandwidth is not None:
        link = replace(link, bandwidth=parse_bandwidth(options.bandwidth, "--bandwidth"))
    with Home(devices, link, keep=options.keep) as home:
        yield home, link


def main() -> int:
    options = _options()
    signals = _Signals()
    try:
        if options.what == "clean":
            for name in clean():
                print(f"home: removed {name}", file=sys.stderr)
            return 0
        with _home(options) as (home, link):
            if options.what == "ping":
                _ping(home, link)
                return 0
            try:
                return _run(options, home, signals)
            finally:
                signals.process, signals.deadline = None, None
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_IGN)
    except TpimpiError as error:
        print(f"home: {error}", file=sys.stderr)
        return error.exit_code
    except (OSError, ValueError, RuntimeError) as error:  # a folder, a size or a text that the system refuses
        print(f"home: {error}; give another", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
