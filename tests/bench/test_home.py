"""bench/home: the emulated home, where there is what it needs; and the file that describes its devices, everywhere."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench import home, limits
from bench.home import devices
from tests.support.home_cases import left_of
from tests.support.homes import LACKING, needs_home, output
from tests.support.launch import TIMEOUT, Launcher, Result

pytestmark = pytest.mark.alone

LATENCY = 0.003  # seconds one way


@pytest.fixture(scope="module")
def four() -> Iterator[Any]:
    """A home of four equal devices."""
    with home.Home(4, home.Link(latency_s=LATENCY)) as made:
        yield made


@pytest.fixture
def ranks(four: Any, mpirun: Launcher) -> Callable[..., Result]:
    """Runs `python ARGUMENTS` on the four devices, under the MPI that --mpi names."""

    def run(*arguments: str, **options: Any) -> Result:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, *arguments]
        return output(four.mpirun(command, mpi=mpirun.mpi, **pipes, **options))

    return run


# The devices


@needs_home
@pytest.mark.slow
def test_a_rank_on_each_device_and_messages_as_slow_as_the_link(ranks: Callable[..., Result]) -> None:
    program = """
import os, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
facts = (MPI.Get_processor_name(), os.environ["TPIMPI_CACHE"], os.environ["HOME"], os.environ.get("TPIMPI_TEST"))
for _ in range(2):  # the first time connects
    comm.Barrier()
    start = time.perf_counter()
    if comm.rank == 0:
        comm.Send(bytearray(4), 1)
        comm.Recv(bytearray(4), 1)
    elif comm.rank == 1:
        comm.Recv(bytearray(4), 0)
        comm.Send(bytearray(4), 0)
    trip = time.perf_counter() - start
for fact in comm.gather(facts) or ():
    print(*fact)
if comm.rank == 0:
    print(trip)
