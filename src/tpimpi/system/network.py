"""The network interfaces of a host: of what kind they are, which of them carried some bytes, and how to choose one for MPI.

MPI takes any interface that is up, also those of container and virtual machine programs (docker0, virbr0), which lead
nowhere but often have the same address on every host: the classic reason for a run that hangs at its start.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

LOOPBACK, INNER, TUNNEL, WIRELESS, CABLE = "loopback", "inner", "tunnel", "wireless", "cable"
# By name, as the programs that make them choose it: they all may be any kind to the kernel.
_INNER = re.compile(
    r"(docker|virbr|veth|cni|flannel|podman|lxcbr|lxdbr|vmnet|vboxnet|vnet|cali)[\w.-]*|br-[0-9a-f]{12}"
)
_TUNNEL = re.compile(r"(tun|tap|wg|tailscale|zt|ppp|utun|ipsec|nordlynx)[\w.-]*")
_GOODNESS = (CABLE, WIRELESS, TUNNEL)  # of what may be chosen

Counters = Mapping[str, tuple[int, int]]  # bytes (sent, received) of each interface since the host started


@dataclass(frozen=True)
class Interface:
    """An interface that is up. `networks` are its IPv4 addresses with their prefix ("192.168.1.5/24"); `speed` is in
    Mbit/s, 0 where it is not known."""

    name: str
    kind: str
    networks: tuple[str, ...]
    speed: int = 0


def kind_of(name: str, classes: Path = Path("/sys/class/net")) -> str:
    """Of what kind an interface of this host is; one that is not known otherwise is a cable."""
    if name == "lo" or re.fullmatch(r"lo\d+", name):
        return LOOPBACK
    if _INNER.fullmatch(name):
        return INNER
    if _TUNNEL.fullmatch(name):
        return TUNNEL
    if (classes / name / "wireless").exists() or (classes / name / "phy80211").exists() or name.startswith("wl"):
        return WIRELESS
    return CABLE


def interfaces() -> list[Interface]:
    """Those of this host that are up and have an IPv4 address."""
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        own = [a for a in addresses if a.family == socket.AF_INET and a.address]
        networks = tuple(str(ipaddress.ip_interface(f"{a.address}/{a.netmask or 32}")) for a in own)
        if networks and (name not in stats or _is_up(stats[name])):
            found.append(Interface(name, kind_of(name), networks, stats[name].speed if name in stats else 0))
    return found


def _is_up(stats: Any) -> bool:
    """As MPI libraries see it: also a bridge that nothing is plugged into, which psutil does not call up."""
    flags = getattr(stats, "flags", "")
    return "up" in flags.split(",") if flags else bool(stats.isup)


def counters() -> dict[str, tuple[int, int]]:
    """Bytes (sent, received) of each interface of this host so far."""
    return {name: (c.bytes_sent, c.bytes_recv) for name, c in psutil.net_io_counters(pernic=True).items()}


def carrier(before: Counters, after: Counters, nbytes: int) -> str | None:
    """The interface that sent and received `nbytes` or more in between, most of all; None where none did: they went through
    memory."""
    grown = {}
    for name, (sent, received) in after.items():
        was = before.get(name, (0, 0))
        grown[name] = min(sent - was[0], received - was[1])
    # A bridge counts what its members do; of two with the same bytes the one that is no member of the other is named.
    best = max(grown, key=lambda name: (grown[name], kind_of(name) in _GOODNESS), default=None)
    return best if best is not None and grown[best] >= nbytes > 0 else None


def common_network(mine: Sequence[Interface], theirs: Sequence[Interface]) -> tuple[str, str, str] | None:
    """A network in which two hosts meet: (network, my interface, their interface), the best that there is."""
    meetings = []
    for one in mine:
        for other in theirs:
            if one.kind not in _GOODNESS or other.kind not in _GOODNESS:
                continue
            for network in one.networks:
                whole = ipaddress.ip_interface(network).network
                if whole.prefixlen < 32 and any(ipaddress.ip_interface(n).ip in whole for n in other.networks):
                    order = _GOODNESS.index(one.kind) + _GOODNESS.index(other.kind)
                    meetings.append((order, str(whole), one.name, other.name))
    return min(meetings)[1:] if meetings else None


def same_inner(mine: Sequence[Interface], theirs: Sequence[Interface]) -> list[str]:
    """Names of inner interfaces of mine whose network others have too, so that MPI may take it for a way between them."""
    networks = {ipaddress.ip_interface(n).network for other in theirs if other.kind == INNER for n in other.networks}
    return [
        one.name
        for one in mine
        if one.kind == INNER and any(ipaddress.ip_interface(n).network in networks for n in one.networks)
    ]


def choosing_openmpi(networks: Sequence[str]) -> str:
    """Options of Open MPI's mpirun for the networks (or interfaces) between the hosts."""
    names = ",".join(networks)
    return f"--mca btl_tcp_if_include {names} --prtemca prte_if_include {names}"


def choosing_mpich(names: Sequence[str]) -> str:
    """Options of MPICH's mpirun for the interface of this host, the first of `names`, and those of other hosts."""
    known = list(dict.fromkeys(names))
    libfabric = f" -genv FI_TCP_IFACE {known[0]}" if len(known) == 1 else ""  # which takes one name for all hosts
    return f"-iface {names[0]} -genv UCX_NET_DEVICES {','.join(known)}{libfabric}"
