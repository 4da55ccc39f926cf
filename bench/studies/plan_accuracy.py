"""How well `plan` predicts: a model of 1B shape, q4_0, on 1 to 4 hosts of an emulated home, at several latencies.

    python -m bench.studies.plan_accuracy [--latencies 0.3ms,1ms,5ms] [--hosts 4] [--cores 0.5] [--rounds 3] [--mpi MPI]
                                          [--json FILE]

In each round of a latency `plan` runs once, on all hosts, then a generation on 1, 2, … hosts with equal shares; figures are
medians over the rounds. A device has half a core, so that four have no more than the two cores that there are, and
one thread, as such a device would. Needs root, and 3 GB of disk in --folder for the slices, which stay for the next time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.home import Home
from bench.home.devices import Device, Link, equal_devices, parse_duration

# Llama 3.2 1B's, but untied and with SmolLM2's vocabulary: 1.17 B parameters.
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
CONTEXT, PROMPT = 128, 16
COMMON = ["--allreduce", "star", "--context", str(CONTEXT), "--threads", "1"]
RUN_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Row:
    """One line of the table: what plan said in each round, and the reports of the runs."""

    latency_s: float
    ranks: int
    predicted: list[dict[str, Any]]
    measured: list[dict[str, Any]]

    @property
    def ratio(self) -> float:
        return median(self._times(self.predicted)) / median(self._times(self.measured))

    def _times(self, found: list[dict[str, Any]]) -> list[float]:
        return [one["s_per_token"] for one in found]

    def __str__(self) -> str:
        cells = []
        for times in (self._times(self.predicted), self._times(self.measured)):
            cells.append(f"{median(times):.4f} ({min(times):.4f}, {max(times):.4f})")
        return f"{self.latency_s * 1e3:4.1f} ms  {self.ranks:5}  {cells[0]:>23}  {cells[1]:>22}  {self.ratio:18.2f}"


def make_slices(folder: Path, ranks: int) -> Path:
    """The slices for so many ranks, made if they are not there; returns the config's place."""
    shape = folder / "1b" / "config.json"
    shape.parent.mkdir(parents=True, exist_ok=True)
    shape.write_text(json.dumps(SHAPE))
    if not (folder / f"rank-{ranks - 1}-of-{ranks}.h5").exists():
        command = [sys.executable, "-m", "tpimpi", "synth", "--shape", str(shape), "--ranks", str(ranks)]
        subprocess.run([*command, "--out", str(folder), "--quiet"], check=True)
    return shape


def finished(home: Home, mpi: str, ranks: int, arguments: list[str]) -> None:
    """Run tpimpi on so many hosts. Raises RuntimeError, with what it said, where it fails."""
    process = home.mpirun(
        [sys.executable, "-m", "tpimpi", *arguments],
        ranks=ranks,
        mpi=mpi,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said, _ = process.communicate(timeout=RUN_TIMEOUT_S)
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} on {ranks}: exit code {process.returncode}\n{said}")


def predict(home: Home, mpi: str, hosts: int, shape: Path, report: Path) -> dict[int, dict[str, Any]]:
    """What `plan` says of equal shares, by the number of ranks."""
    arguments = [
        "plan",
        "--shape",
        str(shape),
        "--prompt-tokens",
        str(PROMPT),
        *COMMON,
        "--json",
        str(report),
        "--quiet",
    ]
    finished(home, mpi, hosts, arguments)
    plans = json.loads(report.read_text())["plans"]
    return {found["ranks"]: found for found in plans if found["kind"] == "equal"}


def run(home: Home, mpi: str, ranks: int, slices: Path, tokens: int, report: Path) -> dict[str, Any]:
    """What a generation took."""
    prompt = report.with_name("prompt.txt")
    prompt.write_text(" ".join(map(str, range(100, 100 + PROMPT))))
    arguments = ["--slices", str(slices), "--raw", "--prompt-file", str(prompt), "--ignore-eos", *COMMON]
    arguments += ["--speculate", "off"]
    finished(home, mpi, ranks, [*arguments, "--max-tokens", str(tokens), "--report", str(report), "--quiet"])
    whole = json.loads(report.read_text())
    figures = ("rank", "compute_s", "star_s", "read_wait_s")
    ranks_did = [{name: rank[name] for name in figures} for rank in whole["ranks"]]
    return {"s_per_token": whole["s_per_token"], "first_token_s": whole["ttft_s"], "ranks": ranks_did}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latencies", default="0.3ms,1ms,5ms", help="one way (default %(default)s)")
    parser.add_argument("--hosts", type=int, default=4, help="default 4")
    parser.add_argument("--cores", type=float, default=0.5, help="of each (default 0.5); 0: no limit")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--tokens", type=int, default=48, help="of each run (default 48)")
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp/tpimpi-plan-accuracy"), help="default %(default)s"
    )
    parser.add_argument("--mpi", choices=("openmpi", "mpich"), default="openmpi")
    parser.add_argument("--json", type=Path, help="write the figures")
    options = parser.parse_args()
    for ranks in range(1, options.hosts + 1):
        shape = make_slices(options.folder, ranks)
    devices = [Device(device.name, cores=options.cores or None) for device in equal_devices(options.hosts)]
    latencies = [parse_duration(text, "--latencies") for text in options.latencies.split(",")]
    rows = []
    print("latency  hosts  predicted (least, most)  measured (least, most)  predicted/measured", flush=True)
    with tempfile.TemporaryDirectory() as scratch, Home(devices, Link(latency_s=latencies[0])) as home:
        report = Path(scratch) / "report.json"
        for latency in latencies:
            home.set_link(Link(latency_s=latency))
            predicted: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in range(1, options.hosts + 1)}
            measured: dict[int, list[dict[str, Any]]] = {ranks: [] for ranks in predicted}
            for _ in range(options.rounds):
                for ranks, one in predict(home, options.mpi, options.hosts, shape, report).items():
                    predicted[ranks].append(one)
                    measured[ranks].append(run(home, options.mpi, ranks, options.folder, options.tokens, report))
            for ranks, found in predicted.items():
                rows.append(Row(latency, ranks, found, measured[ranks]))
                print(rows[-1], flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"cores": options.cores, "rows": [asdict(row) for row in rows]}, indent=1))
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    print(f"worst: {worst.ratio:.2f}, {worst.ranks} hosts at {worst.latency_s * 1e3:g} ms")


if __name__ == "__main__":
    main()
