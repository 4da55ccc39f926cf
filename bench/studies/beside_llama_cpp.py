"""Decode the same model with tpimpi and with llama.cpp, in turn, on the same cores; medians and ratios.

    bash bench/studies/llama_cpp.sh build                       # llama.cpp from its PyPI source package, about ten minutes
    python -m bench.studies.beside_llama_cpp --llama-bench build/llama.cpp/bin/llama-bench
    python -m bench.studies.random_gguf 1b.gguf
    python -m bench.studies.beside_llama_cpp --llama-bench build/llama.cpp/bin/llama-bench --model 1b.gguf

It compares 1 rank of one thread with llama.cpp's one thread, and 2 ranks of one thread with its two. Equal shares are
the fastest: rank 0's output head is computed when all blocks are done, so with less of the blocks it would only wait longer.
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

ROOT = Path(__file__).resolve().parents[2]


def llama_cpp(program: str, model: Path, threads: int, tokens: int) -> float:
    """Tokens a second of llama.cpp's decoding."""
    command = [program, "-m", str(model), "-t", str(threads), "-p", "0", "-n", str(tokens), "-r", "1", "-o", "json"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)[0]["avg_ts"])


def tpimpi(model: Path, ranks: int, shares: str, tokens: int) -> float:
    """Tokens a second of tpimpi's decoding, ranks of one thread."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "tpimpi", "--model", str(model), "--raw", "--prompt", "The", "--ignore-eos"]
        command += ["--max-tokens", str(tokens), "--threads", "1", "--quiet", "--report", str(report)]
        if ranks > 1:
            mpirun = shutil.which("mpirun")
            assert mpirun, "no mpirun: source .venv/bin/activate"
            hostfile = str(ROOT / "hostfiles" / "local.txt")
            command = [mpirun, "-np", str(ranks), "--hostfile", hostfile, *command, "--shares", shares]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        return 1 / float(json.loads(report.read_text())["s_per_token_mean"])  # as avg_ts is a mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-bench", required=True, help="the program llama-bench")
    parser.add_argument("--model", type=Path, help="a GGUF file (default: SmolLM2)")
    parser.add_argument("--shares", default="1,1", help="of two ranks (default 1,1)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    model = options.model or smollm2()
    tpimpi(model, 1, "", 2)  # makes the slices
    tpimpi(model, 2, options.shares, 2)
    rounds: dict[str, list[float]] = {name: [] for name in ("llama 1", "tpimpi 1", "llama 2", "tpimpi 2")}
    for _ in range(options.rounds):
        for n in (1, 2):
            rounds[f"llama {n}"].append(llama_cpp(options.llama_bench, model, n, options.tokens))
            rounds[f"tpimpi {n}"].append(tpimpi(model, n, options.shares, options.tokens))
    print(f"{model.name}, {options.tokens} tokens, medians of {options.rounds} rounds, tokens/s (least, most)")
    for n in (1, 2):
        ours, theirs = rounds[f"tpimpi {n}"], rounds[f"llama {n}"]
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        cells = (f"{median(v):6.1f} ({min(v):.1f}, {max(v):.1f})" for v in (ours, theirs))
        what = ("1 rank", "1 thread") if n == 1 else (f"2 ranks of one thread, --shares {options.shares}", "2 threads")
        print(f"{what[0]}: {next(cells)}   llama.cpp, {what[1]}: {next(cells)}   ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
