"""The wire of an emulated home: builds and steers delay_line.c; sockets and pings inside a device."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from tpimpi.errors import InputError, TpimpiError

SOURCE_FILE = Path(__file__).resolve().parent / "delay_line.c"
CLONE_NEWNET = 0x40000000  # of <sched.h>; os.setns is there from Python 3.12 on
SO_TIMESTAMPNS = 35  # of <asm-generic/socket.h>


class WireError(TpimpiError):
    """The delay line cannot be had, or has ended."""


def build() -> Path:
    """The delay line, compiled where it was not yet. Raises WireError."""
    program = (
        user_cache_path("tpimpi-bench") / f"delay_line-{hashlib.sha256(SOURCE_FILE.read_bytes()).hexdigest()[:16]}"
    )
    if program.exists():
        return program
    if (compiler := shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")) is None:
        raise WireError(f"no C compiler (cc) for {SOURCE_FILE.name}; install one (Debian: apt-get install gcc)")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as folder:
        made = Path(folder) / "delay_line"
        done = subprocess.run(
            [compiler, "-std=c11", "-O2", "-o", str(made), str(SOURCE_FILE)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise WireError(f"{compiler} cannot compile {SOURCE_FILE}: {done.stderr.strip()[-400:]}")
        made.replace(program)
    return program


@dataclass(frozen=True)
class Traffic:
    """What the wire carried since it was last asked, and how late (µs) it was of its own doing."""

    frames: int
    nbytes: int
    lost: int
    mean_late_us: float
    max_late_us: float


class Wire:
    """A running delay line between the network namespaces of these processes. Raises WireError."""

    def __init__(self, pids: Sequence[int], env: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [str(build()), *map(str, pids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(env),
            start_new_session=True,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        answer = self._process.stdout.readline().split()
        if answer[:1] != ["ready"]:
            raise WireError(self._process.stderr.read().strip() or "the delay line did not start")
        self.first = answer[1] == "first"  # runs before all other programs (SCHED_FIFO)

    def _ask(self, command: str) -> list[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with self._lock:
            try:
                self._process.stdin.write(command + "\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                raise WireError("the delay line has ended") from None
            answer = self._process.stdout.readline().split()
        if answer[:1] != ["ok"]:
            raise WireError(f"the delay line says {' '.join(answer)!r} to {command!r}")
        return answer[1:]

    def link(self, rank: int, latency_s: float, jitter_s: float, bandwidth: float | None) -> None:
        """Set the link of a device, at once, for what it sends from now on; `bandwidth` in bytes a second, each way."""
        rate = round(bandwidth or 0)
        self._ask(f"link {rank} {round(latency_s * 1e9)} {round(jitter_s * 1e9)} {rate} {rate}")

    def drop(self, rank: int, on: bool) -> None:
        """Whether all frames from and to this device vanish."""
        self._ask(f"drop {rank} {int(on)}")

    def traffic(self) -> Traffic:
        frames, nbytes, lost, mean, most = map(int, self._ask("stat"))
        return Traffic(frames, nbytes, lost, mean / 1e3, most / 1e3)

    def close(self) -> None:
        """End it; the interfaces go with it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def socket_in(pid: int, family: int, kind: int, proto: int = 0) -> socket.socket:
    """A socket in the network namespace of that process; any thread of ours may then use it."""
    made: list[socket.socket | OSError] = []

    def make() -> None:  # only this thread moves, and it ends with this
        try:
            fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            made.append(socket.socket(family, kind, proto))
        except OSError as error:
            made.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if isinstance(made[0], OSError):
        raise made[0]
    return made[0]


def ping(pid: int, address: str, count: int, interval_s: float, timeout_s: float) -> list[float]:
    """Round trips (seconds) of `count` echo requests of 56 bytes, as ping sends them; what is lost is left out.

    The kernel answers them, and notes when an answer comes, so busy processors hardly count.
    """
    trips: list[float] = []
    body = bytes(range(56))
    with socket_in(pid, socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        key = os.getpid() & 0xFFFF
        for number in range(count):
            time.sleep(interval_s)
            head = struct.pack("!BBHHH", 8, 0, 0, key, number)
            head = struct.pack("!BBHHH", 8, 0, _checksum(head + body), key, number)
            start = time.time_ns()
            try:
                sock.sendto(head + body, (address, 0))
            except OSError:  # its own interface is down
                continue
            while (left := start / 1e9 + timeout_s - time.time()) > 0 and select.select([sock], [], [], left)[0]:
                got, notes, _, _ = sock.recvmsg(2048, 256)
                icmp = got[(got[0] & 15) * 4 :]
                if icmp[0] == 0 and struct.unpack("!HH", icmp[4:8]) == (key, number):
                    stamps = [data for _, kind, data in notes if kind == SO_TIMESTAMPNS]
                    seconds, nanoseconds = struct.unpack("qq", stamps[0])
                    trips.append((seconds * 10**9 + nanoseconds - start) / 1e9)
                    break
    return trips


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def program_path(program: str) -> str:
    """The path of a program. Raises InputError."""
    if (found := shutil.which(program)) is None:
        raise InputError(
            f"no {program} on this machine, which the emulated home needs; install util-linux and iproute2"
        )
    return found
