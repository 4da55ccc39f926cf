"""An emulated home: several devices on one machine, joined by links as slow as you say, for mpirun; Linux, as root.

A device has namespaces of its own for network, host name, mounts and System V IPC, so it has its own interface (eth0,
10.77.0.RANK+1, MTU 1500), /etc/hosts, /dev/shm, HOME, TPIMPI_CACHE and TMPDIR, and otherwise sees this machine's files and
processes. It has a key for sealed links, and knows those of the others. Its limits (hostfiles/emulated-home.toml shows them
all) are control groups, by bench/limits. Frames pass through bench/home/delay_line.c, which holds each for the latency, and
counts the bandwidth of the sender's uplink and the receiver's downlink. Netem is not used, even where the kernel has it.
Only TCP/IPv4 is between devices, no shared memory.

    with Home(read_devices(path)[0], Link(latency_s=0.002)) as home:         # or Home(4): four equal devices
        process = home.mpirun([sys.executable, "-m", "tpimpi", …], stdout=PIPE)   # a Popen in a session of its own
        home.set_link(Link(0.005))      # while the run goes on
        home.cut(2); home.mend(2)       # interface down, and up; home.cut(2, silently=True): as if the cable were out
        home.pids(1)                    # what runs on device 1
        home.run(3, ["df"]); home.start(3, […]); home.ping(0, 1); home.socket(0); home.traffic(); home.outside(1, path)
"""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from types import TracebackType
from typing import Any

from bench.home.devices import Device, Link, equal_devices
from bench.home.scripts import HOLDER, launcher, write_scripts
from bench.home.sweep import (
    PREFIX,
    TAG_VARIABLE,
    HomeError,
    clean,
    make_disk,
    make_folder,
    network,
    processes_in_network,
    run_program,
    sweep,
)
from bench.home.wire import Traffic, Wire, build, ping, program_path, socket_in
from bench.limits import Group
from tpimpi.errors import InputError, TpimpiError
from tpimpi.system.link_keys import PATH_VARIABLE, make_keys, write_keys

CPU_PERIOD_US = 10_000  # short, so that a share of a processor looks like a slower processor
QUEUE_FRAMES = 10_000  # that may wait for the delay line to read them


