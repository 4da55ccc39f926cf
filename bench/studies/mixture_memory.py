"""Whether a mixture of experts keeps the promise of --memory: a long prompt in chunks, in one chunk, and a batch of prompts.

    python -m bench.studies.mixture_memory DIR [--shape qwen3-30b-a3b] [--layers 12] [--format q4_k_m] [--ranks 4]
        [--memory 350M,500M,1G] [--head 900M]

DIR gets the slices, and is kept. `--memory` is what ranks 1 and up have, rank 0 has `--head` more. Each rank runs in a
control group whose memory is its promise; one that needs more is ended by the system, and the study with it. Chunks of so
many positions go through the layers in halves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.limits import available
from bench.studies.measured_runs import PROGRAM, RefusedError, Setup, groups_of, mb, show
from tpimpi.system.units import parse_size
from tpimpi.weights.slices.names import slice_name

TOKENS, CONTEXT = 24, 4096
PROMPT_POSITIONS, PROMPTS, TOGETHER = 1800, 16, 8


def cases(folder: Path) -> dict[str, Sequence[str]]:
    """The options of each run, by its name; their files are written into `folder`."""
    long, prompts = folder / "long.txt", folder / "prompts.jsonl"
    long.write_text(_ids(PROMPT_POSITIONS, 3))
    lines = [{"custom_id": str(n), "prompt": _ids(40 + 37 * n % 300, 5 + 977 * n)} for n in range(PROMPTS)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "prompt, chunks of 512": ("--prompt-file", str(long), "--prompt-chunk", "512"),
        "prompt, one chunk": ("--prompt-file", str(long), "--prompt-chunk", "2048"),
        f"batch, {TOGETHER} at once": ("--batch-file", str(prompts), "--parallel", str(TOGETHER)),
    }


def _ids(count: int, first: int) -> str:
    return " ".join(str(3 + (first + 131 * place) % 9000) for place in range(count))


def make_slices(options: argparse.Namespace) -> None:
    """Slices of the shape, where there are none."""
    if (options.folder / slice_name(0, options.ranks)).exists():
        return
    command = [sys.executable, *PROGRAM, "synth", "--shape", options.shape, "--layers", str(options.layers)]
    command += ["--format", options.format, "--ranks", str(options.ranks), "--out", str(options.folder), "--quiet"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def row(setup: Setup, memory: str, head: str, name: str, case: Sequence[str]) -> Sequence[str]:
    """A run with this promise: what is shown of it."""
    least = parse_size(memory, "--memory")
    budgets = [least + parse_size(head, "--head"), *[least] * (setup.ranks - 1)]
    promised = " ".join(map(mb, budgets))
    with tempfile.TemporaryDirectory() as scratch, groups_of(setup, budgets) as groups:
        more = ("--out", str(Path(scratch, "out.jsonl"))) if "--batch-file" in case else ()
        options = ("--threads", "1", "--audit", "off", "--memory", ",".join(map(str, budgets)))
        try:
            report = setup.run(*options, prompt=(*case, *more), inside=groups)
        except RefusedError as refused:
            return name, promised, f"refused: at least {refused.least}", ""
        assert groups is not None
        peaks = [group.peak() for group in groups.groups]
    hits = [rank["experts"]["hits"] / rank["experts"]["used"] for rank in report["ranks"]]
    return name, promised, " ".join(map(mb, peaks)), " ".join(f"{100 * hit:.0f}" for hit in hits)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--format", default="q4_k_m")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--memory", default="350M,500M,1G")
    parser.add_argument("--head", default="900M")
    options = parser.parse_args()
    if (problem := available()) is not None:
        sys.exit(problem)
    make_slices(options)
    setup = Setup(options.folder, options.ranks, TOKENS, CONTEXT, 1.0)
    setup.found["groups"] = True
    with tempfile.TemporaryDirectory() as scratch:
        named = cases(Path(scratch))
        rows = [
            row(setup, memory, options.head, name, case)
            for memory in options.memory.split(",")
            for name, case in named.items()
        ]
    show("memory of a mixture", ("run", "promised MB", "peaks of the groups MB", "in memory %"), rows)


if __name__ == "__main__":
    main()
