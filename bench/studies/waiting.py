"""What waiting costs: ranks that spin while they wait for the star, beside ranks that sleep; over the emulated home.

    python -m bench.studies.waiting [--cores 0.5] [--latency 2ms] [--ranks 2] [--rounds 3] [--slices DIR] [--mpi openmpi]

Each device has a part of a core. A rank that polls all the time spends it on waiting, and computes later. Without --slices
SmolLM2 is used. With `--spinning` first it is what the ranks run: tpimpi, but polling without a sleep.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from statistics import median

from bench.home import Home
from bench.home.devices import Device, Link, parse_duration

PROMPT = "Tell me of the sea, and of those who live by it."
TOKENS = 32


def spin() -> None:
    """Run tpimpi with waiting that never sleeps."""
    from tpimpi.cli.main import main
    from tpimpi.star import allreduce, channel

    channel._Backoff.sleep = lambda self: os.sched_yield()  # type: ignore[method-assign]
    allreduce.EARLIEST_ANSWER_SHARE = 0.0
    main(sys.argv[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=float, default=0.5)
    parser.add_argument("--latency", default="2ms")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slices")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    options = parser.parse_args()
    devices = [Device(f"device-{rank}", cores=options.cores) for rank in range(options.ranks)]
    found: dict[str, list[float]] = {"sleeping": [], "spinning": []}
    with Home(devices, Link(latency_s=parse_duration(options.latency, "--latency"))) as home:
        prompt, report = home.folder / "prompt.txt", home.folder / "report.json"
        prompt.write_text(PROMPT)
        arguments = ["--prompt-file", str(prompt), "--max-tokens", str(TOKENS), "--ignore-eos", "--raw", "--quiet"]
        arguments += ["--allreduce", "star", "--report", str(report), "--context", "512", "--speculate", "off"]
        if options.slices:
            arguments += ["--slices", options.slices]
        programs = {"sleeping": ["-m", "tpimpi"], "spinning": ["-m", "bench.studies.waiting", "--spinning"]}
        for number in range(options.rounds + 1):  # the first makes the slices
            for name, program in programs.items():
                command = [sys.executable, *program, *arguments]
                process = home.mpirun(command, ranks=options.ranks, mpi=options.mpi, stdout=subprocess.DEVNULL)
                if process.wait(600):
                    raise SystemExit(f"{name}: exit code {process.returncode}")
                seconds = json.loads(report.read_text())["s_per_token"]
                if number:
                    found[name].append(seconds)
                    print(f"round {number} {name}: {seconds:.4f} s/token", file=sys.stderr, flush=True)
    sleeping, spinning = median(found["sleeping"]), median(found["spinning"])
    print(
        f"{options.ranks} devices of {options.cores:g} cores, {options.latency} one way, {options.mpi}: sleeping "
        f"{sleeping:.4f} s/token, spinning {spinning:.4f}, {spinning / sleeping:.2f} times"
    )


if __name__ == "__main__":
    spin() if sys.argv[1:2] == ["--spinning"] else main()