"""
    result = ranks("-c", program, env={"TPIMPI_TEST": "here"})
    assert result.code == 0, result.err
    *lines, trip = result.out.split("\n")[:5]
    assert [line.split()[0] for line in lines] == ["laptop", "desktop", "mini-pc", "pi"]
    assert [line.split()[3] for line in lines] == ["here"] * 4
    assert len({line.split()[1] for line in lines}) == len({line.split()[2] for line in lines}) == 4
    assert float(trip) >= 2 * LATENCY


@needs_home
@pytest.mark.slow
def test_text_over_the_home_is_that_of_one_machine(
    four: Any, ranks: Callable[..., Result], tpimpi: Callable[..., Result], smollm2: Path, tmp_path: Path
) -> None:
    prompt = tmp_path / "prompt"
    prompt.write_text("Why is the sky blue?")
    slicing = ["--model", str(smollm2), "--ranks", "4", "--format", "f32", "--out", str(tmp_path / "slices")]
    assert tpimpi("slice", *slicing).code == 0
    greedy = ["--prompt-file", str(prompt), "--max-tokens", "24"]
    alone = tpimpi("--model", str(smollm2), "--format", "f32", *greedy)
    four.set_link(home.Link(0.0003))  # 1500 allreduces: at LATENCY they alone take 10 s
    try:
        over = ranks("-m", "tpimpi", "--slices", str(tmp_path / "slices"), *greedy)
    finally:
        four.set_link(home.Link(LATENCY))
    assert alone.code == over.code == 0, over.err
    assert over.out.startswith(alone.out)  # MPICH's UCX may write warnings to stdout when all is done
    assert len(alone.out.split()) > 10


@needs_home
@pytest.mark.parametrize(("latency", "least"), [(0.001, 0.002), (0.02, 0.04)])
@pytest.mark.slow_but("0.001-0.002")
def test_a_round_trip_takes_two_latencies(four: Any, latency: float, least: float) -> None:
    four.set_link(home.Link(latency))
    try:
        trips = four.ping(1, 3)
    finally:
        four.set_link(home.Link(LATENCY))
    assert len(trips) == 5
    assert min(trips) >= least


@needs_home
@pytest.mark.slow
def test_one_device_has_a_link_of_its_own(four: Any) -> None:
    four.set_link(home.Link(0.03), rank=2)
    try:
        slow, fast = four.ping(0, 2, 2), four.ping(0, 1, 2)
    finally:
        four.set_link(home.Link(LATENCY))
    assert min(slow) >= 0.03 + LATENCY  # half of each, twice
    assert min(fast) < min(slow)


@needs_home
@pytest.mark.slow
def test_bandwidth_holds_back(four: Any) -> None:
    four.set_link(home.Link(0.0, 0.0, 4e6))
    try:
        with four.socket(1) as server, four.socket(0) as sender:
            server.settimeout(TIMEOUT)
            sender.settimeout(TIMEOUT)
            server.bind((four.addresses[1], 0))
            server.listen()
            start = time.monotonic()
            sender.connect(server.getsockname())
            connection = server.accept()[0]
            connection.settimeout(TIMEOUT)
            # How much the kernel takes before anyone reads depends on its congestion control, so both ends work at once.
            with connection, ThreadPoolExecutor(1) as other:
                sent = other.submit(sender.sendall, bytes(500_000))
                left = 500_000
                while left and (got := len(connection.recv(1 << 16))):
                    left -= got
                sent.result()
            assert left == 0
            assert time.monotonic() - start >= 500_000 / 4e6
    finally:
        four.set_link(home.Link(LATENCY))


@needs_home
@pytest.mark.parametrize("silently", [False, True])
@pytest.mark.slow_but("False")
def test_a_cut_device_is_out_of_reach_until_it_is_mended(four: Any, silently: bool) -> None:
    assert four.ping(0, 3, 1)
    four.cut(3, silently=silently)
    try:
        assert not four.ping(0, 3, 2, timeout_s=0.3)
        assert not four.ping(3, 0, 2, timeout_s=0.3)
        assert four.ping(0, 1, 1)
        assert ("state DOWN" in four.run(3, ["ip", "link", "show", "eth0"]).stdout) is not silently
    finally:
        four.mend(3)
    assert four.ping(0, 3, 1)


@needs_home
def test_what_a_device_sees_and_who_runs_on_it(four: Any) -> None:
    seen = four.run(2, ["sh", "-c", "uname -n; ls /sys/class/net; cat /proc/net/if_inet6; getent hosts laptop"])
    assert seen.stdout.split() == ["mini-pc", "eth0", "lo", "10.77.0.1", "laptop"]
    assert four.run(2, ["false"]).returncode == 1
    process = four.start(2, ["sleep", "100"])
    deadline = time.monotonic() + TIMEOUT
    while process.pid not in four.pids(2):  # once it is in the namespace it is the command itself
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.pid not in four.pids(1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert four.pids(2) == set()


@needs_home
@pytest.mark.slow
def test_two_homes_do_not_meet(four: Any) -> None:
    with home.Home(2) as other:
        assert other.run(0, ["sh", "-c", "echo x > /dev/shm/mine"]).returncode == 0
        assert not four.outside(0, "/dev/shm/mine").exists()
        assert other.outside(0, "/dev/shm/mine").read_text() == "x\n"
        assert other.ping(0, 1, 1) and four.ping(0, 1, 1)
    assert not left_of(other.id)
    assert four.ping(0, 1, 1)


@needs_home
def test_more_ranks_than_devices_are_refused(four: Any) -> None:
    with pytest.raises(devices.InputError, match="-n 5 with 4 devices"):
        four.mpirun(["true"], ranks=5)


@needs_home
@pytest.mark.skipif(LACKING is None and limits.available("cpu", "io") is not None, reason="no control groups")
def test_limits_of_a_device(tmp_path: Path) -> None:
    small = devices.Device("small", cores=0.25, memory=64_000_000, env={"OWN": "a b"})
    with home.Home([small, devices.Device("free", cache=tmp_path)]) as two:
        groups = two.run(0, ["cat", "/proc/self/cgroup"]).stdout
        assert f"tpimpi-home-{two.id}-r0" in groups
        assert f"tpimpi-home-{two.id}" not in two.run(1, ["cat", "/proc/self/cgroup"]).stdout
        written = {
            file.name: file.read_text().split()
            for folder in Path("/sys/fs/cgroup").glob(f"**/tpimpi-home-{two.id}-r0")
            for file in folder.iterdir()
            if file.name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")
        }
        # A quarter of 10 ms, in us: Documentation/scheduler/sched-bwc.rst, and cgroup-v2.rst
        v1 = {"cpu.cfs_quota_us": ["2500"], "cpu.cfs_period_us": ["10000"]}
        assert written in (v1, {"cpu.max": ["2500", "10000"]})
        take = [sys.executable, "-c", "print(len(b'x' * 200_000_000))"]
        assert two.run(0, take).returncode == -signal.SIGKILL
        assert two.run(1, take).stdout == "200000000\n"
        assert two.run(0, ["sh", "-c", 'printf %s "$OWN"']).stdout == "a b"
        assert two.run(1, ["sh", "-c", 'printf %s "$TPIMPI_CACHE"']).stdout == str(tmp_path)
        assert two.cache(1).samefile(tmp_path)
    assert not left_of(two.id)


@needs_home
@pytest.mark.skipif(
    not Path("/dev/loop-control").exists() or not shutil.which("mkfs.ext4") or not shutil.which("losetup"),
    reason="no loop devices, losetup or mkfs.ext4",
)
@pytest.mark.slow
def test_a_disk_of_its_own_fills_up() -> None:
    with home.Home([devices.Device("tiny", disk=16_000_000), devices.Device("free")]) as two:
        fill = ["sh", "-c", 'mkdir -p "$TPIMPI_CACHE" && head -c 30000000 /dev/zero > "$TPIMPI_CACHE/file"']
        full = two.run(0, fill)
        assert full.returncode != 0
        assert "No space left" in full.stderr
        assert 1_000_000 < (two.cache(0) / "file").stat().st_size < 16_000_000
        assert two.run(1, fill).returncode == 0
    assert not left_of(two.id)
