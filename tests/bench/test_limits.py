"""bench/limits: both versions' files and values on a fake tree, and real groups where there are some; and its users."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bench.limits import groups as limits
from bench.studies import memory_scheduler, slowed
from tests.support.launch import ROOT, Launcher, Result, run_command

pytestmark = pytest.mark.alone

# What the kernel puts into a new group, by Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst,
# Documentation/scheduler/sched-bwc.rst and cgroup-v1/blkio-controller.rst.
V2_FILES = {
    "cgroup.procs": "",
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.current": "12288\n",
    "memory.peak": "20480\n",
    "memory.events": "low 0\nhigh 7\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
    "cpu.max": "max 100000\n",
    "io.max": "",
}
V1_FILES = {
    "memory": {
        "cgroup.procs": "",
        "memory.limit_in_bytes": "9223372036854771712\n",
        "memory.memsw.limit_in_bytes": "9223372036854771712\n",
        "memory.usage_in_bytes": "12288\n",
        "memory.max_usage_in_bytes": "20480\n",
        "memory.failcnt": "0\n",
        "memory.memsw.failcnt": "0\n",
        "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n",
    },
    "cpu": {"cgroup.procs": "", "cpu.cfs_period_us": "100000\n", "cpu.cfs_quota_us": "-1\n"},
    "blkio": {"cgroup.procs": "", "blkio.throttle.read_bps_device": ""},
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a new folder gets the files of a group, and can be removed with them, as in the kernel's tree."""

    def mkdir(folder: Path) -> None:
        files = V1_FILES.get(folder.parent.name, V2_FILES)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)

    monkeypatch.setattr(limits, "_make", mkdir)
    monkeypatch.setattr(limits.Path, "rmdir", shutil.rmtree)
    monkeypatch.setattr(limits, "disk_number", lambda path: "254:0")
    return tmp_path


def v2(top: Path, controllers: str = "cpuset cpu io memory pids") -> Any:
    top = top / "unified"
    top.mkdir()
    (top / "cgroup.controllers").write_text(controllers + "\n")
    (top / "cgroup.subtree_control").write_text("memory\n")
    return limits.Trees({}, top)


def v1(top: Path) -> Any:
    for name in V1_FILES:
        (top / name).mkdir()
    return limits.Trees({"memory": top / "memory", "cpu": top / "cpu", "io": top / "blkio"}, None)


def text(path: Path) -> str:
    return path.read_text()


