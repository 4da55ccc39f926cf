"""doctor over the emulated home: what it says of links, interfaces and versions that are really so."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench import home
from bench.home import devices
from tests.support.homes import needs_home, output
from tests.support.launch import TIMEOUT, Launcher, Result
from tpimpi import __version__

pytestmark = [needs_home, pytest.mark.alone]
LATENCY = 0.003  # seconds one way


@pytest.fixture
def examined(mpirun: Launcher, tiny: Path, tmp_path: Path) -> Callable[..., tuple[Result, dict[str, Any]]]:
    """Runs doctor on the devices of a home: its result, and what it found. With `options`, MPI uses
    the interface that they say, if any."""

    def run(
        made: Any, options: Sequence[str] | None = None, *, slots: bool = True, seal: str = "auto"
    ) -> tuple[Result, dict[str, Any]]:
        path = tmp_path / "found.json"
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tpimpi", "doctor", "--model", str(tiny), "--seal", seal]
        command += ["--json", str(path)]
        streams = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        if options is None:
            process = made.mpirun(command, mpi=mpirun.mpi, **streams)
        else:
            process = made.start(
                0,
                [*plain(made, mpirun, slots=slots), *options, str(made.folder / "rank"), *command],
                env=mpirun.env,
                **streams,
            )
        result = output(process)
        assert path.exists(), result.out + result.err
        return result, json.loads(path.read_text())

    return run


def plain(made: Any, mpirun: Launcher, *, slots: bool = True) -> list[str]:
    """mpirun of two ranks, that is not told which interface to use, nor, without `slots`, how many ranks go to a host."""
    count, agent = (" slots=1" if mpirun.mpi == "openmpi" and slots else ""), str(made.folder / "agent")
    (made.folder / "two").write_text("".join(f"{name}{count}\n" for name in made.names[:2]))
    options = {
        "openmpi": ["--prtemca", "plm_ssh_agent", agent, "--mca", "pml", "ob1", "--mca", "btl", "self,tcp"],
        "mpich": ["-launcher", "ssh", "-launcher-exec", agent],
    }[mpirun.mpi]
    return [mpirun.program, *options, "--hostfile", str(made.folder / "two"), "-np", "2"]


def until(true: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + TIMEOUT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_links_and_interfaces(examined: Callable[..., tuple[Result, dict[str, Any]]]) -> None:
    with home.Home(3, home.Link(latency_s=LATENCY, bandwidth=4e6)) as made:  # bytes a second
        result, found = examined(made)
    assert [rank["host"] for rank in found["ranks"]] == made.names
    for link in found["links"]:
        assert link["interfaces"] == ["eth0", "eth0"]
        assert link["latency_s"] >= LATENCY
        for way in ("to_bytes_per_s", "from_bytes_per_s"):
            assert link[way] < 4.4e6  # a tenth may be in queues when time begins to count
    said = [finding["text"] for finding in found["findings"] if finding["wrong"]]
    assert sum("which is slow; use a cable" in text for text in said) == 2
    assert result.code == 1


@pytest.mark.slow
def test_different_versions_on_two_hosts(
    examined: Callable[..., tuple[Result, dict[str, Any]]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import tpimpi\ntpimpi.__version__ = '9.9.9'\n")
    own = [devices.Device("laptop"), devices.Device("pi", env={"PYTHONPATH": str(tmp_path)})]
    with home.Home(own) as made:
        result, found = examined(made, seal="off")  # ranks that seal do not get that far
    assert result.code == 1
    assert f"wrong: tpimpi differs: r0 laptop has {__version__}, r1 pi has 9.9.9" in result.out
    assert [rank["tpimpi"] for rank in found["ranks"]] == [__version__, "9.9.9"]


@pytest.mark.slow
def test_a_docker_bridge_that_is_taken(
    examined: Callable[..., tuple[Result, dict[str, Any]]], mpirun: Launcher
) -> None:
    """Two hosts joined by a second wire, whose ends are named as Docker's bridge is; MPI is told to use it, and then, as
    doctor says, the other."""
    ip = shutil.which("ip")
    assert ip is not None
    choose = {
        "openmpi": ["--mca", "btl_tcp_if_include", "172.17.0.0/16"],
        "mpich": ["-genv", "UCX_NET_DEVICES", "docker0", "-genv", "FI_TCP_IFACE", "docker0"],
    }[mpirun.mpi]
    with home.Home(2) as made:
        sleeping = [made.start(rank, ["sleep", str(TIMEOUT)]) for rank in range(2)]
        pids = [str(process.pid) for process in sleeping]
        for rank in range(2):  # the shell that enters the device has become `sleep` when it is there
            until(lambda rank=rank: made.run(rank, ["pidof", "sleep"]).returncode == 0)
        first, second = (["netns", pid] for pid in pids)
        wire = ["link", "add", "docker0", *first, "type", "veth", "peer", "name", "docker0", *second]
        subprocess.run([ip, *wire], check=True, timeout=TIMEOUT)
        for rank in range(2):
            for words in (f"addr add 172.17.0.{rank + 1}/16 dev docker0", "link set docker0 up"):
                assert made.run(rank, [ip, *words.split()]).returncode == 0
        for rank in range(2):
            until(lambda rank=rank: made.run(rank, ["cat", "/sys/class/net/docker0/operstate"]).stdout == "up\n")
        result, found = examined(made, choose)
        assert found["links"][0]["interfaces"] == ["docker0", "docker0"]
        assert result.code == 1
        advice = {
            "openmpi": "--mca btl_tcp_if_include 10.77.0.0/24 --prtemca prte_if_include 10.77.0.0/24",
            "mpich": "-iface eth0 -genv UCX_NET_DEVICES eth0 -genv FI_TCP_IFACE eth0",
        }[mpirun.mpi]
        assert f"made for containers or virtual machines; type: mpirun {advice}" in result.out
        result, found = examined(made, advice.split())
        assert found["links"][0]["interfaces"] == ["eth0", "eth0"]
        assert "docker0 of" not in result.out


@pytest.mark.slow
def test_two_ranks_that_open_mpi_puts_on_one_host(
    examined: Callable[..., tuple[Result, dict[str, Any]]], mpirun: Launcher, tiny: Path
) -> None:
    """A run says so too. What doctor says to type puts them on both, and MPICH does so by itself."""
    text = "2 ranks are on 1 of the 2 hosts that mpirun was given"
    with home.Home(2) as made:
        if mpirun.mpi == "openmpi" and len(os.sched_getaffinity(0)) > 1:
            result, found = examined(made, [], slots=False)
            assert [rank["host"] for rank in found["ranks"]] == [made.names[0]] * 2
            assert text in result.out and "mpirun --map-by node …" in result.out
            assert result.code == 1
            run = [sys.executable, "-m", "tpimpi", "--model", str(tiny), "--prompt", "x", "--max-tokens", "1"]
            command = [*plain(made, mpirun, slots=False), str(made.folder / "rank"), *run]
            pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            result = output(made.start(0, command, env=mpirun.env, **pipes))
            assert result.code == 0 and result.err.count(text) == 1, result.err
        result, found = examined(made, ["--map-by", "node"] if mpirun.mpi == "openmpi" else [], slots=False)
        assert [rank["host"] for rank in found["ranks"]] == made.names
        assert text not in result.out
