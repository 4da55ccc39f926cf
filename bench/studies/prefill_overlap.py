"""What it gives to compute one half of a prompt while the sum of the other is under way: the time to the first token.

    python -m bench.studies.prefill_overlap [--hosts 4] [--cores 0.5] [--latency 2ms] [--bandwidth 300Mbit/s]
                                            [--allreduce auto] [--rounds 3] [--mpi openmpi]

A model of 1B shape, q4_0, and a prompt of 128 positions, on hosts of an emulated home with half a core each; in turn as it
is, and with each chunk whole. With `--whole` first it is what the ranks run for that. Needs root, and 3 GB of disk in
--folder for the slices, which are those of plan_accuracy.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median

from bench.home import Home
from bench.home.devices import Link, equal_devices, parse_bandwidth, parse_duration
from bench.studies.plan_accuracy import make_slices

POSITIONS = 128
RUN_TIMEOUT_S = 300.0


def whole() -> None:
    """Run tpimpi with chunks that are never halved."""
    from tpimpi.cli.main import main
    from tpimpi.engine import overlap

    overlap.OVERLAP_MIN_POSITIONS = sys.maxsize
    main(sys.argv[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=4)
    parser.add_argument("--cores", type=float, default=0.5)
    parser.add_argument("--latency", default="2ms")
    parser.add_argument("--bandwidth", default="300Mbit/s")
    parser.add_argument("--allreduce", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp/tpimpi-plan-accuracy"))
    options = parser.parse_args()
    make_slices(options.folder, options.hosts)
    devices = [replace(device, cores=options.cores) for device in equal_devices(options.hosts)]
    link = Link(
        parse_duration(options.latency, "--latency"), bandwidth=parse_bandwidth(options.bandwidth, "--bandwidth")
    )
    programs = {"halves": ["-m", "tpimpi"], "whole": ["-m", "bench.studies.prefill_overlap", "--whole"]}
    found: dict[str, list[float]] = {name: [] for name in programs}
    with Home(devices, link) as home:
        prompt, report = home.folder / "prompt.txt", home.folder / "report.json"
        prompt.write_text(" ".join(map(str, range(100, 100 + POSITIONS))))
        arguments = ["--slices", str(options.folder), "--raw", "--prompt-file", str(prompt), "--ignore-eos", "--quiet"]
        arguments += ["--max-tokens", "2", "--context", str(POSITIONS + 64), "--threads", "1"]
        arguments += ["--allreduce", options.allreduce, "--report", str(report)]
        for number in range(options.rounds + 1):  # the first warms up
            for name, program in programs.items():
                command = [sys.executable, *program, *arguments]
                process = home.mpirun(command, ranks=options.hosts, mpi=options.mpi, stdout=subprocess.DEVNULL)
                if process.wait(RUN_TIMEOUT_S):
                    raise SystemExit(f"{name}: exit code {process.returncode}")
                if number:
                    found[name].append(json.loads(report.read_text())["ttft_s"])
    halves, entire = median(found["halves"]), median(found["whole"])
    print(
        f"{options.hosts} hosts of {options.cores:g} cores, {options.latency} one way, {options.bandwidth}, "
        f"--allreduce {options.allreduce}, {options.mpi}: first token after {halves:.3f} s, with whole chunks "
        f"{entire:.3f}, {halves / entire:.2f} times"
    )


if __name__ == "__main__":
    whole() if sys.argv[1:2] == ["--whole"] else main()
