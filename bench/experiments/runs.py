"""What the rows of experiments.toml do, each as a function of the row: it measures, and returns figures.

Times are in seconds, sizes in bytes. A row with devices runs in an emulated home of its own (bench/home), unless a
launcher is given: then on the machines that it reaches, with no limits but their own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.experiments.emulation import emulation, ways
from bench.experiments.machines import predictions
from bench.experiments.rows import LAUNCHER_BYTES, Row
from bench.experiments.site import ROOT, Figures, FinishedRun, RunError, Site, devices_of, last_line, link_of, run
from bench.home import Home
from bench.peers import rpc
from bench.peers.peers import ENVIRONMENTS_FOLDER, prepare, run_peer
from tpimpi.models.shapes import load_shape

DECODE_NUMBERS, PREFILL_NUMBERS = 4096, 128 * 4096  # of a 7B model's allreduce: of one position, and of 128
REPEATS = 5  # of each sum


def generate(row: Row, site: Site) -> Figures:
    """Answers to two prompts of a length: the first token with nothing loaded, and with the pinned tiles there; s/token."""
    chosen = _chosen(row, site)
    slices = site.models.make(row, chosen["shares"], chosen)
    with site.folder() as folder:
        report = Path(folder, "report.json")
        prompts = Path(folder, "prompts.txt")
        # The second begins otherwise, or nothing of it would have to be computed.
        ids = ([str(begin + number) for number in range(row.prompt)] for begin in (100, 101))
        prompts.write_text("".join(" ".join(each) + "\n" for each in ids))
        arguments = ["--slices", str(slices), "--raw", "--ignore-eos", "--max-tokens", str(row.answer_tokens)]
        arguments += [
            "--context",
            str(row.context),
            "--allreduce",
            row.allreduce,
            "--seal",
            "off",
            "--speculate",
            "off",
        ]
        # A greedy answer of random weights repeats itself, and then so do its experts.
        arguments += ["--temperature", "1", "--seed", "1"] if load_shape(row.shape).config.experts else []
        arguments += ["--threads", str(row.threads)] if row.threads else []
        arguments += [*_memory(row, site, arguments), "--report", str(report), "--quiet"]
        ended = run(row, site, arguments, prompts)
        if ended.code:
            raise RunError(f"exit code {ended.code}: {last_line(ended.err)}")
        if not report.exists():
            raise RunError(f"it ended without a report: {last_line(ended.err)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    return {**chosen, **_figures(found, ended)}


def _chosen(row: Row, site: Site) -> Figures:
    """The shares of the row's slices, and where `plan` chose them, what it predicts with them."""
    if (before := site.models.note(row)) is not None:
        return before
    if not row.planned:
        return {"shares": "" if row.shares == "auto" else row.shares}
    with site.folder() as folder:
        report = Path(folder, "plan.json")
        arguments = ["plan", "--shape", row.shape, "--format", row.format, "--context", str(row.context), "--quiet"]
        arguments += ["--prompt-tokens", str(row.prompt), "--allreduce", row.allreduce, "--seal", "off"]
        arguments += ["--json", str(report)]
        arguments += ["--layers", str(row.layers)] if row.layers else []
        arguments += ["--threads", str(row.threads)] if row.threads else []
        ended = run(row, site, [*arguments, *_memory(row, site, [])])
        if ended.code:
            raise RunError(f"plan: exit code {ended.code}: {last_line(ended.err)}")
        plans = json.loads(report.read_text(encoding="utf-8"))["plans"]
    best = [found for found in plans if found["ranks"] == row.devices][-1]
    predicted = {"s_per_token": best["s_per_token"], "ttft_s": best["first_token_s"], "limit": best["limit"]}
    return {"shares": best["shares"], "predicted": predicted}


def _figures(found: dict[str, Any], ended: FinishedRun) -> Figures:
    cold, warm = found["answers"]
    if warm["cached_tokens"]:
        raise RunError(f"{warm['cached_tokens']} positions of the second prompt were not computed")
    ranks = found["ranks"]
    spent = {name: sum(rank[f"{name}_s"] for rank in ranks) for name in ("compute", "read_wait", "star")}
    whole = sum(spent.values()) or 1.0
    return {
        "load_s": found["load_s"],
        "ttft_cold_s": cold["ttft_s"],
        "ttft_s": warm["ttft_s"],
        "s_per_token": warm["s_per_token"],
        "tokens": len(warm["token_ids"]),
        "parts": {name: seconds / whole for name, seconds in spent.items()},
        "allreduce": found["allreduce"],
        "memory_bytes": [rank["memory_bytes"] for rank in ranks],
        "pinned_bytes": [rank["pinned_bytes"] for rank in ranks],
        "streamed_bytes_per_token": [rank["streamed_bytes_per_token"] for rank in ranks],
        "peak_rss_bytes": [rank["peak_rss_bytes"] for rank in ranks],
        "group_peak_bytes": ended.peaks,
        "limit_hits": ended.hits,
    }


