"""doctor: what a rank finds out, what is said of it, and the command under mpirun."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.doctor_cases import DOCKER0
from tests.support.launch import Launcher, Result
from tpimpi.diagnostics.doctor import rank_facts
from tpimpi.diagnostics.doctor.rank_facts import ExpectedSlices, Facts, SliceFacts, examine_slice
from tpimpi.errors import InputError
from tpimpi.star import MpiLibrary
from tpimpi.star.control import decode_note
from tpimpi.system.cpu import processor_quota
from tpimpi.system.hostfile import Host, read_hostfile, refused_lines
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


@pytest.mark.parametrize(
    ("data", "open_mpi", "mpich"),
    [
        (b"a slots=2\nb slots = 3\n# c\r\n\tc max_slots=4\n# \xc3\xbc\n", "", ""),
        (b"a\r\n", "line 1 ends with a carriage return", ""),
        (b"a\n\r\n", "line 2 ends with a carriage return", ""),
        (b"\xef\xbb\xbfa\n", "line 1 begins with a byte order mark", "line 1 begins with a byte order mark"),
        ("a\nbücher\n".encode(), "line 2 has '\\xfc', which is not ASCII", "line 2 has '\\xfc'"),
        (b"a slots=1\nb\na slots=1\n", "line 3 says again how many slots a has, as line 1 does", ""),
        (b"a slots=1\na\n", "", ""),
        (b"a SLOTS=2\n", "line 1 has SLOTS=", ""),
        (b"a user=me\n", "line 1 has user=", ""),
    ],
)
def test_lines_that_mpirun_refuses(data: bytes, open_mpi: str, mpich: str, tmp_path: Path) -> None:
    (tmp_path / "home.txt").write_bytes(data)
    read_hostfile(str(tmp_path / "home.txt"))
    for launcher, wanted in (("Open MPI", open_mpi), ("MPICH", mpich)):
        refused = refused_lines(str(tmp_path / "home.txt"), launcher)
        assert len(refused) == bool(wanted), refused
        assert wanted in "".join(refused)


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
    assert examine_slice(path, ExpectedSlices(), 1000) == SliceFacts("missing", str(path), missing_bytes=1000)
    assert examine_slice(path, ExpectedSlices(), None).missing_bytes is None
    (tmp_path / ".rank-0-of-2.h5.partial").write_bytes(bytes(8192))
    assert examine_slice(path, ExpectedSlices(), 100_000).missing_bytes == 100_000 - 8192
    path.write_bytes(b"no slice")
    found = examine_slice(path, ExpectedSlices(), 1000)
    assert found.state == "wrong"
    assert str(path) in found.problem


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
