"""Control groups for programs, with less memory, processor or disk than the machine has; Linux, as root.

    with Group("name", memory=700_000_000, cpu=0.5, read_bps=200_000_000, device=Path("slices")) as group:
        subprocess.run(group.command(["python", "-m", "tpimpi", …]))
        print(group.peak(), group.limit_hits())

Both versions of the kernel's groups are used: v1 where it has the memory controller, else v2. What counts as memory in both
is what the processes touched first: their own memory, page cache, shared memory. Files that others have read already, such
as libraries, are not charged again. Groups are made at the top of the mounted tree, which in a container is the container's
own.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.limits.trees import GroupFilesV1, GroupFilesV2, LimitError, Trees, find_trees, read_file
from tpimpi.system.disk import mount_of

CPU_PERIOD_US = 100_000
SHORTEST_QUOTA_US = 1000  # the kernel refuses less
REMOVAL_TIMEOUT_S = 10.0  # for what is left in a group to die
RANK_VARIABLE = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:?mpirun gave no rank}}"


class Group:
    """A control group; `with` makes it, and at the end kills what is left in it and removes it.

    `memory` in bytes; `cpu` in cores, handed out anew every `cpu_period_us`; `read_bps` and `write_bps` in bytes a second,
    from and to the disk that `device` (any path on it, or its MAJOR:MINOR) means; v1 limits only direct writing.
    `controllers` are made ready besides those that these need. Raises LimitError.
    """

    def __init__(
        self,
        name: str,
        *,
        memory: int | None = None,
        cpu: float | None = None,
        cpu_period_us: int = CPU_PERIOD_US,
        read_bps: int | None = None,
        write_bps: int | None = None,
        device: Path | str | None = None,
        controllers: Iterable[str] = (),
        trees: Trees | None = None,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise LimitError(f"a group cannot be named {name!r}; use letters, digits, _ and -")
        if (read_bps, write_bps) != (None, None) and device is None:
            raise LimitError(
                f"{'write' if read_bps is None else 'read'}_bps needs device, a path on the disk that is meant"
            )
        self.name, self.memory, self.cpu, self.read_bps, self.write_bps = name, memory, cpu, read_bps, write_bps
        self._cpu_period_us = cpu_period_us
        self._disk = disk_number(device) if isinstance(device, Path) else device
        needed = {"memory", *controllers} | ({"cpu"} if cpu is not None else set()) | ({"io"} if device else set())
        trees = trees or find_trees()
        self._files: GroupFilesV1 | GroupFilesV2 = (GroupFilesV1 if "memory" in trees.v1 else GroupFilesV2)(
            trees, name, needed
        )

    def __enter__(self) -> Group:
        self._files.prepare()
        try:
            for folder in self._files.folders:
                _make(folder)
            if self.memory is not None:
                self._files.set_memory(self.memory)
            if self.cpu is not None:
                period = max(self._cpu_period_us, math.ceil(SHORTEST_QUOTA_US / self.cpu))
                self._files.set_cpu(round(self.cpu * period), period)
            if self.read_bps is not None:
                self.set_read_bps(self.read_bps)
            if self.write_bps is not None and self._disk is not None:
                self._files.set_bps("write", self._disk, self.write_bps)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def folders(self) -> list[Path]:
        """Where its files are."""
        return self._files.folders

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv`, run inside the group. A shell enters it and becomes the program, so nothing but the program is counted."""
        return _enter(self.folders, argv)

    def peak(self) -> int | None:
        """The most memory, in bytes, that it ever held; None where the kernel does not tell (v2 before Linux 5.19)."""
        return self._files.peak()

    def usage(self) -> int:
        """Bytes that it holds now."""
        return self._files.usage()

    def limit_hits(self) -> int:
        """How often its memory was at the limit: something had to be given back, or was refused; 0 is what is wished for.

        In v1 at least 1 also where the peak was within a large page of the limit, since not every kernel counts there.
        """
        return self._files.limit_hits()

    def set_read_bps(self, rate: int | None) -> None:
        """Change how fast it may read, in mid-run; None: as fast as the disk can. `device` must have been given."""
        if self._disk is None:
            raise LimitError(f"group {self.name} was made without a device, so no reading can be limited")
        self._files.set_bps("read", self._disk, rate)

    def pids(self) -> set[int]:
        """The processes in it."""
        return _pids(self.folders)

    def remove(self) -> None:
        """Kill what is left in it, and remove it. Raises LimitError where something does not die."""
        _remove(self.folders)


