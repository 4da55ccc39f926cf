"""A mixture of experts that streams from one disk, beside max(reading at the disk's rate, computing): its time for a token.

    python -m bench.studies.mixture_disk DIR --json FILE [--shape gpt-oss-120b] [--layers 18] [--ranks 4]
        [--memory 1G,2G,2500M] [--head 1400M] [--kinds drawn,uniform,cycle] [--shares 1,1,1,1] [--options=--predict=0]

DIR gets the slices, one kind of routing (see routing_trace) after the other: each set is removed before the next is made.
`--memory` is what ranks 1 and up have, rank 0 has `--head` more. Each rank runs in a control group whose memory is its
promise, where there are groups. What counts is a token after the first ones: of two runs, --tokens and a quarter of them,
the difference in seconds, bytes, hits and processor time is divided by the difference in tokens; until the cache is full
each read also takes new memory from the system. The disk's rate is that of `bench disk` with as many readers as ranks and
reads of an expert's size, before and after the runs of a kind. Computing is a token of the routing that always chooses the
same experts, without guesses and with the most memory, which is measured first: nothing is read then. Of the longer run's
trace: how long the ranks waited for the disk, computed (with that wait, in blocks of experts) and were at the star, for each
layer, in the mean of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.limits import available
from bench.studies.measured_runs import MIB, PROGRAM, Setup, Values, direct_rate, groups_of, mb, show
from bench.studies.routing_trace import make_trace
from tpimpi.models.shapes import load_shape
from tpimpi.system.units import parse_size
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import slice_name

POSITIONS = 400
CONTEXT = 1024
PROMPT_IDS = " ".join(map(str, range(3, 140, 9)))


def make_slices(options: argparse.Namespace, kind: str) -> Setup:
    """Slices that follow a trace of this kind."""
    layers: int = options.layers
    config = load_shape(options.shape, layers).config
    shutil.rmtree(options.folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        trace = Path(scratch, "trace.npy")
        np.save(trace, make_trace(config.experts, config.experts_per_token, layers, POSITIONS, 0, kind=kind))
        command = [sys.executable, *PROGRAM, "synth", "--shape", options.shape, "--layers", str(layers)]
        command += ["--format", options.format, "--ranks", str(options.ranks), "--routing", str(trace)]
        command += ["--shares", options.shares] if options.shares else []
        subprocess.run([*command, "--out", str(options.folder), "--quiet"], check=True, stdin=subprocess.DEVNULL)
    setup = Setup(options.folder, options.ranks, options.tokens, CONTEXT, options.seconds)
    os.sync()  # what is still being written takes the processor too
    setup.found["groups"] = options.groups and available() is None
    setup.tile = max(MIB, expert_bytes(options.folder / slice_name(0, options.ranks)) // 4096 * 4096)
    return setup


def expert_bytes(path: Path) -> int:
    """What an expert takes of a rank's disk, at most."""
    file = SliceFile(path)
    found = max(record.nbytes for record in file.records_of("experts"))
    file.close()
    return found


