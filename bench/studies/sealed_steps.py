"""What sealed links cost a token, within one run: groups of steps with and without the seal, in turn.

    python -m bench.studies.sealed_steps --ranks 4 --latency 0.3ms [--tokens 800] [--model 1b.gguf] [--runs 1]

The links are sealed, as between hosts of an emulated home. All ranks then take the seal off for some tokens, and put it on
again, after the same steps. So what a machine does otherwise meanwhile, which runs in turn differ by (see sealed_links), is
the same for both. A pair is two groups of GROUP tokens, one after the other, the one that begins changing from pair to pair;
a ratio is the sealed one's time by the plain one's. The interval is that of two_versions.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from bench.home.devices import Link, parse_duration
from bench.home.home import Home
from bench.studies.two_versions import WORDS, line

RUN_TIMEOUT_S = 1800
GROUP = 4  # tokens
_SEALED = (True, False, False, True)  # groups, over and over
_FIRST = 8  # tokens that do not count


def is_sealed(step: int) -> bool:
    """Whether the messages of this step of a token are sealed; that of the prompt is."""
    return step < 0 or _SEALED[step // GROUP % len(_SEALED)]


def run_in_turn(out: Path, arguments: list[str]) -> None:
    """One rank's run of tpimpi, with and without its seal; the hub writes when each step of a token ended."""
    from tpimpi.cli.main import main
    from tpimpi.engine.model import Model

    forward, ended, seals = Model.forward, list[float](), list[object]()

    def forward_in_turn(self: Model, x, rows, **options):  # type: ignore[no-untyped-def]
        result = forward(self, x, rows, **options)
        channel = self.star._channel
        if len(x) > 1 or channel is None:
            return result
        ended.append(time.monotonic())
        seals.extend([] if seals else [channel.seal])
        channel.seal = seals[0] if is_sealed(len(ended)) else None  # type: ignore[assignment]
        if self.star.rank.is_hub:
            out.write_text(json.dumps(ended))
        return result

    Model.forward = forward_in_turn  # type: ignore[assignment, method-assign]
    sys.exit(main(arguments))


def ratios_of(ended: list[float]) -> tuple[list[float], list[float], list[float]]:
    """Of each pair of groups the ratio; and the seconds of a token of each sealed group, and of each plain one."""
    steps = [after - before for before, after in pairwise(ended)]  # step n ended at ended[n]: steps[n - 1] is step n's
    groups: dict[int, float] = {}
    for number in range(max(_FIRST, GROUP), len(ended) - len(ended) % GROUP):
        groups[number // GROUP] = groups.get(number // GROUP, 0.0) + steps[number - 1] / GROUP
    ratios, sealed, plain = [], [], []
    for first in sorted(groups):
        if first % 2 or first + 1 not in groups:
            continue
        on, off = (first, first + 1) if is_sealed(first * GROUP) else (first + 1, first)
        sealed.append(groups[on])
        plain.append(groups[off])
        ratios.append(groups[on] / groups[off])
    return ratios, sealed, plain


def run(home: Home, options: argparse.Namespace, folder: Path) -> list[float]:
    """When the steps of one run ended."""
    out = folder / "steps.json"
    model = ["--model", str(options.model.resolve())] if options.model else []
    command = [
        sys.executable,
        "-m",
        "bench.studies.sealed_steps",
        "--in-turn",
        str(out),
        *model,
        "--raw",
        "--ignore-eos",
    ]
    command += [
        "--quiet",
        "--speculate",
        "off",
        "--audit",
        "off",
        "--max-tokens",
        str(options.tokens),
        "--threads",
        "1",
    ]
    command += ["--prompt-file", str(folder / "prompt.txt"), "--seal", "on", "--allreduce", "star"]
    process = home.mpirun(command, ranks=options.ranks, stdout=subprocess.DEVNULL)
    if process.wait(RUN_TIMEOUT_S):
        raise SystemExit(f"exit code {process.returncode}")
    ended: list[float] = json.loads(out.read_text())
    return ended


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] == ["--in-turn"]:
        run_in_turn(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a GGUF file or folder (default: SmolLM2)")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--latency", default="0.3ms")
    parser.add_argument("--tokens", type=int, default=800)
    parser.add_argument("--runs", type=int, default=1)
    options = parser.parse_args()
    link = Link(latency_s=parse_duration(options.latency, "--latency"))
    ratios, sealed, plain = list[float](), list[float](), list[float]()
    with tempfile.TemporaryDirectory() as scratch, Home(options.ranks, link) as home:
        folder = Path(scratch)
        ids = " ".join(str(3 + 131 * place % 900) for place in range(32))
        (folder / "prompt.txt").write_text(ids if options.model else WORDS * 3)
        for _ in range(options.runs):
            of_run = ratios_of(run(home, options, folder))
            for seconds, found in zip((ratios, sealed, plain), of_run, strict=True):
                seconds.extend(found)
            print(line("decode", ratios, "sealed / plain"), flush=True)
    print(f"s/token  sealed {median(sealed):.4f}, plain {median(plain):.4f}; {len(ratios)} pairs")


if __name__ == "__main__":
    main()
