"""Where the kernel has its control groups, and the files of one: version 1 and version 2.

Documentation/admin-guide/cgroup-v1 and Documentation/admin-guide/cgroup-v2.rst say what the files mean.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tpimpi.errors import TpimpiError
from tpimpi.system.disk import MOUNTINFO, mounts

LARGEST_CHARGE_BYTES = 2 << 20  # that the kernel counts at once: a large page
_V1_NAMES = {"memory": "memory", "cpu": "cpu", "io": "blkio"}  # of the controllers


class LimitError(TpimpiError):
    """Control groups cannot be had here, or not with these limits."""


@dataclass(frozen=True)
class Trees:
    """Where the groups are mounted; `v1` by the name that the controller has in v2."""

    v1: Mapping[str, Path]
    v2: Path | None


def find_trees(mountinfo: Path = MOUNTINFO) -> Trees:
    """The mounted trees of groups, of both versions."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for mount in mounts(mountinfo):
        if mount.kind == "cgroup":
            controllers = mount.options.split(",")
            for name, old in _V1_NAMES.items():
                if old in controllers:
                    v1.setdefault(name, mount.point)
        elif mount.kind == "cgroup2" and v2 is None:
            v2 = mount.point
    return Trees(v1, v2)


class GroupFilesV1:
    """The folders and files of a group in version 1: a folder in the tree of each controller."""

    def __init__(self, trees: Trees, name: str, controllers: Collection[str]) -> None:
        if missing := [name for name in controllers if name not in trees.v1]:
            raise LimitError(f"no control groups (v1) for {', '.join(missing)} are mounted here")
        # Some controllers share a tree (cpu,cpuacct); each folder once.
        self.of = {controller: trees.v1[controller] / name for controller in controllers}
        self.folders = list(dict.fromkeys(self.of.values()))

    def prepare(self) -> None:
        """Before the folders are made: nothing to do."""

    def set_memory(self, nbytes: int) -> None:
        write_file(self.of["memory"] / "memory.limit_in_bytes", str(nbytes))
        with contextlib.suppress(LimitError):  # not every kernel counts swap
            write_file(self.of["memory"] / "memory.memsw.limit_in_bytes", str(nbytes))

    def set_cpu(self, quota_us: int, period_us: int) -> None:
        write_file(self.of["cpu"] / "cpu.cfs_period_us", str(period_us))
        write_file(self.of["cpu"] / "cpu.cfs_quota_us", str(quota_us))

    def set_bps(self, what: str, disk: str, rate: int | None) -> None:
        write_file(self.of["io"] / f"blkio.throttle.{what}_bps_device", f"{disk} {rate or 0}")  # 0 removes it

    def peak(self) -> int | None:
        return read_number(self.of["memory"] / "memory.max_usage_in_bytes")

    def usage(self) -> int:
        return read_number(self.of["memory"] / "memory.usage_in_bytes") or 0

    def limit_hits(self) -> int:
        # Memory and swap together are charged first, so where both have the same limit only their counter counts.
        folder = self.of["memory"]
        hits = (read_number(folder / "memory.failcnt") or 0) + (read_number(folder / "memory.memsw.failcnt") or 0)
        control = folder / "memory.oom_control"
        hits += (
            sum(int(n) for n in re.findall(r"^oom_kill (\d+)$", read_file(control), re.M)) if control.exists() else 0
        )
        # There are kernels (6.18) whose failcnt stays 0 whatever happens. At most LARGEST_CHARGE_BYTES are refused.
        limit, peak = read_number(folder / "memory.limit_in_bytes"), self.peak()
        near = limit is not None and peak is not None and peak + LARGEST_CHARGE_BYTES > limit
        return max(hits, int(near))


class GroupFilesV2:
    """The folder and files of a group in version 2: one folder for all controllers."""

    def __init__(self, trees: Trees, name: str, controllers: Collection[str]) -> None:
        if trees.v2 is None:
            raise LimitError("no control groups are mounted here")
        self._top, self._controllers = trees.v2, sorted(controllers)
        self.folders = [trees.v2 / name]
        self._folder = self.folders[0]

    def prepare(self) -> None:
        """Have the tree give its controllers to the groups in it. They stay enabled, as systemd leaves them."""
        has = read_file(self._top / "cgroup.controllers").split()
        if missing := [name for name in self._controllers if name not in has]:
            raise LimitError(f"the control groups (v2) in {self._top} have no controller {', '.join(missing)}")
        given = read_file(self._top / "cgroup.subtree_control").split()
        if lacking := [f"+{name}" for name in self._controllers if name not in given]:
            write_file(self._top / "cgroup.subtree_control", " ".join(lacking))

    def set_memory(self, nbytes: int) -> None:
        write_file(self._folder / "memory.max", str(nbytes))
        with contextlib.suppress(LimitError):  # not every kernel counts swap
            write_file(self._folder / "memory.swap.max", "0")

    def set_cpu(self, quota_us: int, period_us: int) -> None:
        write_file(self._folder / "cpu.max", f"{quota_us} {period_us}")

    def set_bps(self, what: str, disk: str, rate: int | None) -> None:
        write_file(self._folder / "io.max", f"{disk} {what[0]}bps={rate or 'max'}")

    def peak(self) -> int | None:
        return read_number(self._folder / "memory.peak")

    def usage(self) -> int:
        return read_number(self._folder / "memory.current") or 0

    def limit_hits(self) -> int:
        events = dict(line.split() for line in read_file(self._folder / "memory.events").splitlines())
        return int(events["max"]) + int(events["oom"])


def read_file(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise LimitError(f"{path} cannot be read: {error.strerror}") from error


def write_file(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)  # not write_text, which would make a file that is not there
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise LimitError(f"{text!r} cannot be written to {path}: {error.strerror}") from error


def read_number(path: Path) -> int | None:
    """What the file says, or None where this kernel has no such file."""
    return int(read_file(path)) if path.exists() else None
