"""How far the emulated devices are from what was asked for, and what the emulation itself costs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.experiments.rows import Row
from bench.experiments.site import ROOT, Figures, RunError, Site, finish, last_line, link_of
from bench.home import Home
from bench.home.devices import Device, Link, equal_devices

ROUNDS = 3  # of what is compared in turn
SHARE_S = 1.0  # processor seconds that measure a device's share
ASKED_CORES, ASKED_READ_BPS, ASKED_BANDWIDTH_BPS = 0.5, 200_000_000, 37_500_000  # bytes a second
STREAM_BYTES, STREAM_TIMEOUT_S = 16 << 20, 30.0  # that measure a link's bandwidth; it may take so long


def emulation(row: Row, site: Site) -> Figures:
    """Latency, processor share, disk and bandwidth of the emulated devices, beside what was wished."""
    site.work.mkdir(parents=True, exist_ok=True)
    file = site.work / "disk.bin"
    program = (
        "import time; a = time.perf_counter(); p = time.process_time()\n"
        f"while time.process_time() - p < {SHARE_S}: pass\n"
        "print(time.perf_counter() - a)"
    )
    devices = [Device("laptop", cores=ASKED_CORES, read_bps=ASKED_READ_BPS, cache=site.work), *equal_devices(4)[1:]]
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
        home.set_link(replace(link_of(row), bandwidth=ASKED_BANDWIDTH_BPS))
        bandwidth = stream_rate(home)
    wished = link_of(row).latency_s
    return {
        "latency_wished_s": wished,
        "latency_s": median(trips) / 2,
        "cores_wished": ASKED_CORES,
        "cores": SHARE_S / seconds,
        "read_wished_bps": ASKED_READ_BPS,
        "read_bps": rate,
        "bandwidth_wished": ASKED_BANDWIDTH_BPS,
        "bandwidth": bandwidth,
    }


def stream_rate(home: Home) -> float:
    """Bytes a second of one TCP connection from device 0 to device 1; without its start, in which TCP feels its way."""
    with home.socket(1) as listener, home.socket(0) as sender:
        for each in (listener, sender):
            each.settimeout(STREAM_TIMEOUT_S)
        listener.bind((home.addresses[1], 0))
        listener.listen()
        sender.connect(listener.getsockname())
        taker, _ = listener.accept()
        with taker, ThreadPoolExecutor(1) as pool:  # both ends are served at once
            taker.settimeout(STREAM_TIMEOUT_S)
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
            raise RunError(f"bench disk: exit code {done.returncode}: {last_line(done.stderr)}")
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
        command += ["--allreduce", row.allreduce, "--seal", "off", "--speculate", "off", "--report", str(report)]
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
                code, _, err = finish(start(), 300)
                if code:
                    raise RunError(f"{name}: exit code {code}: {last_line(err)}")
                times[name].append(json.loads(report.read_text(encoding="utf-8"))["s_per_token"])
    return {"s_per_token": {name: median(found) for name, found in times.items()}, "all": times}
