"""What the rows of bench/experiments.toml do, each as a function of the row: it measures, and returns figures.

Times are in seconds, sizes in bytes. A row with devices runs in an emulated home of its own (home.py), unless a launcher is
given: then on the machines that it reaches, with no limits but their own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from experiment_machines import predictions
from experiment_models import FOLDER, Models
from experiment_rows import LAUNCHER_BYTES, Row
from home import Home
from home_devices import Device, Link, equal_devices, parse_bandwidth, parse_duration
from limits import Group
from peers import ENVIRONMENTS_FOLDER, prepare, run_peer

from tpimpi.errors import TpimpiError

ROOT = Path(__file__).resolve().parent.parent
DECODE, PREFILL = 4096, 128 * 4096  # numbers of a 7B model's allreduce: of one position, and of 128
ROUNDS = 3  # of what is compared in turn
GRACE_S = 5.0  # for a launcher to end
REPEATS = 5  # of each sum
SHARE_S = 1.0  # processor seconds that measure a device's share
WISHED_CORES, WISHED_READ, WISHED_BANDWIDTH = 0.5, 200_000_000, 37_500_000
STREAM_BYTES, STREAM_S = 16 << 20, 30.0  # that measure a link's bandwidth; it may take so long
Figures = dict[str, Any]


class RunError(TpimpiError):
    """A run ended otherwise than it should."""


@dataclass(frozen=True)
class Site:
    """Where rows run: the work folder, and the launcher's words if it is not an emulated home ("mpirun -np {ranks} …")."""

    work: Path
    launch: str = ""

    @property
    def models(self) -> Models:
        return Models(self.work / FOLDER)

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        """For the files of one run, where all machines see it."""
        self.work.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=self.work)


# The home


def devices_of(row: Row, folder: Path) -> list[Device]:
    """The row's devices, with its limits; `folder` is on the disk whose reading is limited, that of the slices."""
    return [
        Device(
            device.name,
            cores=row.cores,
            memory=row.memory_bytes,
            read_bps=row.read_bps,
            cache=folder / device.name if row.read_bps else None,  # the limit is that of the cache's disk
        )
        for device in equal_devices(row.devices)
    ]


def link_of(row: Row) -> Link:
    """The row's link."""
    latency = parse_duration(row.latency, "latency") if row.latency else 0.0
    return Link(latency, 0.0, parse_bandwidth(row.bandwidth, "bandwidth") if row.bandwidth else None)


@dataclass(frozen=True)
class Ended:
    """How a run ended; `groups` are its devices', read before they were removed."""

    code: int
    out: str
    err: str
    peaks: list[int | None]
    hits: int


