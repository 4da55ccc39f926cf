"""What a process of a run shows to who looks at it from outside: /proc, and its memory where that may be read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHUNK_BYTES = 1 << 24
PAGE_BYTES = 4096
OVERLAP_BYTES = 1 << 10  # longer than any pattern


@dataclass(frozen=True)
class Shown:
    """Of one process: what all processes of its user may read of it."""

    arguments: bytes
    environment: bytes
    maps: str
    files: list[str]
    max_core_bytes: int
    swapped_bytes: int

    @classmethod
    def of(cls, pid: int) -> Shown:
        folder = Path(f"/proc/{pid}")
        files = []
        for entry in (folder / "fd").iterdir():
            try:
                files.append(str(entry.readlink()))
            except OSError:
                continue
        status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
        limits = (folder / "limits").read_text().splitlines()
        (core,) = [line.split()[5] for line in limits if line.startswith("Max core file size")]
        return cls(
            (folder / "cmdline").read_bytes(),
            (folder / "environ").read_bytes(),
            (folder / "maps").read_text(),
            files,
            1 << 62 if core == "unlimited" else int(core),
            int(status["VmSwap"].split()[0]) << 10,
        )


def memory_of(pid: int) -> Iterator[bytes]:
    """What is in a process's memory, in pieces that overlap; without what it cannot have written itself (files that are
    mapped for reading) and without pages of zeros. Raises PermissionError where this user may not look."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            addresses, rights, _, _, inode, *name = line.split(maxsplit=5)
            mapped = inode != "0" and "w" not in rights
            if "r" not in rights or mapped or name[:1] in (["[vvar]"], ["[vvar_vclock]"], ["[vsyscall]"]):
                continue
            begin, end = (int(address, 16) for address in addresses.split("-"))
            before = b""
            for place in range(begin, end, CHUNK_BYTES):
                try:
                    memory.seek(place)
                    piece = memory.read(min(CHUNK_BYTES, end - place))
                except (OSError, OverflowError):  # given back meanwhile
                    break
                pages = np.frombuffer(piece, np.uint8).reshape(-1, PAGE_BYTES)
                yield before + pages[pages.any(axis=1)].tobytes()
                before = piece[-OVERLAP_BYTES:]


def found_in_memory(pid: int, patterns: list[tuple[str, bytes]]) -> tuple[set[str], int]:
    """Which of the (name, bytes) are in a process's memory, and how many bytes were looked at. Each pattern takes about a
    second a gigabyte."""
    found: set[str] = set()
    looked_at = 0
    for piece in memory_of(pid):
        found.update(name for name, pattern in patterns if pattern in piece)
        looked_at += len(piece)
    return found, looked_at
