"""Run a program with less memory, processor or disk than the machine has, in control groups; Linux, as root.

    python bench/limits.py --memory 700M --cpu 0.5 -- COMMAND…
    mpirun -np 2 … python bench/limits.py --each-rank --memory 700M -- python -m tpimpi …

The peak, and how often it was at the limit, go to stderr at the end; the exit code is the command's. The same from Python:

    with Group("name", memory=700_000_000, cpu=0.5, read_bps=200_000_000, device=Path("slices")) as group:
        subprocess.run(group.command(["python", "-m", "tpimpi", …]))
        print(group.peak(), group.limit_hits())

Both versions of the kernel's groups are used: v1 (Documentation/admin-guide/cgroup-v1) where it has the memory controller,
else v2 (Documentation/admin-guide/cgroup-v2.rst). What counts as memory in both is what the processes touched first: their
own memory, page cache, shared memory. Files that others have read already, such as libraries, are not charged again. Groups
are made at the top of the mounted tree, which in a container is the container's own.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from tpimpi.errors import TpimpiError

CPU_PERIOD_US = 100_000
LEAST_QUOTA_US = 1000  # the kernel refuses less
LARGEST_CHARGE = 2 << 20  # bytes that are counted at once: a large page
REMOVAL_S = 10.0  # for what is left in a group to die
RANK = "${OMPI_COMM_WORLD_RANK:-${PMI_RANK:?mpirun gave no rank}}"
_V1_NAMES = {"memory": "memory", "cpu": "cpu", "io": "blkio"}  # of the controllers


class LimitError(TpimpiError):
    """Groups cannot be had, or not these."""


# Where the kernel has its groups


@dataclass(frozen=True)
class Trees:
    """Where the groups are mounted; `v1` by the name that the controller has in v2."""

    v1: Mapping[str, Path]
    v2: Path | None


def find_trees(mountinfo: Path = Path("/proc/self/mountinfo")) -> Trees:
    """The mounted trees of groups, of both versions."""
    v1: dict[str, Path] = {}
    v2: Path | None = None
    for line in mountinfo.read_text(errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), before.split(" ")[4]))
        if kind == "cgroup":
            controllers = options.split(",")
            for name, old in _V1_NAMES.items():
                if old in controllers:
                    v1.setdefault(name, point)
        elif kind == "cgroup2" and v2 is None:
            v2 = point
    return Trees(v1, v2)


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


class _Tree1:
    """A group in version 1: a folder in the tree of each controller."""

    def __init__(self, trees: Trees, name: str, controllers: Collection[str]) -> None:
        if missing := [name for name in controllers if name not in trees.v1]:
            raise LimitError(f"no control groups (v1) for {', '.join(missing)} are mounted here")
        # Some controllers share a tree (cpu,cpuacct); each folder once.
        self.of = {controller: trees.v1[controller] / name for controller in controllers}
        self.folders = list(dict.fromkeys(self.of.values()))

    def prepare(self) -> None:
        """Before the folders are made: nothing to do."""

    def set_memory(self, nbytes: int) -> None:
        _write(self.of["memory"] / "memory.limit_in_bytes", str(nbytes))
        with contextlib.suppress(LimitError):  # not every kernel counts swap
            _write(self.of["memory"] / "memory.memsw.limit_in_bytes", str(nbytes))

    def set_cpu(self, quota_us: int, period_us: int) -> None:
        _write(self.of["cpu"] / "cpu.cfs_period_us", str(period_us))
        _write(self.of["cpu"] / "cpu.cfs_quota_us", str(quota_us))

    def set_bps(self, what: str, disk: str, rate: int | None) -> None:
        _write(self.of["io"] / f"blkio.throttle.{what}_bps_device", f"{disk} {rate or 0}")  # 0 removes it

    def peak(self) -> int | None:
        return _number(self.of["memory"] / "memory.max_usage_in_bytes")

    def usage(self) -> int:
        return _number(self.of["memory"] / "memory.usage_in_bytes") or 0

    def limit_hits(self) -> int:
        # Memory and swap together are charged first, so where both have the same limit only their counter counts.
        folder = self.of["memory"]
        hits = (_number(folder / "memory.failcnt") or 0) + (_number(folder / "memory.memsw.failcnt") or 0)
        control = folder / "memory.oom_control"
        hits += sum(int(n) for n in re.findall(r"^oom_kill (\d+)$", _read(control), re.M)) if control.exists() else 0
        # There are kernels (6.18) whose failcnt stays 0 whatever happens. What is refused is at most LARGEST_CHARGE more.
        limit, peak = _number(folder / "memory.limit_in_bytes"), self.peak()
        near = limit is not None and peak is not None and peak + LARGEST_CHARGE > limit
        return max(hits, int(near))


class _Tree2:
    """A group in version 2: one folder."""

    def __init__(self, trees: Trees, name: str, controllers: Collection[str]) -> None:
        if trees.v2 is None:
            raise LimitError("no control groups are mounted here")
        self._top, self._controllers = trees.v2, sorted(controllers)
        self.folders = [trees.v2 / name]
        self._folder = self.folders[0]

    def prepare(self) -> None:
        """Have the tree give its controllers to the groups in it. They stay enabled, as systemd leaves them."""
        has = _read(self._top / "cgroup.controllers").split()
        if missing := [name for name in self._controllers if name not in has]:
            raise LimitError(f"the control groups (v2) in {self._top} have no controller {', '.join(missing)}")
        given = _read(self._top / "cgroup.subtree_control").split()
        if lacking := [f"+{name}" for name in self._controllers if name not in given]:
            _write(self._top / "cgroup.subtree_control", " ".join(lacking))

    def set_memory(self, nbytes: int) -> None:
        _write(self._folder / "memory.max", str(nbytes))
        with contextlib.suppress(LimitError):  # not every kernel counts swap
            _write(self._folder / "memory.swap.max", "0")

    def set_cpu(self, quota_us: int, period_us: int) -> None:
        _write(self._folder / "cpu.max", f"{quota_us} {period_us}")

    def set_bps(self, what: str, disk: str, rate: int | None) -> None:
        _write(self._folder / "io.max", f"{disk} {what[0]}bps={rate or 'max'}")

    def peak(self) -> int | None:
        return _number(self._folder / "memory.peak")

    def usage(self) -> int:
        return _number(self._folder / "memory.current") or 0

    def limit_hits(self) -> int:
        events = dict(line.split() for line in _read(self._folder / "memory.events").splitlines())
        return int(events["max"]) + int(events["oom"])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise LimitError(f"{path} cannot be read: {error.strerror}") from error


def _write(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_TRUNC)  # not write_text, which would make a file that is not there
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as error:
        raise LimitError(f"{text!r} cannot be written to {path}: {error.strerror}") from error


def _number(path: Path) -> int | None:
    """What the file says, or None where this kernel has no such file."""
    return int(_read(path)) if path.exists() else None


# Groups


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
        self._tree: _Tree1 | _Tree2 = (_Tree1 if "memory" in trees.v1 else _Tree2)(trees, name, needed)

    def __enter__(self) -> Group:
        self._tree.prepare()
        try:
            for folder in self._tree.folders:
                _make(folder)
            if self.memory is not None:
                self._tree.set_memory(self.memory)
            if self.cpu is not None:
                period = max(self._cpu_period_us, math.ceil(LEAST_QUOTA_US / self.cpu))
                self._tree.set_cpu(round(self.cpu * period), period)
            if self.read_bps is not None:
                self.set_read_bps(self.read_bps)
            if self.write_bps is not None and self._disk is not None:
                self._tree.set_bps("write", self._disk, self.write_bps)
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
        return self._tree.folders

    def command(self, argv: Sequence[str]) -> list[str]:
        """`argv`, run inside the group. A shell enters it and becomes the program, so nothing but the program is counted."""
        return _enter(self.folders, argv)

    def peak(self) -> int | None:
        """The most memory, in bytes, that it ever held; None where the kernel does not tell (v2 before Linux 5.19)."""
        return self._tree.peak()

    def usage(self) -> int:
        """Bytes that it holds now."""
        return self._tree.usage()

    def limit_hits(self) -> int:
        """How often its memory was at the limit: something had to be given back, or was refused; 0 is what is wished for.

        In v1 at least 1 also where the peak was within a large page of the limit, since not every kernel counts there.
        """
        return self._tree.limit_hits()

    def set_read_bps(self, rate: int | None) -> None:
        """Change how fast it may read, in mid-run; None: as fast as the disk can. `device` must have been given."""
        if self._disk is None:
            raise LimitError(f"group {self.name} was made without a device, so no reading can be limited")
        self._tree.set_bps("read", self._disk, rate)

    def pids(self) -> set[int]:
        """The processes in it."""
        return _pids(self.folders)

    def remove(self) -> None:
        """Kill what is left in it, and remove it. Raises LimitError where something does not die."""
        _remove(self.folders)


def remove_groups(prefix: str, trees: Trees | None = None) -> None:
    """Kill what is in the groups whose names begin with `prefix`, whoever made them, and remove them. Raises LimitError."""
    trees = trees or find_trees()
    tops = {*trees.v1.values(), *([] if trees.v2 is None else [trees.v2])}
    _remove([folder for top in sorted(tops) for folder in top.glob(f"{prefix}*") if folder.is_dir()])


def _remove(folders: Iterable[Path]) -> None:
    deadline = time.monotonic() + REMOVAL_S
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
    return {int(pid) for file in files if file.exists() for pid in _read(file).split()}


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

    mpirun -np RANKS … then gets `command(argv)` as its program.
    """

    def __init__(self, name: str, ranks: int, **limits: object) -> None:
        self.groups = [Group(f"{name}-r{rank}", **limits) for rank in range(ranks)]  # type: ignore[arg-type]

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
        return _enter(stems, argv, f"-r{RANK}")