def test_trees_are_found(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(
        "30 22 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n"
        "31 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:5 - cgroup cgroup rw,cpu,cpuacct\n"
        "32 30 0:29 / /sys/fs/cgroup/my\\040memory rw - cgroup cgroup rw,memory\n"
        "33 30 0:30 / /sys/fs/cgroup/blkio rw - cgroup cgroup rw,blkio\n"
        "34 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        "35 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    top = Path("/sys/fs/cgroup")
    expected = {"cpu": top / "cpu,cpuacct", "memory": top / "my memory", "io": top / "blkio"}
    assert limits.find_trees(mountinfo) == limits.Trees(expected, top / "unified")
    mountinfo.write_text("30 22 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n")
    assert limits.find_trees(mountinfo) == limits.Trees({}, top)


def test_files_of_version_2(fake: Path) -> None:
    trees = v2(fake)
    folder = fake / "unified" / "g"
    limited = {"memory": 700_000_000, "cpu": 0.5, "read_bps": 200_000_000, "device": Path("/x")}
    with limits.Group("g", **limited, trees=trees) as group:
        assert text(fake / "unified" / "cgroup.subtree_control") == "+cpu +io"  # the one that was there stays
        assert text(folder / "memory.max") == "700000000"
        assert text(folder / "memory.swap.max") == "0"
        assert text(folder / "cpu.max") == "50000 100000"
        assert text(folder / "io.max") == "254:0 rbps=200000000"
        assert (group.usage(), group.peak(), group.limit_hits()) == (12288, 20480, 0)
        (folder / "memory.events").write_text("low 0\nhigh 7\nmax 5\noom 2\noom_kill 1\n")
        assert group.limit_hits() == 7
        (folder / "memory.peak").unlink()  # before Linux 5.19
        assert group.peak() is None
        group.set_read_bps(None)
        assert text(folder / "io.max") == "254:0 rbps=max"
    assert not folder.exists()


def test_controllers_that_version_2_has_already_given(fake: Path) -> None:
    trees = v2(fake)
    with limits.Group("g", memory=10**8, trees=trees):
        assert text(fake / "unified" / "cgroup.subtree_control") == "memory\n"
    with limits.Group("g", cpu=1, trees=trees):
        assert text(fake / "unified" / "cgroup.subtree_control") == "+cpu"


def test_files_of_version_1(fake: Path) -> None:
    trees = v1(fake)
    limited = {"memory": 700_000_000, "cpu": 1.5, "read_bps": 200_000_000, "device": Path("/x")}
    with limits.Group("g", **limited, trees=trees) as group:
        memory = fake / "memory" / "g"
        for name in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
            assert text(memory / name) == "700000000"
        assert text(fake / "cpu" / "g" / "cpu.cfs_period_us") == "100000"
        assert text(fake / "cpu" / "g" / "cpu.cfs_quota_us") == "150000"
        assert text(fake / "blkio" / "g" / "blkio.throttle.read_bps_device") == "254:0 200000000"
        assert (group.usage(), group.peak(), group.limit_hits()) == (12288, 20480, 0)
        (memory / "memory.failcnt").write_text("3\n")
        (memory / "memory.memsw.failcnt").write_text("4\n")
        (memory / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 1\n")
        assert group.limit_hits() == 8
        group.set_read_bps(None)
        assert text(fake / "blkio" / "g" / "blkio.throttle.read_bps_device") == "254:0 0"
    assert not any((fake / name / "g").exists() for name in V1_FILES)


def test_version_1_near_the_limit_counts_as_at_it(fake: Path) -> None:
    with limits.Group("g", memory=700_000_000, trees=v1(fake)) as group:
        memory = fake / "memory" / "g"
        (memory / "memory.max_usage_in_bytes").write_text(f"{700_000_000 - (2 << 20)}\n")
        assert group.limit_hits() == 0
        (memory / "memory.max_usage_in_bytes").write_text(f"{700_000_001 - (2 << 20)}\n")
        assert group.limit_hits() == 1


@pytest.mark.parametrize("version", [v1, v2])
def test_a_command_enters_its_group(fake: Path, version: Any) -> None:
    with limits.Group("g", cpu=1, trees=version(fake)) as group:
        command = group.command(["sh", "-c", 'echo $$ "$1"', "sh", "two words"])
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pid, words = done.stdout.strip().split(" ", 1)
        assert words == "two words"
        assert len(group.folders) == (2 if version is v1 else 1)
        assert [text(folder / "cgroup.procs").strip() for folder in group.folders] == [pid] * len(group.folders)
        assert group.pids() == {int(pid)}
        for folder in group.folders:
            (folder / "cgroup.procs").write_text("")  # the kernel would have; that process has ended
        group.folders[0].joinpath("cgroup.procs").unlink()
        group.folders[0].joinpath("cgroup.procs").mkdir()
        assert subprocess.run(command, capture_output=True, check=False).returncode == 125, "outside the group"
        group.folders[0].joinpath("cgroup.procs").rmdir()


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_RANK", "PMI_RANK"])
def test_a_rank_enters_its_own_group(fake: Path, variable: str) -> None:
    with limits.RankGroups("g", 2, memory=10**8, trees=v2(fake)) as groups:
        env = {name: value for name, value in os.environ.items() if not name.endswith("_RANK")}
        command = groups.command(["sh", "-c", "echo $$"])
        done = subprocess.run(command, env={**env, variable: "1"}, capture_output=True, text=True, check=True)
        assert [group.pids() for group in groups.groups] == [set(), {int(done.stdout)}]
        (groups.groups[1].folders[0] / "cgroup.procs").write_text("")
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "mpirun gave no rank" in done.stderr
    assert not (fake / "unified" / "g-r0").exists()


def test_what_cannot_be(fake: Path) -> None:
    with pytest.raises(limits.LimitError, match="no control groups are mounted here"):
        limits.Group("g", trees=limits.Trees({}, None))
    with pytest.raises(limits.LimitError, match=r"no control groups \(v1\) for cpu are mounted here"):
        limits.Group("g", cpu=1, trees=limits.Trees({"memory": fake}, None))
    with pytest.raises(limits.LimitError, match=r"in .*unified have no controller memory"):
        limits.Group("g", trees=v2(fake, "cpu io")).__enter__()
    with pytest.raises(limits.LimitError, match=r"a group cannot be named '\.\./g'"):
        limits.Group("../g", trees=limits.Trees({}, fake / "unified"))
    with pytest.raises(limits.LimitError, match="read_bps needs device"):
        limits.Group("g", read_bps=1, trees=limits.Trees({}, fake / "unified"))


# Real groups


@pytest.fixture
def real() -> ModuleType:
    if reason := limits.available():
        pytest.skip(reason)
    return limits


HOG = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096]); print('touched', flush=True)"
PROGRAM = [sys.executable, "-m", "bench.limits"]
SLOWED = [sys.executable, "-m", "bench.studies.slowed"]


def test_a_program_within_its_limit(real: ModuleType) -> None:
    with real.Group(f"tpimpi-test-{os.getpid()}", memory=100_000_000) as group:
        command = group.command([sys.executable, "-c", HOG, "40000000"])
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout == "touched\n"
        assert group.limit_hits() == 0
        peak = group.peak()
        assert peak is None or 40_000_000 < peak < 98_000_000


def test_a_program_over_its_limit_is_killed_and_counted(real: ModuleType) -> None:
    with real.Group(f"tpimpi-test-{os.getpid()}", memory=60_000_000) as group:
        command = group.command([sys.executable, "-c", HOG, "200000000"])
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stdout) == (-9, "")
        assert group.limit_hits() > 0


