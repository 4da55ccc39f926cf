"""A run of conversations over the emulated home, with what each kind of attacker sees of it recorded."""

from __future__ import annotations

import datetime
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.attack.frames import Capture
from bench.home import Home, Link
from bench.home.devices import Device, equal_devices
from tpimpi.system.link_keys import PATH_VARIABLE, make_keys, write_keys

RANKS = 2
WATCHED = 1  # the rank, and device, that is looked at
TIMEOUT_S = 300.0
PLAIN = ("--seal", "off")
SEALED = ("--seal", "on")
OPTIONS = ("--allreduce", "star", "--parallel", "1", "--speculate", "off", "--ignore-eos", "--quiet")


@dataclass(frozen=True)
class Recording:
    """What was recorded of a run: messages of rank WATCHED, what its process opened, and the frames of its device; beside
    them what was said, which no attack sees."""

    messages: Path
    opened: Path
    frames: Path
    answers: list[list[int]]  # token ids, by conversation
    lost_frames: int


def make_slices(model: Path, folder: Path) -> Path:
    """The model cut for RANKS ranks, so that no run sends slices."""
    command = [sys.executable, "-m", "tpimpi", "slice", "--model", str(model), "--ranks", str(RANKS), "--out"]
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    return folder


def devices_with_keys(folder: Path) -> list[Device]:
    """Equal devices, each with link keys of its own."""
    devices = equal_devices(RANKS)
    made = make_keys([device.name for device in devices], datetime.datetime.now(tz=datetime.UTC).date().isoformat())
    paths = {name: str(write_keys(keys, folder / f"{name}.json")) for name, keys in made.items()}
    return [replace(device, env={PATH_VARIABLE: paths[device.name]}) for device in devices]


def home_with_keys(folder: Path) -> Home:
    """A home of such devices; keys are in `folder`."""
    return Home(devices_with_keys(folder), Link(latency_s=0.0001))


def batch_file(prompts: Sequence[str], path: Path) -> Path:
    """Prompts for --batch-file."""
    path.write_text(
        "".join(json.dumps({"custom_id": str(i), "prompt": prompt}) + "\n" for i, prompt in enumerate(prompts))
    )
    return path


def record_run(
    home: Home, folder: Path, slices: Path, prompts: Sequence[str], *, mpi: str, wire: str, sealed: bool, tokens: int
) -> Recording:
    """Answer the prompts, one after the other, with so many tokens each. Raises SystemExit where the run fails."""
    folder.mkdir(parents=True)
    report, frames = folder / "report.json", folder / "frames.pcap"
    options = ["--batch-file", str(batch_file(prompts, folder / "in.jsonl")), "--out", str(folder / "out.jsonl")]
    options += [*OPTIONS, *(SEALED if sealed else PLAIN), "--wire", wire, "--max-tokens", str(tokens)]
    options += ["--slices", str(slices), "--report", str(report)]
    command = [sys.executable, "-m", "bench.attack.record", str(folder), *(["--opened"] if sealed else []), "--"]
    with (
        Capture(home.socket(WATCHED, socket.AF_PACKET, socket.SOCK_RAW), frames) as capture,
        (folder / "said").open("w+") as said,
    ):
        process = home.mpirun([*command, *options], mpi=mpi, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
        try:
            code = process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            raise SystemExit(f"the run took over {TIMEOUT_S:.0f} s: {(folder / 'said').read_text()}") from None
    if code:
        raise SystemExit(f"the run ended with exit code {code}: {(folder / 'said').read_text()}")
    answers = [answer["token_ids"] for answer in json.loads(report.read_text())["answers"]]
    rank = folder / f"rank-{WATCHED}.messages"
    return Recording(rank, rank.with_suffix(".opened"), frames, answers, capture.lost)
