"""What a draft model gives that is right at a set rate, as random weights never are: with and without it in turn.

    python -m tpimpi synth --shape tinyllama-1.1b --layers 2 --as gguf --out draft.gguf
    python -m tpimpi synth --shape llama-2-7b --ranks 2 --out slices-7b
    python -m bench.studies.draft_rate --slices slices-7b --draft draft.gguf --ranks 2 [--rate 0.6] [--tokens 64]
        [--rounds 3] [--speculate auto] [--options "--memory 700M"] [--latency 2ms [--cores 1]]

The draft model computes what it would, and its tokens are then replaced by those of the answer (which a run without it has
made before), each right with the probability `--rate`. The answer is drawn at temperature 1, so that it does not repeat
itself. With --latency the ranks are devices of an emulated home.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from bench.experiments.site import ROOT
from bench.home import Home
from bench.home.devices import Device, Link, parse_duration

PROMPT = " ".join(str(100 + number) for number in range(16))


def run_with_rate(rate: float, known: Path, arguments: list[str]) -> None:
    """Run tpimpi, with a draft model that is right at this rate; `known` is a report with the answer."""
    from tpimpi.cli.main import main
    from tpimpi.serving.draft_model import DraftModel

    report, dice, propose = json.loads(known.read_text()), random.Random(1), DraftModel.propose

    def replaced(self: DraftModel, ids: Sequence[int], most: int) -> list[int]:
        draft, begin = propose(self, ids, most), len(ids) - report["prompt_tokens"]
        right = report["token_ids"][begin : begin + len(draft)]
        return [token if dice.random() < rate else (token + 1) % 1000 for token in right]

    DraftModel.propose = replaced  # type: ignore[method-assign]
    main(arguments)


class Pairs:
    """Runs with and without the draft model."""

    def __init__(self, options: argparse.Namespace, folder: Path, home: Home | None) -> None:
        self.options, self.home = options, home
        self.report, self.known, self.prompt = folder / "report.json", folder / "known.json", folder / "prompt.txt"
        self.prompt.write_text(PROMPT)

    def run(self, *, drafted: bool) -> dict[str, Any]:
        """The report of a run."""
        options = self.options
        arguments = [
            "--slices",
            str(options.slices.resolve()),
            "--prompt-file",
            str(self.prompt),
            "--raw",
            "--ignore-eos",
        ]
        arguments += ["--temperature", "1", "--seed", "1", "--max-tokens", str(options.tokens), "--context", "512"]
        arguments += ["--quiet", "--report", str(self.report), *options.options.split()]
        program = ["-m", "tpimpi"]
        if drafted:
            program = ["-m", "bench.studies.draft_rate", "--with-rate", str(options.rate), str(self.known)]
            arguments += ["--draft", str(options.draft.resolve()), "--speculate", options.speculate]
        else:
            arguments += ["--speculate", "off"]
        command = [sys.executable, *program, *arguments]
        if self.home is not None:
            process = self.home.mpirun(command, ranks=options.ranks, stdout=subprocess.DEVNULL)
            if process.wait(3600):
                raise SystemExit(f"exit code {process.returncode}")
        else:
            if options.ranks > 1:
                mpirun = shutil.which("mpirun")
                assert mpirun, "no mpirun: source .venv/bin/activate"
                hostfile = str(ROOT / "hostfiles" / "local.txt")
                command = [mpirun, "-np", str(options.ranks), "--hostfile", hostfile, *command]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, cwd=ROOT)
        found: dict[str, Any] = json.loads(self.report.read_text())
        return found

    def measure(self) -> None:
        """Print a line a round, and the medians."""
        self.known.write_text(json.dumps(self.run(drafted=False)))
        ratios = []
        for number in range(1, self.options.rounds + 1):
            without, with_it = self.run(drafted=False), self.run(drafted=True)
            if with_it["token_ids"] != without["token_ids"]:
                raise SystemExit("the draft model changed tokens")
            ratios.append(without["s_per_token_mean"] / with_it["s_per_token_mean"])
            print(
                f"round {number}: {without['s_per_token_mean']:.4f} s/token, with the draft model "
                f"{with_it['s_per_token_mean']:.4f}, {ratios[-1]:.2f} times; {with_it['tokens_per_pass']:.2f} tokens a "
                f"pass, {with_it['accepted_tokens']} of {with_it['drafted_tokens']} drafted tokens accepted",
                flush=True,
            )
        print(f"{median(ratios):.2f} times as fast (median of {len(ratios)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", type=Path, required=True)
    parser.add_argument("--draft", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speculate", default="auto")
    parser.add_argument("--options", default="", help="more options of all runs")
    parser.add_argument("--latency", help="of the links of an emulated home, 2ms say")
    parser.add_argument("--cores", type=float, help="of each of its devices")
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        home = None
        if options.latency:
            devices = [Device(f"device-{rank}", cores=options.cores) for rank in range(options.ranks)]
            link = Link(latency_s=parse_duration(options.latency, "--latency"))
            home = stack.enter_context(Home(devices, link))
        Pairs(options, folder, home).measure()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--with-rate"]:
        run_with_rate(float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    else:
        main()
