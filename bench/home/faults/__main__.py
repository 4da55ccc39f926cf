"""Things that break in a home cluster, each tried many times over the emulated home; Linux, as root.

    python -m bench.home.faults [--rounds 20] [--mpi openmpi] [--kinds kill-decode,cut] [--silence 8] [--json FILE]

Every round starts four ranks on four devices and breaks one thing on a device that chance picks. It is well if the rank or
its host is named on the user's screen within the time allowed, the exit code is not 0, no process of ours is left on any
device, and what was printed is the beginning of the undisturbed answer. Prints a table: how many rounds went well, and the
median and longest times until the message and until the end.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from bench.home.faults.cases import KINDS, NOT_RANK_0, RANKS
from bench.home.faults.rounds import Outcome, home_with_slices, try_once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--silence", type=float, default=8.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    outcomes: list[Outcome] = []
    with home_with_slices(options.mpi) as (home, whole):
        for number in range(options.rounds):
            for kind in options.kinds.split(","):
                rank = random.randrange(1 if kind in NOT_RANK_0 else 0, RANKS)
                outcome = try_once(kind, home, options.mpi, rank, options.silence, whole)
                outcomes.append(outcome)
                said = f"{outcome.message_s:.1f} s" if outcome.message_s is not None else "-"
                verdict = outcome.wrong and f"NOT WELL: {outcome.wrong} [{outcome.line}]"
                print(
                    f"{number + 1:2} {kind:14} r{rank} named after {said}, ended after {outcome.end_s:.1f} s, "
                    f"exit code {outcome.code}  {verdict or outcome.line[:90]}",
                    flush=True,
                )
    print(f"\n{options.mpi}, {options.rounds} rounds, silence {options.silence:g} s")
    print(f"{'kind':14} {'well':>7} {'named':>14} {'ended':>14}  exit codes")
    for kind in options.kinds.split(","):
        mine = [outcome for outcome in outcomes if outcome.kind == kind]
        named = [outcome.message_s for outcome in mine if outcome.message_s is not None] or [float("nan")]
        ended = [outcome.end_s for outcome in mine]
        codes = ", ".join(str(code) for code in sorted({outcome.code for outcome in mine}))
        print(
            f"{kind:14} {sum(not o.wrong for o in mine):3}/{len(mine):<3} {median(named):5.1f}/{max(named):5.1f} s "
            f"{median(ended):6.1f}/{max(ended):5.1f} s  {codes}"
        )
    if options.json:
        options.json.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    sys.exit(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    main()
