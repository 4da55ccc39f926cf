"""What ranks cost while a user thinks, and how soon they start again; over the emulated home, as root.

    python -m bench.studies.idle [--ranks 4] [--seconds 10] [--rounds 30] [--latency 0.3ms] [--mpi openmpi]

Of a real run that has answered a prompt and waits for the next: processor time of each rank, in parts of a core. Then of
ranks that wait for a command as they do there: how long after rank 0 sent it (all devices share this machine's clock) the
last of them has it. With `--answering` first it is what those ranks run.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from statistics import median
from typing import Any

import psutil

from bench.home import Home
from bench.home.devices import Link, parse_duration
from bench.home.faults.screen import rank_process

PROMPT = "Tell me of the sea, and of those who live by it."
PAUSES_S = (0.3, 1.0)  # before each command, at least and at most


def answer(rounds: int) -> None:
    """One rank: wait for commands, and tell when each came."""
    from tpimpi.engine.protocol import Operation, StepHeader, receive_header, send_header
    from tpimpi.star import connect

    star = connect()
    star.measure_links()
    delays = []
    for _ in range(rounds):
        if star.rank.is_hub:
            time.sleep(random.uniform(*PAUSES_S))
            sent = time.monotonic()
            send_header(star, StepHeader(Operation.BEGIN))
        else:
            receive_header(star)
        came = [json.loads(note) for note in star.gather_notes(json.dumps(time.monotonic()).encode())]
        delays += [max(came[1:]) - sent] if star.rank.is_hub else []
    if star.rank.is_hub:
        print(json.dumps(delays), flush=True)
    star.close()


def idle_shares(home: Home, options: argparse.Namespace) -> list[float]:
    """Of a core, what each rank of a run takes that waits for a prompt."""

    arguments = ["--max-tokens", "12", "--ignore-eos", "--raw", "--quiet"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = home.mpirun([sys.executable, "-m", "tpimpi", *arguments], ranks=options.ranks, mpi=options.mpi, **pipes)
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(PROMPT + "\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(1.0)
    ranks = [psutil.Process(rank_process(home, rank)) for rank in range(options.ranks)]
    before, began = [sum(rank.cpu_times()[:2]) for rank in ranks], time.monotonic()
    time.sleep(options.seconds)
    spent = [sum(rank.cpu_times()[:2]) - one for rank, one in zip(ranks, before, strict=True)]
    seconds = time.monotonic() - began
    process.communicate(timeout=60)  # it ends with its input
    return [one / seconds for one in spent]


def starts(home: Home, options: argparse.Namespace) -> list[float]:
    """Seconds from each command to the last rank that has it."""
    command = [sys.executable, "-m", "bench.studies.idle", "--answering", str(options.rounds)]
    process = home.mpirun(command, ranks=options.ranks, mpi=options.mpi, stdout=subprocess.PIPE, text=True)
    out, _ = process.communicate(timeout=60 + 2 * options.rounds)
    if process.returncode:
        raise SystemExit(f"the ranks that wait ended with exit code {process.returncode}")
    return list(json.loads(out.splitlines()[0]))


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of waiting (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="commands (default %(default)s)")
    parser.add_argument("--latency", default="0.3ms")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    options = parser.parse_args()
    with Home(options.ranks, Link(latency_s=parse_duration(options.latency, "--latency"))) as home:
        shares, delays = idle_shares(home, options), starts(home, options)
    said = ", ".join(f"r{rank} {100 * share:.1f} %" for rank, share in enumerate(shares))
    print(f"{options.mpi}: waiting for a prompt, of a core: {said}")
    print(
        f"{options.mpi}: from a command to the last rank's start, {options.rounds} times, {options.latency} one way: median "
        f"{median(delays) * 1e3:.1f} ms, longest {max(delays) * 1e3:.1f} ms"
    )


if __name__ == "__main__":
    answer(int(sys.argv[2])) if sys.argv[1:2] == ["--answering"] else main()
