"""Eight sequences at once beside one, in turn: tokens a second of --batch-file; and beside llama.cpp's llama-batched-bench.

    python -m tpimpi synth --shape llama-2-7b --ranks 2 --format q4_0 --out 7b
    python -m bench.studies.batch --slices 7b --ranks 2 --memory 700M         # streaming
    python -m bench.studies.batch --slices 7b --ranks 2                       # all pinned
    python -m bench.studies.random_gguf 1b.gguf
    bash bench/studies/llama_cpp.sh build
    python -m bench.studies.batch --model 1b.gguf --ranks 1 --threads 2 \
        --batched-bench build/llama.cpp/bin/llama-batched-bench

A rate is that of decoding: of all sequences together, each 1 / its mean time between two tokens. llama-batched-bench counts
in the same way (S_TG: tokens of all by the time after the prompts), as all prompts and answers are as long.
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

ROOT = Path(__file__).resolve().parents[2]


def tpimpi(sequences: int, options: argparse.Namespace) -> float:
    """Tokens a second of so many sequences at once."""
    with tempfile.TemporaryDirectory() as folder:
        report, prompts = Path(folder, "report.json"), Path(folder, "in.jsonl")
        lines = []
        for number in range(sequences):
            # Each another, so that no sequence takes the pages of another.
            ids = " ".join(str(3 + (number * 131 + place) % 900) for place in range(options.prompt_tokens))
            lines.append(json.dumps({"custom_id": str(number), "prompt": ids, "seed": number}))
        prompts.write_text("\n".join(lines))
        of = ["--slices", options.slices] if options.slices else ["--model", options.model]
        command = [sys.executable, "-m", "tpimpi", *of, "--raw", "--batch-file", str(prompts), "--out", f"{folder}/out"]
        command += ["--parallel", str(sequences), "--ignore-eos", "--max-tokens", str(options.tokens), "--quiet"]
        command += [
            "--speculate",
            "off",
            "--report",
            str(report),
            "--temperature",
            "1",
            "--threads",
            str(options.threads),
        ]
        command += ["--memory", options.memory] if options.memory else []
        if options.ranks > 1:
            mpirun = shutil.which("mpirun")
            assert mpirun, "no mpirun: source .venv/bin/activate"
            command = [mpirun, "-np", str(options.ranks), "--hostfile", str(ROOT / "hostfiles" / "local.txt"), *command]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        answers = json.loads(report.read_text())["answers"]
        return sum(1 / answer["s_per_token_mean"] for answer in answers)


def llama_cpp(counts: list[int], options: argparse.Namespace) -> dict[int, float]:
    """Tokens a second of llama.cpp, by the number of sequences."""
    context = (options.prompt_tokens + options.tokens) * max(counts)
    command = [
        options.batched_bench,
        "-m",
        options.model,
        "-c",
        str(context),
        "-t",
        str(options.threads * options.ranks),
    ]
    command += ["-npp", str(options.prompt_tokens), "-ntg", str(options.tokens), "-npl", ",".join(map(str, counts))]
    done = subprocess.run(
        [*command, "--output-format", "jsonl"], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["pl"]: row["speed_tg"] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", help="slices for this number of ranks, of a model without a tokenizer")
    parser.add_argument("--model", help="a GGUF file without a tokenizer")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank (default 1)")
    parser.add_argument("--memory", help="of each rank (default: auto)")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batched-bench", help="the program llama-batched-bench")
    options = parser.parse_args()
    os.environ.setdefault("PRTE_MCA_hwloc_default_binding_policy", "none")
    if os.geteuid() == 0:
        os.environ |= {f"{name}_ALLOW_RUN_AS_ROOT{end}": "1" for name in ("OMPI", "PRTE") for end in ("", "_CONFIRM")}
    counts = [1, options.sequences]
    ours: dict[int, list[float]] = {count: [] for count in counts}
    theirs: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(options.rounds):
        for count in counts:
            ours[count].append(tpimpi(count, options))
        if options.batched_bench:
            for count, rate in llama_cpp(counts, options).items():
                theirs[count].append(rate)
        print(
            {
                name: {n: [round(v, 2) for v in rates[n]] for n in counts}
                for name, rates in (("ours", ours), ("theirs", theirs))
            }
        )
    pairs = zip(ours[options.sequences], ours[1], strict=True)
    print(f"{options.sequences} sequences beside one: {median(a / b for a, b in pairs):.2f} times the tokens a second")
    for count in counts if options.batched_bench else ():
        ratios = [a / b for a, b in zip(ours[count], theirs[count], strict=True)]
        print(f"{count} at once, beside llama.cpp: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
