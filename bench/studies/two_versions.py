"""Two checkouts of tpimpi on the same model, in turn: the median ratio of their times, with its 95 % interval.

    python -m bench.studies.two_versions OLD NEW --model 1b.gguf --ranks 2

OLD and NEW are checkouts with an environment in .venv. A pair is a run of each, the one that begins changing from pair to
pair; a ratio is NEW's time by OLD's, so under 1 is faster. The interval is that of the median by order statistics, which
assumes nothing of how times are distributed. Memory is the difference of the peaks of each rank, its median over the pairs.
Each version reads the slices that OLD made, where it can.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

WORDS = "the quick brown fox jumps over the lazy dog and "


@dataclass(frozen=True)
class Run:
    """What one run took: seconds a token (median of the gaps), seconds of the prompt, and bytes of each rank's peak."""

    decode_s: float
    prompt_s: float
    peak_bytes: list[int]


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """The interval of the median at this confidence, by order statistics; the whole range where there are too few values.

    The d-th least and the d-th greatest of n values have the median between them with probability
    1 - 2 P(binomial(n, 1/2) < d).
    """
    ordered, n = sorted(values), len(values)
    d, outside = 0, 2 / 2**n
    while outside <= 1 - confidence:
        d += 1
        outside += 2 * comb(n, d) / 2**n
    return ordered[max(d, 1) - 1], ordered[n - max(d, 1)]


class Version:
    """A checkout, and the runs that it makes."""

    def __init__(self, checkout: Path, options: argparse.Namespace, work: Path) -> None:
        self.checkout, self.work = checkout.resolve(), work
        self.ranks: int = options.ranks
        self.arguments = ["--raw", "--ignore-eos", "--quiet", "--max-tokens", str(options.tokens), "--threads", "1"]
        self.arguments += ["--memory", options.memory] if options.memory else []
        if any('"--speculate"' in path.read_text() for path in (self.checkout / "src/tpimpi").rglob("*.py")):
            self.arguments += [
                "--speculate",
                "off",
            ]  # times of a token, which a random text that repeats would not show
        self.model: Path | None = options.model

    def run(self, prompt: Path) -> Run:
        report = self.work / "report.json"
        model = ["--model", str(self.model.resolve())] if self.model else []
        command = [".venv/bin/mpirun", "-np", str(self.ranks), "--hostfile", "hostfiles/local.txt", ".venv/bin/python"]
        command += ["-m", "tpimpi", *model, *self.arguments, "--prompt-file", str(prompt), "--report", str(report)]
        env = {**os.environ, "TPIMPI_CACHE": str(self.work / "cache"), "OMP_NUM_THREADS": "1"}
        env |= {
            "PRTE_MCA_hwloc_default_binding_policy": "none",
            "PATH": f"{self.checkout}/.venv/bin:{os.environ['PATH']}",
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile modules anew would cost each run time and memory
        if os.geteuid() == 0:
            env |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
        subprocess.run(
            command,
            check=True,
            cwd=self.checkout,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=600,
        )
        return read(json.loads(report.read_text()))


def read(report: dict[str, Any]) -> Run:
    """What a report tells; both versions are read by the median of the gaps, which every version writes."""
    return Run(report["s_per_token"], report["ttft_s"], [rank["peak_rss_bytes"] for rank in report["ranks"]])


def line(name: str, ratios: Sequence[float], what: str = "new / old") -> str:
    low, high = interval(ratios)
    return f"{name:8} {what}: median {median(ratios):.3f}, 95 % interval {low:.3f} to {high:.3f}, {len(ratios)} pairs"


def add_runs(parser: argparse.ArgumentParser) -> None:
    """What is run in each pair, and how many pairs."""
    parser.add_argument("--model", type=Path, help="a GGUF file or folder (default: SmolLM2)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="that are made after the prompt")
    parser.add_argument("--prompt-words", type=int, default=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, metavar="OLD")
    parser.add_argument("new", type=Path, metavar="NEW")
    add_runs(parser)
    parser.add_argument("--memory", help="of each rank, as of a run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prompt = work / "prompt.txt"
        prompt.write_text(" ".join((WORDS * options.prompt_words).split()[: options.prompt_words]))
        versions = {name: Version(getattr(options, name), options, work) for name in ("old", "new")}
        for version in versions.values():
            version.run(prompt)  # makes the slices, and warms up
        pairs: list[tuple[Run, Run]] = []
        for number in range(options.pairs):
            order = ("old", "new") if number % 2 == 0 else ("new", "old")
            runs = {name: versions[name].run(prompt) for name in order}
            pairs.append((runs["old"], runs["new"]))
            ratios = [getattr(runs["new"], name) / getattr(runs["old"], name) for name in ("decode_s", "prompt_s")]
            print(f"pair {number + 1:2}: decode {ratios[0]:.3f}, prompt {ratios[1]:.3f}", flush=True)
    for name in ("decode_s", "prompt_s"):
        print(line(name.removesuffix("_s"), [getattr(new, name) / getattr(old, name) for old, new in pairs]))
    for rank in range(options.ranks):
        more = median(new.peak_bytes[rank] - old.peak_bytes[rank] for old, new in pairs)
        print(f"memory   r{rank}: {more / 1e6:+.1f} MB (median of the differences)")
    old, new = median(a.decode_s for a, _ in pairs), median(b.decode_s for _, b in pairs)
    print(f"s/token  old {old:.4f}, new {new:.4f} (medians)")


if __name__ == "__main__":
    main()