def test_page_cache_at_the_limit_is_counted(real: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(60_000_000))
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with real.Group(f"tpimpi-test-{os.getpid()}", memory=20_000_000) as group:
        subprocess.run(group.command(["cat", str(file)]), stdout=subprocess.DEVNULL, check=True, timeout=60)
        assert group.limit_hits() > 0


def test_what_is_left_in_a_group_is_killed(real: ModuleType) -> None:
    with real.Group(f"tpimpi-test-{os.getpid()}", memory=60_000_000) as group:
        process = subprocess.Popen(group.command(["sh", "-c", "echo; sleep 1000"]), stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in group.pids()
    assert process.wait(timeout=10) == -9
    process.stdout.close()
    assert not any(folder.exists() for folder in group.folders)


def test_as_a_command(real: ModuleType) -> None:
    result = run_command([*PROGRAM, "--memory", "100M", "--", sys.executable, "-c", HOG, "40000000"], env={}, cwd=ROOT)
    assert (result.code, result.out) == (0, "touched\n"), result.err
    assert result.err.endswith("MB of 100 MB, 0 times at the limit\n")
    result = run_command([*PROGRAM, "--", "sh", "-c", "exit 7"], env={}, cwd=ROOT)
    assert result.code == 7, result.err
    result = run_command([*PROGRAM, "--memory", "x", "--", "true"], env={}, cwd=ROOT)
    assert (result.code, len(result.err.splitlines())) == (2, 1), result.err


@pytest.mark.slow
def test_each_rank_in_its_own_group(real: ModuleType, mpirun: Launcher) -> None:
    arguments = [*PROGRAM[1:], "--each-rank", "--memory", "100M", "--", sys.executable, "-c", HOG, "40000000"]
    result = mpirun(2, *arguments)
    assert result.code == 0, result.err
    # MPICH forwards what ranks print at once with their lines mixed.
    assert "".join(result.out.split()) == "touched" * 2
    for rank in range(2):
        assert f"limits r{rank}: peak " in result.err
    assert result.err.count("MB of 100 MB, 0 times at the limit") == 2, result.err


# The programs that measure with groups


def test_slowed_multiplies_so_many_times() -> None:
    class Backend:
        calls = 0

        def linear(self, x: int, weight: int, bias: int | None = None) -> int:
            self.calls += 1
            return x * weight + (bias or 0)

    backend = Backend()
    slowed.repeat_linear(backend, 3.5)
    assert [backend.linear(2, n, bias=1) for n in range(4)] == [1, 3, 5, 7]
    assert backend.calls == 14
    backend = Backend()
    slowed.repeat_linear(backend, 1)
    assert (backend.linear(2, 3), backend.calls) == (6, 1)


def test_slowed_is_asked_for_a_number() -> None:
    for arguments in ([], ["--prompt"], ["0.5"], ["inf"], ["nan"]):
        result = run_command([sys.executable, "-m", "bench.studies.slowed", *arguments], env={}, cwd=ROOT)
        assert (result.code, len(result.err.splitlines())) == (1, 1), result.err
        assert "1 or more" in result.err


def test_a_slowed_run_says_the_same(
    tiny: Path, cache: dict[str, str], tpimpi: Callable[..., Result], tmp_path: Path
) -> None:
    arguments = ["--model", str(tiny), "--raw", "--prompt", "the quick", "--max-tokens", "8", "--quiet"]
    plain = tpimpi(*arguments)
    slowed = run_command([*SLOWED, "2.5", *arguments], env=cache, cwd=ROOT)
    assert (plain.code, slowed.code) == (0, 0), slowed.err
    assert plain.out == slowed.out != ""


def test_the_line_of_given_runs() -> None:
    def run(budget: str, limit: int | None, streamed: int, seconds: float, hits: int) -> dict[str, Any]:
        report = {
            "s_per_token": seconds,
            "ttft_s": 1.0,
            "token_ids": [5, 6],
            "ranks": [
                {
                    "streamed_bytes_per_token": streamed // 2,
                    "peak_rss_bytes": 100 + rank,
                    "pinned_bytes": 10,
                    "timeline": [],
                }
                for rank in range(2)
            ],
        }
        disks = [
            {
                "rows": [
                    {"how": how, "rate": rate}
                    for how, rate in (("buffered", 9e9), ("O_DIRECT", 1e8), ("O_DIRECT", most))
                ]
            }
            for most in (900e6, 1100e6)
        ]
        found = memory_scheduler.figures(report, None, disks)
        return {"budget": budget, "limit": limit, **found, "group_peak_bytes": [80, None], "limit_hits": [hits, 1]}

    first = run("1G", None, 2 * 10**9, 2.2, 0)
    assert (first["streamed_bytes_per_token"], first["peak_rss_bytes"]) == (2 * 10**9, 101)
    assert first["reading_s"] == pytest.approx(2.0)  # 2 GB at 1 GB/s
    assert first["of_disk"] == pytest.approx(1.1)
    runs = [run("400MB", 400, 4 * 10**9, 4.4, 0), first, run("1G", 1000, 2 * 10**9, 2.4, 2), run("3G", None, 0, 0.4, 0)]
    runs.append(run("1G", 1000, 2 * 10**9, 2.8, 0))
    rows = memory_scheduler.summarize_line(runs, "400MB", "3G")
    assert [(row["budget"], row["limited"], row["runs"]) for row in rows] == [
        *(("400MB", True, 1), ("1G", False, 1), ("1G", True, 2), ("3G", False, 1))
    ]
    assert [row["limit_hits"] for row in rows] == [1, None, 4, None]
    assert rows[2]["s_per_token"] == pytest.approx(2.6)
    assert rows[2]["of_disk"] == pytest.approx(1.3)
    assert rows[3]["of_disk"] is None, "nothing is streamed"
    assert [row["of_line"] for row in rows] == pytest.approx([1, 2.2 / 2.4, 2.6 / 2.4, 1])
    assert [row["pinned_bytes"] for row in rows] == [20] * 4
    assert [row["peak_bytes"] for row in rows] == [80] * 4
