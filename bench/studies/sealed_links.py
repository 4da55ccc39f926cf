"""What sealed links cost: the same run with --seal on and off in turn, over the emulated home: times, and memory a rank.

    python -m bench.studies.sealed_links --ranks 4 --latency 0.3ms --pairs 30
    python -m bench.studies.sealed_links --model 1b.gguf --ranks 2 --pairs 30

The ratios are sealed by plain, of a token and of the prompt, with the 95 % interval of their median (see two_versions).
Memory is the difference of the peaks of each rank, its median over the pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.home.devices import Link, parse_duration
from bench.home.home import Home
from bench.studies.two_versions import WORDS, Run, add_runs, line, read

RUN_TIMEOUT_S = 600


def run(home: Home, seal: str, options: argparse.Namespace, folder: Path) -> Run:
    """One run with that --seal."""
    report = folder / "report.json"
    model = ["--model", str(options.model.resolve())] if options.model else []
    command = [sys.executable, "-m", "tpimpi", *model, "--raw", "--ignore-eos", "--quiet", "--speculate", "off"]
    command += ["--max-tokens", str(options.tokens), "--threads", "1", "--prompt-file", str(folder / "prompt.txt")]
    command += ["--report", str(report), "--seal", seal, "--allreduce", options.allreduce]
    process = home.mpirun(command, ranks=options.ranks, mpi=options.mpi, stdout=subprocess.DEVNULL)
    if process.wait(RUN_TIMEOUT_S):
        raise SystemExit(f"a run with --seal {seal} failed")
    values = json.loads(report.read_text())
    assert (values["sealed"] is not None) == (seal == "on")
    return read(values)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runs(parser)
    parser.add_argument("--latency", default="0.3ms")
    parser.add_argument("--allreduce", default="star")
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    options = parser.parse_args()
    link = Link(latency_s=parse_duration(options.latency, "--latency"))
    pairs: list[tuple[Run, Run]] = []
    with tempfile.TemporaryDirectory() as scratch, Home(options.ranks, link) as home:
        folder = Path(scratch)
        # Token ids, for files without a tokenizer, or words.
        ids = " ".join(str(3 + 131 * place % 900) for place in range(options.prompt_words))
        words = " ".join((WORDS * options.prompt_words).split()[: options.prompt_words])
        (folder / "prompt.txt").write_text(ids if options.model else words)
        run(home, "on", options, folder)  # makes the slices, and warms up
        for number in range(options.pairs):
            order = ("on", "off") if number % 2 == 0 else ("off", "on")
            found = {seal: run(home, seal, options, folder) for seal in order}
            pairs.append((found["on"], found["off"]))
            ratios = [getattr(found["on"], name) / getattr(found["off"], name) for name in ("decode_s", "prompt_s")]
            print(f"pair {number + 1:2}: decode {ratios[0]:.3f}, prompt {ratios[1]:.3f}", flush=True)
    for name in ("decode_s", "prompt_s"):
        ratios = [getattr(on, name) / getattr(off, name) for on, off in pairs]
        print(line(name.removesuffix("_s"), ratios, "sealed / plain"))
    for rank in range(options.ranks):
        more = median(on.peak_bytes[rank] - off.peak_bytes[rank] for on, off in pairs)
        print(f"memory   r{rank}: {more / 1e6:+.1f} MB (median of the differences)")
    print(
        f"s/token  sealed {median(on.decode_s for on, _ in pairs):.4f}, plain {median(off.decode_s for _, off in pairs):.4f}"
    )


if __name__ == "__main__":
    main()