class Home:
    """Devices, joined; `with` makes them, and removes them and all that runs on them. A number means equal devices.

    `keep`: a folder in which the devices' own folders stay. Raises InputError, HomeError, LimitError, WireError.
    """

    def __init__(
        self, devices: Sequence[Device] | int = 4, link: Link | None = None, *, keep: Path | None = None
    ) -> None:
        self.devices = equal_devices(devices) if isinstance(devices, int) else list(devices)
        self.names = [device.name for device in self.devices]
        self.addresses = [f"10.77.0.{rank + 1}" for rank in range(len(self.devices))]
        if len(set(self.names)) != len(self.names):
            raise InputError(f"device names {', '.join(self.names)}: give each a name of its own")
        self.link = link or Link()
        self._keep = keep
        self._holders: list[subprocess.Popen[str]] = []
        self._caches: list[Path] = []
        self.groups: list[Group | None] = []  # of each device that has limits, while the home stands
        self._wire: Wire
        self._stack = contextlib.ExitStack()

    # Making and removing

    def __enter__(self) -> Home:
        if os.geteuid() != 0:
            raise HomeError('an emulated home needs root; use sudo env PATH="$PATH" python -m bench.home')
        if not Path("/dev/net/tun").exists():
            raise HomeError("an emulated home needs /dev/net/tun; load the module tun (modprobe tun)")
        for program in ("unshare", "nsenter", "ip", "mount"):
            program_path(program)
        build()
        with contextlib.suppress(TpimpiError):  # what does not go does not hinder this one
            clean()
        self.folder = make_folder(self._stack)
        self.id = self.folder.name.removeprefix(PREFIX)
        end = self._stack.enter_context(contextlib.ExitStack())
        end.callback(self._reap)
        self._stack.callback(sweep, self.folder)
        try:
            write_scripts(self.folder, self.names, self.addresses)
            for name, keys in make_keys(self.names, date.today().isoformat()).items():
                write_keys(keys, self.keys(self.names.index(name)))
            for rank in range(len(self.devices)):
                self._start_device(rank)
            self._wire = Wire([holder.pid for holder in self._holders], {**os.environ, TAG_VARIABLE: self.id})
            end.callback(self._wire.close)
            for rank, address in enumerate(self.addresses):
                self._ip(
                    rank,
                    f"link set lo up\nlink set eth0 txqueuelen {QUEUE_FRAMES} up\naddr add {address}/24 dev eth0\n",
                )
            self.set_link(self.link)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _reap(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()
            if holder.stdout is not None:
                holder.stdout.close()

    def _start_device(self, rank: int) -> None:
        device = self.devices[rank]
        folder = (self._keep or self.folder / "devices").resolve() / device.name
        temporary = self.folder / "tmp" / device.name  # never kept
        for path in (folder / "home", temporary):
            path.mkdir(parents=True, exist_ok=True)
        cache = device.cache or folder / "home" / ".cache" / "tpimpi"
        loop = "" if device.disk is None else make_disk(self.folder / f"{device.name}.img", device.disk)
        holder = subprocess.Popen(
            [
                *(program_path("unshare"), "--net", "--uts", "--ipc", "--mount", "--propagation", "private"),
                *("sh", "-c", HOLDER, "holder", device.name, str(folder), str(self.folder), loop),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(log := (self.folder / f"{device.name}.log").open("w")),
            text=True,
            env={**os.environ, TAG_VARIABLE: self.id},
            start_new_session=True,
        )
        log.close()
        self._holders.append(holder)
        assert holder.stdout is not None
        if holder.stdout.readline() != "ready\n":
            said = (self.folder / f"{device.name}.log").read_text().strip()
            raise HomeError(f"device {device.name} cannot be made: {said or 'its shell ended'}")
        if loop:  # mounted by now: it goes when the last mount goes
            subprocess.run([program_path("losetup"), "--detach", loop], check=False, capture_output=True)
        else:
            cache.mkdir(parents=True, exist_ok=True)
        self._caches.append(cache)
        group = self._group(rank, loop or cache)
        self.groups.append(group)
        files = " ".join(str(folder / "cgroup.procs") for folder in (group.folders if group else []))
        (self.folder / "where" / device.name).write_text(
            f"holder={holder.pid}; groups={shlex.quote(files)}; network='{network(holder.pid)}'\n"
        )
        own = {"HOME": folder / "home", "TPIMPI_CACHE": cache, "TMPDIR": temporary, "HOSTNAME": device.name}
        own[PATH_VARIABLE] = self.keys(rank)
        exports = {**{key: str(value) for key, value in own.items()}, **device.env, TAG_VARIABLE: self.id}
        lines = [f"export {key}={shlex.quote(value)}\n" for key, value in exports.items()]
        (self.folder / "env" / device.name).write_text("".join(lines))

    def _group(self, rank: int, disk: Path | str) -> Group | None:
        """The group of a device that has limits."""
        device = self.devices[rank]
        if (device.cores, device.memory, device.read_bps, device.write_bps) == (None,) * 4:
            return None
        if isinstance(disk, str):
            number = Path(disk).stat().st_rdev
            disk = f"{os.major(number)}:{os.minor(number)}"
        group = Group(
            f"{PREFIX}{self.id}-r{rank}",
            memory=device.memory,
            cpu=device.cores,
            cpu_period_us=CPU_PERIOD_US,
            read_bps=device.read_bps,
            write_bps=device.write_bps,
            device=disk if device.read_bps or device.write_bps else None,
        )
        return group.__enter__()  # sweep removes it, when what runs in it is dead

    def _ip(self, rank: int, commands: str) -> None:
        run_program(
            "nsenter",
            "--target",
            str(self._holders[rank].pid),
            "--net",
            "--",
            program_path("ip"),
            "-batch",
            "-",
            text=commands,
        )

    # Running programs

    def _on(self, rank: int, command: Sequence[str]) -> list[str]:
        return [str(self.folder / "enter"), self.names[rank], *command]

    def start(
        self, rank: int, command: Sequence[str], *, env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """The command on device `rank`, in a session of its own; its process is the command's."""
        popen = {"start_new_session": True, "env": {**os.environ, **(env or {}), TAG_VARIABLE: self.id}, **popen}
        return subprocess.Popen(self._on(rank, command), **popen)

    def run(
        self,
        rank: int,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
        **run: Any,
    ) -> subprocess.CompletedProcess[str]:
        """The finished command on device `rank`, with its output as text."""
        run = {
            "stdin": subprocess.DEVNULL,
            "capture_output": True,
            "text": True,
            "env": {**os.environ, **(env or {}), TAG_VARIABLE: self.id},
            **run,
        }
        return subprocess.run(self._on(rank, command), timeout=timeout, check=False, **run)

    def mpirun(
        self,
        command: Sequence[str],
        *,
        ranks: int | None = None,
        mpi: str = "openmpi",
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        **popen: Any,
    ) -> subprocess.Popen[Any]:
        """mpirun on device 0, in a session of its own, with rank r of `command` on device r; `options` are mpirun's.

        All variables of this process and `env` reach the ranks, but for those that are the device's own. `popen` is Popen's.
        """
        ranks = len(self.devices) if ranks is None else ranks
        if not 1 <= ranks <= len(self.devices):
            raise InputError(f"-n {ranks} with {len(self.devices)} devices; give at most one rank for each")
        hostfile = self.folder / f"hosts-{ranks}"
        slots = " slots=1" if mpi == "openmpi" else ""  # else Open MPI puts a rank on each core that a host has
        hostfile.write_text("".join(f"{name}{slots}\n" for name in self.names[:ranks]))
        start, variables = launcher(mpi, self.folder / "agent")
        argv = [*start, "--hostfile" if mpi == "openmpi" else "-f", str(hostfile), "-np", str(ranks), *options]
        return self.start(0, [*argv, str(self.folder / "rank"), *command], env={**variables, **(env or {})}, **popen)

    # Looking, and doing harm

    def pids(self, rank: int) -> set[int]:
        """The processes on device `rank`."""
        holder = self._holders[rank].pid
        return processes_in_network(holder) - {holder}

    def set_link(self, link: Link, rank: int | None = None) -> None:
        """Change the link of every device that has none of its own, or of device `rank`, at once."""
        for i, device in enumerate(self.devices):
            if rank is None:
                own = {key: value for key in vars(link) if (value := getattr(device, key)) is not None}
                self._wire.link(i, **vars(replace(link, **own)))
            elif i == rank:
                self._wire.link(i, **vars(link))

    def cut(self, rank: int, *, silently: bool = False) -> None:
        """Take the device's interface down; `silently`: it stays up, but nothing passes."""
        self._wire.drop(rank, True) if silently else self._ip(rank, "link set eth0 down\n")

    def mend(self, rank: int) -> None:
        """Undo cut."""
        self._wire.drop(rank, False)
        self._ip(rank, "link set eth0 up\n")

    def ping(self, rank: int, to: int, count: int = 5, interval_s: float = 0.02, timeout_s: float = 5.0) -> list[float]:
        """Round trips in seconds; those lost are left out. The first ones may include finding the address."""
        return ping(self._holders[rank].pid, self.addresses[to], count, interval_s, timeout_s)

    def socket(self, rank: int, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this process on device `rank`."""
        return socket_in(self._holders[rank].pid, family, kind)

    def traffic(self) -> Traffic:
        """What all links carried since it was last asked."""
        return self._wire.traffic()

    def outside(self, rank: int, path: Path | str) -> Path:
        """Where this process finds what device `rank` has at `path` (absolute)."""
        return Path(f"/proc/{self._holders[rank].pid}/root") / str(path).lstrip("/")

    def keys(self, rank: int) -> Path:
        """The device's file of link keys: those of one home, in which each device has its own."""
        return self.folder / "keys" / f"{self.names[rank]}.json"

    def cache(self, rank: int) -> Path:
        """The device's TPIMPI_CACHE, as this process finds it."""
        return self.outside(rank, self._caches[rank])
