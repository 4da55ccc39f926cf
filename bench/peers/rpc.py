"""llama.cpp over several devices: its layers split among them, as its tools/rpc/README.md says.

    binaries = build_rpc(environments)
    figures = run_rpc(home, model, binaries, prompt=16, tokens=16, threads=1, layers=22, timeout=600)

Device 0 runs llama-bench, which has the file; each other device runs ggml-rpc-server and is sent its layers. Device 0 keeps
an equal part of the layers, and the output head. No token is taken from another program: llama-bench makes up its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import FileLock

from bench.home import Home
from bench.peers.peers import PeerError, drop_from_page_cache

NAME = "llama.cpp-rpc"
PORT = 50052
START_S = 30.0  # for a server to listen
BUILD = Path(__file__).resolve().parents[1] / "studies" / "llama_cpp.sh"
PROGRAMS = ("llama-bench", "ggml-rpc-server")


def build_rpc(environments: Path) -> Path:
    """The folder with the programs, built under `environments` where they are not there. Raises PeerError."""
    place = environments.resolve() / NAME
    binaries, log = place / "llama.cpp" / "bin", place.with_name(f"{NAME}.log")
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f"{NAME}.lock")):
        if not all((binaries / name).exists() for name in PROGRAMS):
            print(f"peers: building {NAME} in {place} (about ten minutes on two cores; log: {log})", file=sys.stderr)
            with log.open("w") as output:
                command = ["bash", str(BUILD), str(place)]
                done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False)
            if done.returncode:
                raise PeerError(f"{NAME} could not be built; see {log}")
    return binaries


def run_rpc(
    home: Home, model: Path, binaries: Path, *, prompt: int, tokens: int, threads: int, layers: int, timeout: float
) -> dict[str, Any]:
    """Figures of a GGUF file of so many layers on all devices of the home; times in seconds.

    `prompt` and `tokens` are numbers of positions. s_per_token is a mean, as llama-bench has no other. Raises PeerError.
    """
    ranks = len(home.devices)
    drop_from_page_cache(model)
    servers = [
        home.start(
            rank,
            [str(binaries / "ggml-rpc-server"), "-H", "0.0.0.0", "-p", str(PORT), "-t", str(threads)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(1, ranks)
    ]
    elsewhere = layers - -(-layers // ranks)  # of the layers
    command = [str(binaries / "llama-bench"), "-m", str(model), "-t", str(threads), "-r", "1", "-o", "json"]
    command += ["-p", str(prompt), "-n", str(tokens), "-ngl", str(elsewhere)]
    command += ["--rpc", ",".join(f"{home.addresses[rank]}:{PORT}" for rank in range(1, ranks))]
    try:
        for rank in range(1, ranks):
            _wait_for(home, rank)
        process = home.start(
            0, command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        servers.append(process)
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return {"killed": f"took over {timeout:g} s"}
    finally:
        for server in servers:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)  # it leads a session of its own
                server.wait()
    if process.returncode:
        raise PeerError(f"{NAME} ended with {process.returncode}: {err.strip()[-300:]}")
    found = json.loads(out)
    rates = {("prompt" if one["n_prompt"] else "decode"): one["avg_ts"] for one in found}
    return {
        "ttft_s": prompt / rates["prompt"],
        "s_per_token": 1 / rates["decode"],
        "layers_elsewhere": elsewhere,
        "versions": {"llama.cpp": found[0]["build_commit"]},
    }


def _wait_for(home: Home, rank: int) -> None:
    """Until the server on device `rank` takes connections. Raises PeerError."""
    ends = time.monotonic() + START_S
    while True:
        with home.socket(0, socket.AF_INET) as probe:
            probe.settimeout(1.0)
            if probe.connect_ex((home.addresses[rank], PORT)) == 0:
                return
        if time.monotonic() > ends:
            raise PeerError(f"{NAME} does not listen on {home.names[rank]} after {START_S:g} s")
        time.sleep(0.1)