def available(*controllers: str, trees: Trees | None = None) -> str | None:
    """Why there are no groups with `memory` and these controllers (cpu, io) here; None where there are."""
    if not sys.platform.startswith("linux"):
        return f"control groups are Linux's, this is {sys.platform}"
    if os.geteuid() != 0:
        return "control groups need root"
    try:
        with Group(f"tpimpi-probe-{os.getpid()}", controllers=controllers, trees=trees):
            return None
    except LimitError as error:
        return str(error)


def remove_groups(prefix: str, trees: Trees | None = None) -> None:
    """Kill what is in the groups whose names begin with `prefix`, whoever made them, and remove them. Raises LimitError."""
    trees = trees or find_trees()
    tops = {*trees.v1.values(), *([] if trees.v2 is None else [trees.v2])}
    _remove([folder for top in sorted(tops) for folder in top.glob(f"{prefix}*") if folder.is_dir()])


def _remove(folders: Iterable[Path]) -> None:
    deadline = time.monotonic() + REMOVAL_TIMEOUT_S
    left = [folder for folder in folders if folder.exists()]
    while left:
        for pid in _pids(left) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for folder in list(left):
            try:
                folder.rmdir()
            except FileNotFoundError:
                left.remove(folder)
            except OSError as error:  # EBUSY while a process is dying
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise LimitError(f"group {folder} cannot be removed: {error.strerror}") from error
            else:
                left.remove(folder)
        if left:
            time.sleep(0.05)


def _pids(folders: Iterable[Path]) -> set[int]:
    files = [folder / "cgroup.procs" for folder in folders]
    return {int(pid) for file in files if file.exists() for pid in read_file(file).split()}


def _make(folder: Path) -> None:
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()  # left by a run that was killed; refused if anything lives in it
        folder.mkdir()
    except OSError as error:
        raise LimitError(f"group {folder} cannot be made: {error.strerror}") from error


def _enter(folders: Sequence[Path], argv: Sequence[str], suffix: str = "") -> list[str]:
    """A shell that enters the group in each of `folders`, with `suffix` (which it expands), and becomes `argv`."""
    files = " ".join(f'{shlex.quote(str(folder))}"{suffix}"/cgroup.procs' for folder in folders)
    return ["sh", "-c", f'for f in {files}; do echo $$ > "$f" || exit 125; done; exec "$@"', "sh", *argv]


class RankGroups:
    """A group for each rank of a run that mpirun starts on this machine: NAME-r0, NAME-r1, …; use as Group.

    mpirun -np RANKS … then gets `command(argv)` as its program. A limit is the same for each rank, or a list of each one's.
    """

    def __init__(self, name: str, ranks: int, **limits: object) -> None:
        def of(rank: int) -> dict[str, Any]:
            return {limit: value[rank] if isinstance(value, list) else value for limit, value in limits.items()}

        self.groups = [Group(f"{name}-r{rank}", **of(rank)) for rank in range(ranks)]

    def __enter__(self) -> RankGroups:
        with contextlib.ExitStack() as stack:
            for group in self.groups:
                stack.enter_context(group)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv`, run by each rank inside its own group."""
        stems = [folder.with_name(folder.name.removesuffix("-r0")) for folder in self.groups[0].folders]
        return _enter(stems, argv, f"-r{RANK_VARIABLE}")


def disk_number(path: Path, blocks: Path = Path("/sys/dev/block")) -> str:
    """MAJOR:MINOR of the whole disk under `path`: limits are the disk's, not the partition's. Raises LimitError."""
    mount = mount_of(path)
    if (disk := mount.disk(blocks)) is None:
        raise LimitError(f"{path} is on {mount.device} ({mount.kind}), which is no disk of this machine")
    return disk
