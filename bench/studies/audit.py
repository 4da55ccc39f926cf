"""Audits: how soon faults are found, what audits cost, and whether there are false alarms.

    python -m bench.studies.audit faults [--ranks 4] [--rounds 20] [--model FILE] [--kernels LEVELS]
    python -m bench.studies.audit cost   [--ranks 4] [--rounds 20] [--tokens 200]
    python -m bench.studies.audit alarms [--ranks 4] [--tokens 100000] [--format q4_0]

`faults` puts each fault into the last rank and counts tokens until the run would end, at the default rate: the median and
the worst of the rounds. `cost` is the time of a token with audits at the default rate, and pinned tiles checked again,
against without, in pairs in turn. `alarms` audits every sum of many steps with all tiles of all ranks, which compute with
kernels of other levels than rank 0: each of the levels that this processor has is rank 0's once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bench.studies.two_versions import interval
from tpimpi._native import levels
from tpimpi.weights.locations import model_path
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
RUN_TIMEOUT_S = 3600


def run_ranks(options: argparse.Namespace, slices: Path, kernels: list[str]) -> Any:
    """What rank 0 of one launch found."""
    job = {"model": str(model_path(options.model)), "slices": str(slices), "kernels": kernels, "rate": options.rate}
    job |= {"rounds": options.rounds, "tokens": options.tokens, "what": options.what}
    command = ["mpirun", "-np", str(options.ranks), "--hostfile", str(ROOT / "hostfiles" / "local.txt"), sys.executable]
    command += ["-m", "bench.studies.audit_ranks", json.dumps(job)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=RUN_TIMEOUT_S, cwd=ROOT, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_faults(found: dict[str, list[tuple[int, str]]]) -> None:
    """A row for each fault."""
    print("| fault | tokens until found, median | worst | not found | found by |\n|---|---|---|---|---|")
    for fault, rounds in found.items():
        tokens, missed = [tokens for tokens, _ in rounds], sum(not said for _, said in rounds)
        ways = {
            "checksum": "the tile's checksum",
            "the sum of": "the sum",
            "gives other numbers": "the tile computed again",
        }
        by = {name for key, name in ways.items() for _, said in rounds if key in said}
        print(f"| {fault} | {median(tokens):.0f} | {max(tokens)} | {missed} | {', '.join(sorted(by))} |")


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "cost", "alarms"))
    parser.add_argument("--model", help="default: SmolLM2")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--tokens", type=int, help="at most, in a round; of a run of a pair; or audits in all")
    parser.add_argument("--kernels", help="a level for each rank, with commas between (default: the best on all)")
    parser.add_argument("--rate", type=float, help="default: auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.tokens = options.tokens or {"faults": 5000, "cost": 200, "alarms": 100_000}[options.what]
    given = options.kernels.split(",") if options.kernels else ["auto"] * options.ranks
    found: Any = {}
    with (
        tempfile.TemporaryDirectory(prefix="tpimpi-audit-") as folder,
        open_source(model_path(options.model)) as source,
    ):
        slices = Path(folder)
        formats = choose_formats(source, options.format)
        slice_model(source, make_partition(source.config, [1] * options.ranks), formats, slices)
        if options.what != "alarms":
            found = run_ranks(options, slices, given)
        else:
            there = levels()
            options.tokens = -(-options.tokens // len(there))
            for first in range(len(there)):
                turned = [there[(first + rank) % len(there)] for rank in range(options.ranks)]
                found[turned[0]] = {"levels": turned, **run_ranks(options, slices, turned)}
                print(found[turned[0]], file=sys.stderr, flush=True)
    if options.what == "faults":
        print_faults(found)
    elif options.what == "cost":
        low, high = interval(found)
        print(
            f"time of a token with audits against without: {median(found):.4f} ({low:.4f} to {high:.4f}), {len(found)} pairs"
        )
    else:
        for level, of in found.items():
            print(level, json.dumps(of))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