def disk_number(path: Path, blocks: Path = Path("/sys/dev/block")) -> str:
    """MAJOR:MINOR of the whole disk under `path`: limits are the disk's, not the partition's. Raises LimitError."""
    from tpimpi.diagnostics.bench.disk import mount_of

    mount = mount_of(path)
    if (disk := mount.disk(blocks)) is None:
        raise LimitError(f"{path} is on {mount.device} ({mount.kind}), which is no disk of this machine")
    return disk


# As a command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", metavar="SIZE", help="such as 700M or 512MiB")
    parser.add_argument("--cpu", type=float, metavar="CORES", help="such as 0.5")
    parser.add_argument("--read-bps", metavar="SIZE", help="bytes a second")
    parser.add_argument(
        "--device", type=Path, metavar="PATH", help="on the disk that --read-bps is for (default: here)"
    )
    parser.add_argument("--each-rank", action="store_true", help="started by mpirun: a group for each rank")
    parser.add_argument("--name", default=f"tpimpi-{os.getpid()}", help="of the group")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND…")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command; give one after --")
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
    if options.each_rank and rank is None:
        parser.error("--each-rank, but mpirun gave no rank")
    from tpimpi.system.units import parse_size

    try:
        return run_limited(
            command,
            f"{options.name}-r{rank}" if options.each_rank else options.name,
            label=f"limits r{rank}" if options.each_rank else "limits",
            memory=None if options.memory is None else parse_size(options.memory, "--memory"),
            cpu=options.cpu,
            read_bps=None if options.read_bps is None else parse_size(options.read_bps, "--read-bps"),
            device=(options.device or Path()) if options.read_bps else None,
        )
    except TpimpiError as error:
        print(f"limits: {error}", file=sys.stderr)
        return 2


def run_limited(command: Sequence[str], name: str, *, label: str, memory: int | None, **limits: object) -> int:
    """Run `command` in a group of its own, say on stderr what it took, and return its exit code."""
    with Group(name, memory=memory, **limits) as group, _signals_as_exits():  # type: ignore[arg-type]
        # What the launcher hands down stays open: MPICH's ranks find it by a file descriptor.
        process = subprocess.Popen(group.command(command), close_fds=False)
        try:
            code = process.wait()
        finally:
            process.kill()
        peak, hits = group.peak(), group.limit_hits()
    of = "" if memory is None else f" of {memory / 1e6:.0f} MB, {hits} times at the limit"
    print(f"{label}: peak {'unknown' if peak is None else f'{peak / 1e6:.0f} MB'}{of}", file=sys.stderr, flush=True)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def _signals_as_exits() -> Iterator[None]:
    """SIGTERM and SIGHUP end the program as an exception does, so that groups are removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
