"""Fuzz the targets: `python -m tests.fuzz --minutes 60`, each for its part of that time, as many at once as there are cores.

The corpus grows in build/fuzz/corpus and is gone on with the next time; finds are in build/fuzz/found. Ends with 1 where an
input broke something. `--one NAME` fuzzes one target in this process, `--try NAME FILE` runs one input.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import ROOT

FOLDER = ROOT / "build" / "fuzz"
_GRACE_S = 90  # beyond its time that a target has, to begin and to end


@dataclass(frozen=True)
class Outcome:
    """What came of one target's time."""

    name: str
    inputs: int
    code: int
    said: str


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--engine", choices=("auto", "coverage", "structure"), default="auto")
    parser.add_argument("--target", action="append", help="only these; may be given again")
    parser.add_argument("--one", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    parser.add_argument("--try", dest="tried", nargs=2, metavar=("NAME", "FILE"), help="run one input")
    options = parser.parse_args()
    if options.tried:
        from tests.fuzz.targets import TARGETS

        TARGETS[options.tried[0]](Path(options.tried[1]).read_bytes())
        return 0
    engine = _engine(options.engine)
    if options.one:
        return _one(options.one, engine, options.seconds)
    from tests.fuzz.targets import TARGETS

    names = options.target or list(TARGETS)
    if unknown := set(names) - TARGETS.keys():
        parser.error(f"no target {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    return _all(names, engine, options.minutes)


def _engine(wanted: str) -> str:
    has_atheris = importlib.util.find_spec("atheris") is not None
    if wanted == "auto" and not has_atheris:
        print(
            "fuzz: atheris is not installed (pip install atheris): by structure alone, not by coverage", file=sys.stderr
        )
    return ("coverage" if has_atheris else "structure") if wanted == "auto" else wanted


def _one(name: str, engine: str, seconds: float) -> int:
    from tests.fuzz.engines import by_coverage, by_structure

    corpus = FOLDER / "corpus" / name
    if engine == "coverage":
        by_coverage(name, corpus, max(1, round(seconds)))
    print(f"stat::number_of_executed_units: {by_structure(name, corpus, seconds)}", file=sys.stderr)
    return 0


def _all(names: list[str], engine: str, minutes: float) -> int:
    together = max(1, min(len(names), len(os.sched_getaffinity(0))))
    seconds = max(1.0, 60 * minutes * together / len(names))
    print(f"fuzz: {len(names)} targets, {engine}, {seconds:.0f} s each, {together} at a time", file=sys.stderr)
    with ThreadPoolExecutor(together) as pool:
        outcomes = list(pool.map(lambda name: _outcome(name, engine, seconds), names))
    inputs, finds = sum(outcome.inputs for outcome in outcomes), [one for one in outcomes if one.code]
    for find in finds:
        print(f"fuzz: {find.name}: exit code {find.code}\n{find.said[-1500:]}", file=sys.stderr)
    where = f" (in {FOLDER / 'found'})" if finds else ""
    print(f"fuzz: {inputs} inputs, {len(finds)} finds{where}", file=sys.stderr)
    return 1 if finds else 0


def _outcome(name: str, engine: str, seconds: float) -> Outcome:
    command = [sys.executable, "-m", "tests.fuzz", "--one", name, "--seconds", str(seconds), "--engine", engine]
    try:
        done = subprocess.run(
            ["nice", "-n", "19", *command], cwd=ROOT, capture_output=True, timeout=seconds + _GRACE_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        return Outcome(name, 0, 124, f"did not end: {(error.stderr or b'').decode(errors='replace')}")
    said = done.stderr.decode(errors="replace")
    counts = re.findall(r"number_of_executed_units: *(\d+)", said)
    inputs = int(counts[-1]) if counts else 0
    print(f"fuzz: {name}: {inputs} inputs{'' if not done.returncode else ', FOUND SOMETHING'}", file=sys.stderr)
    return Outcome(name, inputs, done.returncode, said)


if __name__ == "__main__":
    sys.exit(main())