def _finish(process: subprocess.Popen[str], timeout: float) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:
        process.terminate()  # so that the launcher ends its ranks
        try:
            process.communicate(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RunError(f"it took over {timeout:.0f} s") from None
        raise
    return process.returncode, out, err


def run(row: Row, site: Site, arguments: Sequence[str], stdin: Path | None = None) -> Ended:
    """tpimpi with these arguments, a rank on each of the row's devices. Raises RunError where it takes too long."""
    command = [sys.executable, "-m", "tpimpi", *arguments]
    if stdin is not None:  # not by way of the launcher: some never say that it ends
        command = ["sh", "-c", 'exec "$@" <"$0"', str(stdin), *command]
    timeout = 300 + 5 * row.expected_s
    pipes: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    if site.launch:
        words = shlex.split(site.launch.replace("{ranks}", str(row.devices)))
        process = subprocess.Popen([*words, *command], start_new_session=True, **pipes)
        return Ended(*_finish(process, timeout), [], 0)
    with site.folder() as folder, Home(devices_of(row, Path(folder)), link_of(row)) as home:
        process = home.mpirun(command, mpi=row.mpi, **pipes)
        code, out, err = _finish(process, timeout)
        groups: list[Group] = [group for group in home.groups if group is not None]
        limited = [group for group in groups if row.memory_bytes]
        return Ended(code, out, err, [group.peak() for group in groups], sum(group.limit_hits() for group in limited))


# A generation


def generate(row: Row, site: Site) -> Figures:
    """Two answers to the same prompt: the first token with nothing loaded, and with the pinned tiles there; s/token."""
    chosen = _chosen(row, site)
    slices = site.models.make(row, chosen["shares"], chosen)
    with site.folder() as folder:
        report = Path(folder, "report.json")
        prompts = Path(folder, "prompts.txt")
        prompts.write_text(2 * (" ".join(str(100 + number) for number in range(row.prompt)) + "\n"))
        arguments = ["--slices", str(slices), "--raw", "--ignore-eos", "--max-tokens", str(row.answer_tokens)]
        arguments += ["--context", str(row.context), "--allreduce", row.allreduce]
        arguments += ["--threads", str(row.threads)] if row.threads else []
        arguments += [*_memory(row, site, arguments), "--report", str(report), "--quiet"]
        ended = run(row, site, arguments, prompts)
        if ended.code:
            raise RunError(f"exit code {ended.code}: {_last(ended.err)}")
        if not report.exists():
            raise RunError(f"it ended without a report: {_last(ended.err)}")
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
        arguments += ["--prompt-tokens", str(row.prompt), "--allreduce", row.allreduce, "--json", str(report)]
        arguments += ["--layers", str(row.layers)] if row.layers else []
        arguments += ["--threads", str(row.threads)] if row.threads else []
        ended = run(row, site, [*arguments, *_memory(row, site, [])])
        if ended.code:
            raise RunError(f"plan: exit code {ended.code}: {_last(ended.err)}")
        plans = json.loads(report.read_text(encoding="utf-8"))["plans"]
    best = [found for found in plans if found["ranks"] == row.devices][-1]
    predicted = {"s_per_token": best["s_per_token"], "ttft_s": best["first_token_s"], "limit": best["limit"]}
    return {"shares": best["shares"], "predicted": predicted}


def _figures(found: dict[str, Any], ended: Ended) -> Figures:
    cold, warm = found["answers"]
    if cold["token_ids"] != warm["token_ids"]:
        raise RunError("the two answers to the same prompt differ")
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
            raise RunError(f"no refusal of --memory 1M: {_last(refused.err)}")
        return ["--memory", match[1] + match[2]]
    if row.budget != "fit":
        return ["--memory", row.budget]
    return [] if row.memory_bytes is None else ["--memory", str(row.memory_bytes - LAUNCHER_BYTES)]


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith(("tpimpi", "r0", "r1", "error"))]
    return (ours or lines or ["it said nothing"])[-1][:300]


# What others take


def peer(row: Row, site: Site) -> Figures:
    """Another program on one such device; `killed` where the limit ended it."""
    model = site.models.make(row)
    model = model / "model.gguf" if (model / "model.gguf").exists() else model
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


# Sums, texts, predictions


def allreduce(row: Row, site: Site) -> Figures:
    """Every way of adding, for the sizes of a 7B model's decode and prefill."""
    with site.folder() as folder:
        report = Path(folder, "found.json")
        sizes = ["--sizes", f"{DECODE},{PREFILL}", "--repeats", str(REPEATS)]
        ended = run(row, site, ["bench", "allreduce", "--quiet", *sizes, "--json", str(report)])
        if ended.code:
            raise RunError(f"exit code {ended.code}: {_last(ended.err)}")
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
            raise RunError(f"exit code {done.returncode}: {_last(done.stderr)}")
        found = json.loads(report.read_text(encoding="utf-8"))
    return {name: value for name, value in found.items() if name not in ("ranks", "text")}


def predict(row: Row, site: Site) -> Figures:
    """What `plan`'s arithmetic says of machines that are described, not measured."""
    return predictions(row)


# The emulation's own error


def emulation(row: Row, site: Site) -> Figures:
    """Latency, processor share, disk and bandwidth of the emulated devices, beside what was wished."""
    site.work.mkdir(parents=True, exist_ok=True)
    file = site.work / "disk.bin"
    program = (
        "import time; a = time.perf_counter(); p = time.process_time()\n"
        f"while time.process_time() - p < {SHARE_S}: pass\n"
        "print(time.perf_counter() - a)"
    )
    devices = [Device("laptop", cores=WISHED_CORES, read_bps=WISHED_READ, cache=site.work), *equal_devices(4)[1:]]
    with Home(devices, link_of(row)) as home:
        home.ping(0, 1, 3)
        trips = home.ping(0, 1, 200, 0.005)
        seconds = float(home.run(0, [sys.executable, "-c", program]).stdout)
        try:
            with file.open("wb") as stream:
                for _ in range(64):
                    stream.write(bytes(range(256)) * (1 << 15))
            rate = _disk(home, file)
        finally:
            file.unlink(missing_ok=True)
        home.set_link(replace(link_of(row), bandwidth=WISHED_BANDWIDTH))
        bandwidth = stream_rate(home)
    wished = link_of(row).latency_s
    return {
        "latency_wished_s": wished,
        "latency_s": median(trips) / 2,
        "cores_wished": WISHED_CORES,
        "cores": SHARE_S / seconds,
        "read_wished_bps": WISHED_READ,
        "read_bps": rate,
        "bandwidth_wished": WISHED_BANDWIDTH,
        "bandwidth": bandwidth,
    }