def a_token(setup: Setup, budgets: list[int], options: Sequence[str]) -> Values:
    """What a token takes after the first ones, with these promises of memory and options of the run."""
    reports, processor = [], []
    layers: Values = {}
    for tokens in (setup.tokens // 4, setup.tokens):
        with tempfile.TemporaryDirectory() as scratch, groups_of(setup, budgets) as groups:
            ids, trace = Path(scratch, "ids.txt"), Path(scratch, "trace.json")
            ids.write_text(PROMPT_IDS)
            command = ["--threads", "1", "--max-tokens", str(tokens), "--trace", str(trace), *options]
            command += ["--memory", ",".join(map(str, budgets))]
            before = processor_seconds()
            reports.append(setup.run(*command, prompt=("--prompt-file", str(ids)), inside=groups))
            processor.append(processor_seconds() - before)
            if tokens == setup.tokens:
                layers = layers_of(json.loads(trace.read_text()), after=setup.tokens // 4)
            peaks = None if groups is None else [group.peak() for group in groups.groups]
    few, many = reports
    number = setup.tokens - setup.tokens // 4

    def more(name: str) -> list[float]:
        pairs = zip(few["ranks"], many["ranks"], strict=True)
        return [(after["experts"][name] - before["experts"][name]) / number for before, after in pairs]

    seconds = [each["s_per_token_mean"] * (len(each["token_ids"]) - 1) for each in reports]
    used = sum(more("used"))
    return {
        "s_per_token": (seconds[1] - seconds[0]) / number,
        "processor_s": (processor[1] - processor[0]) / number,
        "in_memory": sum(more("hits")) / used,
        "guessed_right": sum(more("expected_used")) / max(1e-9, sum(more("expected"))),
        "bytes": sum(more("bytes_read")),
        "guessed_bytes": sum(more("expected_bytes")),
        "wait_s": more("wait_s"),
        "group_peak_bytes": peaks,
        "peak_rss_bytes": [rank["peak_rss_bytes"] for rank in many["ranks"]],
        "layers": layers,
    }


def processor_seconds() -> float:
    """Of all programs that this one started, and that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def layers_of(trace: Values, after: int) -> Values:
    """By block, the milliseconds of a pass that a rank waited for the disk, computed and was at the star, in the mean of all
    ranks and of all passes but the first `after`."""
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    passes = sorted(event["ts"] for event in events if event["cat"] == "pass")[after:]
    ranks = len({event["pid"] for event in events})
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        if event["cat"] in ("disk wait", "compute", "star") and event["ts"] >= passes[0]:
            found[event["name"]][event["cat"]] += event["dur"] / 1000 / ranks / len(passes)
    return {name: dict(kinds) for name, kinds in found.items()}


def study(options: argparse.Namespace) -> Values:
    """All figures."""
    found: Values = {"rows": []}
    given = options.options.split()
    for kind, more in (("same", ["--predict", "0"]), *((kind, []) for kind in options.kinds.split(","))):
        setup = make_slices(options, kind)
        rates = [direct_rate(setup.disk())]
        rows = []
        memories = options.memory.split(",")
        for memory in memories[-1:] if kind == "same" else memories:
            least = parse_size(memory, "--memory")
            budgets = [least + parse_size(options.head, "--head"), *[least] * (options.ranks - 1)]
            rows.append({"kind": kind, "memory": memory, **a_token(setup, budgets, given + more)})
            print(f"{kind} {memory}: {rows[-1]['s_per_token']:.4f} s/token", file=sys.stderr, flush=True)
        rates.append(direct_rate(setup.disk()))
        found.setdefault("compute_s", rows[0]["s_per_token"])
        for row in rows:
            reading = row["bytes"] / (sum(rates) / len(rates))
            row |= {"disk_bytes_per_s": rates, "reading_s": reading}
            row["times"] = row["s_per_token"] / max(reading, found["compute_s"])
        found["rows"] += rows
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(options.folder, ignore_errors=True)
    return found


def table(row: Values) -> Sequence[str]:
    """A row of what is shown."""
    peaks = row["group_peak_bytes"] or row["peak_rss_bytes"]
    waits: dict[int, float] = defaultdict(float)
    for name, kinds in row["layers"].items():
        if (layer := re.search(r"\d+", name)) is not None:
            waits[int(layer[0])] += kinds.get("disk wait", 0.0)
    return (
        *(row["kind"], row["memory"], f"{row['s_per_token']:.3f}", f"{row['processor_s']:.3f}"),
        *(f"{100 * row['in_memory']:.0f}", f"{100 * row['guessed_right']:.0f}", mb(row["bytes"])),
        *(f"{row['disk_bytes_per_s'][0] / 1e9:.2f}", f"{row['reading_s']:.3f}", f"{row['times']:.2f}"),
        *(f"{min(waits.values(), default=0):.1f} to {max(waits.values(), default=0):.1f}",),
        " ".join(mb(peak) for peak in peaks),
    )


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="is removed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shape", default="gpt-oss-120b")
    parser.add_argument("--format", default="mxfp4_moe")
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--shares")
    parser.add_argument("--memory", default="1G,2G,2500M")
    parser.add_argument("--head", default="1400M")
    parser.add_argument("--kinds", default="drawn,uniform,cycle")
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of the disk")
    parser.add_argument("--options", default="--audit off", help="of the runs")
    parser.add_argument("--no-groups", dest="groups", action="store_false")
    options = parser.parse_args()
    if options.folder.exists() and any(not file.name.endswith(".h5") for file in options.folder.iterdir()):
        sys.exit(f"{options.folder} holds other files than slices; give another folder, which is removed")
    found = study(options)
    columns = ("routing", "memory", "s/token", "cpu s", "in memory %", "guessed right %", "MB read", "disk GB/s")
    show(
        f"computing {found['compute_s']:.3f} s/token",
        (*columns, "reading s", "times", "ms waited a layer", "peaks MB"),
        [table(row) for row in found["rows"]],
    )


if __name__ == "__main__":
    main()
