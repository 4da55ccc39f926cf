"""The shell script that `doctor --hostfile` runs on a host over ssh, and what of this machine it looks for there."""

from __future__ import annotations

import json
import os
import platform
import queue
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tpimpi.diagnostics.doctor import host_probe
from tpimpi.star import MPICH, OPEN_MPI
from tpimpi.system.hostfile import Host
from tpimpi.system.network import Interface, interfaces

DEAD_HOST_S = 10.0  # seconds that a host which is down may take
CONNECT_S = 4.0  # seconds for a name, for a connection
SSH_S = 8.0  # seconds for ssh to say the first word
PROBE_S = 45.0  # seconds for all of it: a small board takes long to start Python
MAX_OUTPUT_CHARS = 1 << 20  # characters that a host may say: a login that prints for ever is no answer
_HELLO = "tpimpi-doctor"
_END_OF_PROBE = "TPIMPI_END_OF_PROBE"
_DAEMONS = {OPEN_MPI: ("prted", "orted"), MPICH: ("hydra_pmi_proxy",)}


# This machine


@dataclass(frozen=True)
class LocalFacts:
    """What this machine has, and other hosts need: mpirun and its daemon with their paths ("" where there is none)."""

    python: str
    folder: str
    mpi: str  # kind of the MPI library that mpi4py uses here
    mpi_version: str
    mpirun: str
    mpirun_kind: str
    daemon: str
    interfaces: list[Interface]
    facts: dict[str, Any]

    @property
    def addresses(self) -> set[str]:
        return {network.partition("/")[0] for interface in self.interfaces for network in interface.networks}


def local_facts() -> LocalFacts:
    """What is found here, in this process's environment."""
    facts = host_probe.facts()
    mpirun = shutil.which("mpirun") or shutil.which("mpiexec") or ""
    kind = _kind_of_launcher(mpirun) if mpirun else ""
    daemon = ""
    for name in _DAEMONS.get(kind, ()):
        beside = Path(mpirun).parent / name
        daemon = daemon or (str(beside) if beside.exists() else shutil.which(name) or "")
    return LocalFacts(
        python=sys.executable,
        folder=str(Path.cwd()),
        mpi=facts.get("mpi", ""),
        mpi_version=facts.get("mpi_version", ""),
        mpirun=mpirun,
        mpirun_kind=kind,
        daemon=daemon,
        interfaces=interfaces(),
        facts=facts,
    )


def _kind_of_launcher(mpirun: str) -> str:
    try:
        done = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=DEAD_HOST_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    said = done.stdout + done.stderr
    if "Open MPI" in said or "prterun" in said:
        return OPEN_MPI
    return MPICH if "HYDRA" in said.upper() else ""


# The script over ssh


def is_ssh(ssh: str) -> bool:
    """Whether a program takes what ssh takes; else it is one in its place, PROGRAM HOST COMMAND."""
    return Path(ssh).name == "ssh"