def stream_rate(home: Home) -> float:
    """Bytes a second of one TCP connection from device 0 to device 1; without its start, in which TCP feels its way."""
    with home.socket(1) as listener, home.socket(0) as sender:
        for each in (listener, sender):
            each.settimeout(STREAM_S)
        listener.bind((home.addresses[1], 0))
        listener.listen()
        sender.connect(listener.getsockname())
        taker, _ = listener.accept()
        with taker, ThreadPoolExecutor(1) as pool:  # both ends are served at once
            taker.settimeout(STREAM_S)
            sent = pool.submit(sender.sendall, bytes(STREAM_BYTES))
            got, before = 0, None
            while got < STREAM_BYTES:
                part = len(taker.recv(1 << 16))
                if not part:
                    raise RunError(f"a connection between two devices ended after {got} of {STREAM_BYTES} bytes")
                got += part
                if before is None and got >= STREAM_BYTES // 4:
                    before = got, time.perf_counter()
            assert before is not None
            seconds = time.perf_counter() - before[1]
            sent.result()
    return (STREAM_BYTES - before[0]) / seconds


def _disk(home: Home, file: Path) -> float:
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        report = Path(folder, "disk.json")
        command = [sys.executable, "-m", "tpimpi", "bench", "disk", str(file), "--seconds", "1", "--json", str(report)]
        done = home.run(0, command, timeout=120)
        if done.returncode:
            raise RunError(f"bench disk: exit code {done.returncode}: {_last(done.stderr)}")
        return max(float(each["rate"]) for each in json.loads(report.read_text())["rows"])


def ways(row: Row, site: Site) -> Figures:
    """The same ranks through shared memory, through TCP on the loopback, and in a home with no limits: s/token."""
    slices = site.models.make(row)
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        raise RunError("no mpirun: source .venv/bin/activate")
    with tempfile.TemporaryDirectory() as folder, Home(row.devices, Link()) as home:
        report = Path(folder, "report.json")
        prompt = Path(folder, "prompt.txt")
        prompt.write_text(" ".join(str(100 + number) for number in range(row.prompt)))
        command = [sys.executable, "-m", "tpimpi", "--slices", str(slices), "--raw", "--ignore-eos", "--quiet"]
        command += ["--prompt-file", str(prompt), "--max-tokens", str(row.tokens), "--threads", "1"]
        command += ["--allreduce", row.allreduce, "--report", str(report)]
        plain = [mpirun, "-np", str(row.devices), "--hostfile", str(ROOT / "hostfiles" / "local.txt")]

        def launched(words: Sequence[str]) -> subprocess.Popen[str]:
            return subprocess.Popen([*words, *command], start_new_session=True, **quiet)

        quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        quiet["text"] = True
        starts: dict[str, Callable[[], subprocess.Popen[str]]] = {
            "shared memory": lambda: launched(plain),
            "loopback": lambda: launched([*plain, "--mca", "btl", "self,tcp"]),
            "home": lambda: home.mpirun(command, mpi=row.mpi, **quiet),
        }
        times: dict[str, list[float]] = {name: [] for name in starts}
        for _ in range(ROUNDS):
            for name, start in starts.items():
                code, _, err = _finish(start(), 300)
                if code:
                    raise RunError(f"{name}: exit code {code}: {_last(err)}")
                times[name].append(json.loads(report.read_text(encoding="utf-8"))["s_per_token"])
    return {"s_per_token": {name: median(found) for name, found in times.items()}, "all": times}


_WAYS: dict[str, Callable[[Row, Site], Figures]] = {
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
    figures = _WAYS[row.measure](row, site)
    return figures, time.monotonic() - started