def _memory(row: Row, site: Site, arguments: Sequence[str]) -> list[str]:
    if row.window:
        return ["--window", row.window]
    if row.budget == "least":
        refused = run(row, site, [*arguments, "--memory", "1M"])
        if not (match := re.search(r"at least ([\d.]+) ?([kMGT]?i?B)", refused.err)):
            raise RunError(f"no refusal of --memory 1M: {last_line(refused.err)}")
        return ["--memory", match[1] + match[2]]
    if row.budget != "fit":
        return ["--memory", row.budget]
    return [] if row.memory_bytes is None else ["--memory", str(row.memory_bytes - LAUNCHER_BYTES)]


# What others take


def peer(row: Row, site: Site) -> Figures:
    """Another program on one such device, or llama.cpp on several; `killed` where the limit ended it."""
    model = site.models.make(row)
    model = model / "model.gguf" if (model / "model.gguf").exists() else model
    if row.program == rpc.NAME:
        return _rpc(row, site, model)
    model = prepare(row.program, model, site.models.prepared(row))
    with site.folder() as folder, Home(devices_of(row, Path(folder))) as home:
        found = run_peer(
            home,
            row.program,
            model,
            prompt=range(100, 100 + row.prompt),
            tokens=row.answer_tokens,
            threads=row.threads,
            context=row.context,
            environments=ENVIRONMENTS_FOLDER,
            timeout=600 + 6 * row.expected_s,
        )
        group = home.groups[0]
        return {**found, "group_peak_bytes": [None if group is None else group.peak()]}


def _rpc(row: Row, site: Site, model: Path) -> Figures:
    binaries = rpc.build_rpc(ENVIRONMENTS_FOLDER)
    with site.folder() as folder, Home(devices_of(row, Path(folder)), link_of(row)) as home:
        return rpc.run_rpc(
            home,
            model,
            binaries,
            prompt=row.prompt,
            tokens=row.answer_tokens,
            threads=row.threads,
            layers=load_shape(row.shape, row.layers or None).config.layers,
            timeout=600 + 6 * row.expected_s,
        )


# Sums, texts, predictions


def allreduce(row: Row, site: Site) -> Figures:
    """Every way of adding, for the sizes of a 7B model's decode and prefill."""
    with site.folder() as folder:
        report = Path(folder, "found.json")
        sizes = ["--sizes", f"{DECODE_NUMBERS},{PREFILL_NUMBERS}", "--repeats", str(REPEATS)]
        ended = run(row, site, ["bench", "allreduce", "--seal", "off", "--quiet", *sizes, "--json", str(report)])
        if ended.code:
            raise RunError(f"exit code {ended.code}: {last_line(ended.err)}")
        found: Figures = json.loads(report.read_text(encoding="utf-8"))
        return found


def perplexity(row: Row, site: Site) -> Figures:
    """Of SmolLM2 on a public text, and the KL divergence from f32."""
    text = site.work / "text" / "alice29.txt"
    subprocess.run(["bash", str(ROOT / "jobs" / "text.sh"), str(text.parent)], check=True, stdout=subprocess.DEVNULL)
    with site.folder() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "tpimpi", "perplexity", str(text), "--format", row.format, "--against", "f32"]
        command += ["--context", str(row.context), "--max-tokens", str(row.prompt), "--report", str(report), "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise RunError(f"exit code {done.returncode}: {last_line(done.stderr)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in ("ranks", "text")}


def predict(row: Row, site: Site) -> Figures:
    """What `plan`'s arithmetic says of machines that are described, not measured."""
    return predictions(row)


_MEASURES: dict[str, Callable[[Row, Site], Figures]] = {
    "generate": generate,
    "peer": peer,
    "allreduce": allreduce,
    "perplexity": perplexity,
    "predict": predict,
    "emulation": emulation,
    "ways": ways,
}


def measure(row: Row, site: Site) -> tuple[Figures, float]:
    """The row's figures, and the seconds that it took. Raises RunError, or what home, peers and synth raise."""
    started = time.monotonic()
    figures = _MEASURES[row.measure](row, site)
    return figures, time.monotonic() - started