def ssh_command(ssh: str, host: Host) -> list[str]:
    """What runs a command on a host, without asking for anything; the command is to follow."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S:.0f}"] if is_ssh(ssh) else []
    return [ssh, *options, host.name]


def script(ours: LocalFacts, token: str, back: str) -> str:
    """What `sh -s` gets there: it tells what programs there are, and goes on as `host_probe` in our Python."""
    quoted = shlex.quote
    export = ""
    if ours.mpi == MPICH:  # which our environment may have chosen, and its launcher would tell
        for name in ("MPI4PY_MPIABI", "LD_LIBRARY_PATH"):
            if value := os.environ.get(name):
                export += f"export {name}={quoted(value)}\n"
    lines = [f"echo {_HELLO}", export.rstrip()]
    for name, test, path in (
        ("folder", "-d", ours.folder),
        ("python", "-x", ours.python),
        ("daemon", "-x", ours.daemon),
    ):
        lines.append(f"if [ {test} {quoted(path)} ]; then echo {name} yes; else echo {name} no; fi")
    lines += [
        f'echo "path-daemon $(command -v {name})"' for name in (Path(ours.daemon).name or "prted", *_DAEMONS[OPEN_MPI])
    ]
    lines.append('echo "other-python $(command -v python3) $(python3 --version 2>&1)"')
    arguments = " ".join(map(quoted, (token, back, platform.node(), f"{CONNECT_S:.0f}")))
    source = Path(host_probe.__file__).read_text(encoding="utf-8")
    lines += [
        f"if [ -x {quoted(ours.python)} ]; then exec {quoted(ours.python)} - {arguments} <<'{_END_OF_PROBE}'",
        source.rstrip("\n"),
        _END_OF_PROBE,
        "fi",
        "echo end",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def _lines(stream: IO[str] | None) -> Iterator[str]:
    """The lines of a pipe, until it ends or has said MAX_OUTPUT_CHARS characters."""
    assert stream is not None
    left = MAX_OUTPUT_CHARS
    while left > 0 and (line := stream.readline(left)):
        left -= len(line)
        yield line


class Probe:
    """The script, running on a host; and our listener, for it to call back."""

    def __init__(self, command: Sequence[str], ours: LocalFacts, own: str) -> None:
        self.own = own  # our address on the way there
        self.token = secrets.token_hex(8)
        self._end = time.monotonic() + PROBE_S
        self._listener = socket.create_server(("", 0))
        back = f"{own}:{self._listener.getsockname()[1]}" if own and ":" not in own else ""
        self.back = back
        threading.Thread(target=self._answer, daemon=True).start()
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that no ssh asks the terminal
            )
        except OSError as error:
            self._listener.close()
            self._errors.append(f"{command[0]}: {error.strerror}")
            self._lines.put(None)
            self._process = None  # type: ignore[assignment]
            return
        self._readers = [
            threading.Thread(target=work, daemon=True) for work in (self._read, self._read_errors, self._write(ours))
        ]
        for thread in self._readers:
            thread.start()

    def _write(self, ours: LocalFacts) -> Callable[[], None]:
        def write() -> None:
            assert self._process.stdin is not None
            try:
                self._process.stdin.write(script(ours, self.token, self.back))
                self._process.stdin.close()
            except OSError:
                pass  # it has ended, and says why

        return write

    def _read(self) -> None:
        said = 0
        for line in _lines(self._process.stdout):
            said += len(line)
            self._lines.put(line.rstrip("\n"))
        if said >= MAX_OUTPUT_CHARS:
            self._errors.append("it prints without end")
        self._lines.put(None)

    def _read_errors(self) -> None:
        self._errors.extend(_lines(self._process.stderr))

    def _answer(self) -> None:
        """Whoever comes with the token gets it back."""
        while True:
            try:
                line, _ = self._listener.accept()
                with line:
                    line.settimeout(CONNECT_S)
                    if line.recv(64) == self.token.encode():
                        line.sendall(self.token.encode())
            except OSError:
                if self._listener.fileno() < 0:
                    return

    def line(self, seconds: float) -> str | None:
        """The next line that the script says; None where it has ended, or says nothing for so long."""
        try:
            return self._lines.get(timeout=max(0.0, min(seconds, self._end - time.monotonic())))
        except queue.Empty:
            return None

    def hello(self) -> bool:
        """Whether the script runs; what a shell prints by itself before is passed over."""
        end = time.monotonic() + SSH_S
        while (line := self.line(end - time.monotonic())) is not None:
            if line == _HELLO:
                return True
        return False

    def stderr(self) -> str:
        """What came on its stderr, once it has ended."""
        if self._process is not None:
            try:
                self._process.wait(0.5)
                self._readers[1].join(0.5)
            except subprocess.TimeoutExpired:
                pass
        return "".join(self._errors)

    def facts(self) -> tuple[dict[str, str], dict[str, Any]]:
        """What the shell said, by name, and what Python said of itself (nothing where it is not there)."""
        shell_facts: dict[str, str] = {}
        while (line := self.line(PROBE_S)) is not None and line != "end":
            if line.startswith("tpimpi-probe "):
                found: dict[str, Any] = json.loads(line.partition(" ")[2])["facts"]
                return shell_facts, found
            name, _, value = line.partition(" ")
            shell_facts[name] = shell_facts.get(name) or value.strip()
        return shell_facts, {}

    def receive(self, name: str, seconds: float) -> Any:
        """The next thing of that name that Python says; None where it does not."""
        while (line := self.line(seconds)) is not None:
            if line.startswith("tpimpi-probe "):
                values = json.loads(line.partition(" ")[2])
                if name in values:
                    return values[name]
        return None

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *exception: object) -> None:
        self._listener.close()
        if self._process is None:
            return
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)  # also what a program in ssh's place has started
        self._process.wait()
