"""Memory pressure while a run goes on: another program takes memory, holds it, and leaves; Linux, as root.

    python -m bench.studies.pressure --slices DIR

DIR gets the slices if it has none: Llama 2 7B's shape, q4_0, 2 ranks, 3.9 GB. A run with `--memory auto` and the other
program share a control group with a limit. Shown are how fast the pinned tiles were given back, how fast tokens came before,
meanwhile and after, whether anything was killed or at the limit, and whether the tokens are those of a run by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from bench.limits import Group, LimitError
from bench.studies.measured_runs import PROGRAM, PROMPT, ROOT, Values, mb, prepare
from tpimpi.system.units import parse_size

# Takes the bytes that it is told, says so, and keeps them for the seconds that it is told.
HOG = """
import mmap, sys, time
nbytes, page = int(sys.argv[1]), b"x" * (1 << 20)
memory = mmap.mmap(-1, nbytes)
for start in range(0, nbytes, len(page)):
    memory[start : start + len(page)] = page[: nbytes - start]
print("taken", flush=True)
time.sleep(float(sys.argv[2]))
"""
SETTLE_S = 3.0  # for which the group has not grown


class Run:
    """A run in a group, whose tokens are timed as they come."""

    def __init__(self, slices: Path, ranks: int, tokens: int, report: Path, group: Group) -> None:
        mpirun = shutil.which("mpirun") or sys.exit("no mpirun: source .venv/bin/activate")
        command = [mpirun, "-np", str(ranks), "--hostfile", str(ROOT / "hostfiles" / "local.txt"), sys.executable]
        command += [*PROGRAM, "--slices", str(slices), "--raw", "--prompt", PROMPT, "--ignore-eos", "--quiet"]
        command += ["--max-tokens", str(tokens), "--context", "512", "--speculate", "off"]
        command += ["--report", str(report)]
        self.process = subprocess.Popen(group.command(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        self.times: list[float] = []  # at which tokens came
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 4096):
            self.times += [time.monotonic()] * data.count(b" ")

    def end(self) -> int:
        code = self.process.wait()
        self._thread.join()
        return code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=Path, required=True, metavar="DIR", help="made if there are none")
    parser.add_argument("--limit", default="5.5G", metavar="SIZE", help="of the group (default 5.5G)")
    parser.add_argument("--take", default="2.5G", metavar="SIZE", help="what the other program takes (default 2.5G)")
    parser.add_argument("--hold", type=float, default=10.0, metavar="S", help="how long it keeps it (default 10)")
    parser.add_argument("--tokens", type=int, default=150)
    options = parser.parse_args()
    options.context, options.seconds, options.json = 512, 1.0, None
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    setup, _ = prepare(options, "llama-2-7b", 2, 4 * 10**9)
    alone = setup.run("--max-tokens", str(options.tokens))["token_ids"]
    try:
        with Group(f"tpimpi-pressure-{os.getpid()}", memory=parse_size(options.limit, "--limit")) as group:
            measure(setup.slices, group, options, alone)
    except LimitError as error:
        sys.exit(str(error))


def measure(slices: Path, group: Group, options: argparse.Namespace, alone: Sequence[int]) -> None:
    take = parse_size(options.take, "--take")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        run = Run(slices, 2, options.tokens, report, group)
        wait_until_settled(group, run)
        began = time.monotonic()
        hog = subprocess.Popen(
            group.command([sys.executable, "-c", HOG, str(take), str(options.hold)]), stdout=subprocess.PIPE
        )
        assert hog.stdout is not None
        hog.stdout.readline()
        taken = time.monotonic()
        hog_code = hog.wait()
        left = time.monotonic()
        code = run.end()
        found: Values = json.loads(report.read_text(encoding="utf-8"))
    print(
        f"the other program took {mb(take)} MB in {taken - began:.2f} s, kept it {left - taken:.1f} s: exit code {hog_code}"
    )
    for rank in found["ranks"]:
        before, least, seconds, after = given_back(rank["timeline"])
        print(
            f"r{rank['rank']}: pinned {mb(before)} MB, down to {mb(least)} MB within {seconds:.1f} s of the first that "
            f"was given back, {mb(after)} MB at the end"
        )
    spans = {"before": (0.0, began), "meanwhile": (taken, left), "after": (left, float("inf"))}
    for name, (start, stop) in spans.items():
        times = [moment for moment in run.times if start <= moment <= stop]
        gaps = [b - a for a, b in itertools.pairwise(times)]
        print(f"{name}: {len(times)} tokens, {median(gaps):.3f} s/token" if gaps else f"{name}: too few tokens")
    same = "the tokens are those of a run by itself" if found["token_ids"] == alone else "OTHER TOKENS than by itself"
    print(f"run: exit code {code}; at the limit {group.limit_hits()} times, peak {mb(group.peak())} MB; {same}")


def wait_until_settled(group: Group, run: Run) -> None:
    """Until everything that is to be pinned is."""
    usage, since = 0, time.monotonic()
    while run.process.poll() is None and (len(run.times) < 2 or time.monotonic() - since < SETTLE_S):
        time.sleep(0.2)
        if (now := group.usage()) > usage * 1.01:
            usage, since = now, time.monotonic()


def given_back(timeline: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    """Of [seconds, resident, pinned, buffers]: pinned at most, the least later, seconds to about there, at the end."""
    most = max(point[2] for point in timeline)
    last_full = next(i for i, point in enumerate(timeline) if point[2] == most)
    while last_full + 1 < len(timeline) and timeline[last_full + 1][2] == most:
        last_full += 1
    later = timeline[last_full:]
    least = min(point[2] for point in later)
    at_least = next(point for point in later if point[2] <= least * 1.02)
    return most, least, at_least[0] - later[0][0], timeline[-1][2]


if __name__ == "__main__":
    main()
