"""`bench disk`: where a file lies, who reads what, the figures of given times, and bad input in one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.support.launch import Result
from tpimpi.diagnostics.bench.disk import (
    BUFFERED,
    DIRECT,
    Bench,
    Row,
    best,
    find_files,
    make_regions,
    sharing,
)
from tpimpi.errors import InputError, StorageError
from tpimpi.system.disk import Mount, mount_of

pytestmark = pytest.mark.alone

MIB = 1 << 20
# Lines as proc_pid_mountinfo(5) has them.
MOUNTS = r"""22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw - proc proc rw
30 22 8:2 / /home rw,relatime - xfs /dev/sda2 rw
31 30 0:40 / /home/my\040disk rw - btrfs /dev/sdb1 rw
32 22 0:50 / /srv rw - nfs4 server:/export rw
33 22 8:17 /sub /srv rw master:3 - ext4 /dev/sdb1 rw
34 22 0:60 / /dev/shm rw - tmpfs tmpfs rw
"""


@pytest.fixture
def mountinfo(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "device", "kind", "number", "point"),
    [
        ("/etc/hosts", "/dev/vda1", "ext4", "254:1", "/"),
        ("/home", "/dev/sda2", "xfs", "8:2", "/home"),
        ("/home/me/slices", "/dev/sda2", "xfs", "8:2", "/home"),
        ("/homework", "/dev/vda1", "ext4", "254:1", "/"),
        ("/home/my disk/x", "/dev/sdb1", "btrfs", "0:40", "/home/my disk"),
        ("/srv/x", "/dev/sdb1", "ext4", "8:17", "/srv"),  # what is mounted over another hides it
    ],
)
def test_the_file_system_of_a_path(mountinfo: Path, path: str, device: str, kind: str, number: str, point: str) -> None:
    assert mount_of(Path(path), mountinfo) == Mount(Path(point), device, kind, number)


def test_where_the_system_has_no_list_of_mounts(tmp_path: Path) -> None:
    assert mount_of(tmp_path, tmp_path / "nothing") == Mount(Path("/"), "unknown", "unknown", "0:0")


def test_the_disk_under_a_partition(tmp_path: Path) -> None:
    disk = tmp_path / "devices" / "sda"
    (disk / "sda2").mkdir(parents=True)
    (disk / "dev").write_text("8:0\n")
    (disk / "sda2" / "dev").write_text("8:2\n")
    (disk / "sda2" / "partition").write_text("2\n")
    blocks = tmp_path / "block"
    blocks.mkdir()
    (blocks / "8:0").symlink_to(disk)
    (blocks / "8:2").symlink_to(disk / "sda2")
    partition, whole = Mount(Path("/a"), "/dev/sda2", "xfs", "8:2"), Mount(Path("/b"), "/dev/sda", "xfs", "8:0")
    assert partition.disk(blocks) == whole.disk(blocks) == "8:0"
    assert Mount(Path("/c"), "/dev/sdz", "ext4", "9:9").disk(blocks) is None
    assert Mount(Path("/d"), "server:/export", "nfs4", "0:50").disk(blocks) is None
    assert Mount(Path("/e"), str(tmp_path / "mountinfo"), "btrfs", "0:51").disk(blocks) is None


def test_whether_readers_share_a_disk() -> None:
    here, there = Mount(Path("/a"), "x", "nfs4", "0:50"), Mount(Path("/b"), "y", "nfs4", "0:51")
    assert sharing([here]) == "one reader"
    assert sharing([here, here, here]) == "3 readers share one disk"
    assert sharing([here, there]) == "2 readers on 2 disks"


# What is read


def make(folder: Path, name: str, nbytes: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("wb") as file:
        file.truncate(nbytes)
    return folder / name


def test_the_slices_of_a_folder(tmp_path: Path) -> None:
    two = [make(tmp_path, f"rank-{rank}-of-2.h5", 3 * MIB) for rank in range(2)]
    three = [make(tmp_path, f"rank-{rank}-of-3.h5", 10 * MIB) for rank in range(3)]
    make(tmp_path, "other.h5", 100 * MIB)
    assert find_files(tmp_path, 2) == two
    assert find_files(tmp_path, 3) == three
    assert find_files(tmp_path, 1) == find_files(tmp_path, 8) == three  # none of so many ranks: the largest
    assert find_files(two[0], 2) == [two[0]]


def test_folders_of_slices(tmp_path: Path) -> None:
    make(tmp_path / "a", "rank-0-of-1.h5", 2 * MIB)
    larger = make(tmp_path / "b", "rank-0-of-1.h5", 3 * MIB)
    assert find_files(tmp_path, 1) == find_files(tmp_path, 4) == [larger]


@pytest.mark.parametrize(
    ("sizes", "readers", "expected"),
    [
        ([5 * MIB + 4095], 1, [(0, 0, 5 * MIB)]),
        ([5 * MIB], 2, [(0, 0, 2560 << 10), (0, 2560 << 10, 2560 << 10)]),
        ([2 * MIB, 4 * MIB], 2, [(0, 0, 2 * MIB), (1, 0, 4 * MIB)]),
        ([2 * MIB, 4 * MIB, 6 * MIB], 2, [(0, 0, 2 * MIB), (1, 0, 4 * MIB)]),
        ([4 * MIB, 5 * MIB], 3, [(0, 0, 2 * MIB), (1, 0, 5 * MIB), (0, 2 * MIB, 2 * MIB)]),
        ([3 * MIB + 4096], 3, [(0, 0, MIB), (0, MIB, MIB), (0, 2 * MIB, MIB)]),
    ],
)
def test_each_reader_has_a_region_of_its_own(
    tmp_path: Path, sizes: list[int], readers: int, expected: list[tuple[int, int, int]]
) -> None:
    files = [make(tmp_path, f"{index}.bin", nbytes) for index, nbytes in enumerate(sizes)]
    regions = make_regions(files, readers)
    assert [(files.index(region.path), region.start, region.length) for region in regions] == expected


def test_files_that_are_too_small(tmp_path: Path) -> None:
    file = make(tmp_path, "small.bin", MIB - 1)
    with pytest.raises(InputError, match=r"small.bin has 1048575 bytes; each needs 1048576 at least: give a larger"):
        make_regions([file], 1)
    file = make(tmp_path, "small.bin", 2 * MIB)
    with pytest.raises(InputError, match=r"has 2097152 bytes, 696320 for each of 3 readers; each needs 1048576"):
        make_regions([file], 3)


def test_a_region_is_gone_round_in(tmp_path: Path) -> None:
    (_, region) = make_regions([make(tmp_path, "file.bin", 20 * MIB)], 2)
    assert [region.take(4 * MIB) // MIB for _ in range(4)] == [10, 14, 10, 14]  # the last 2 MiB are no whole read


def test_readers_read_their_own_regions_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    true = os.preadv

    def recorded(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        read.append((offset, sum(len(buffer) for buffer in buffers)))
        return true(fd, buffers, offset)

    with Bench(make(tmp_path, "file.bin", 8 * MIB), readers=2, size=MIB) as bench:
        monkeypatch.setattr(os, "preadv", recorded)
        nbytes, elapsed = bench._turn(BUFFERED, 3, 0.05)
    assert elapsed > 0
    assert nbytes == sum(size for _, size in read)
    assert len(read) >= 6  # each of the three reads in flight, of both readers, at least once
    assert {offset for offset, _ in read} <= {index * MIB for index in range(8)}
    halves = [sum(offset < 4 * MIB for offset, _ in read), sum(offset >= 4 * MIB for offset, _ in read)]
    assert min(halves) >= 3


# What comes out


def test_figures_are_medians_of_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: dict[tuple[str, int], int] = {}

    def turn(how: str, depth: int, seconds: float) -> tuple[int, float]:
        number = turns[how, depth] = turns.get((how, depth), 0) + 1
        assert seconds == pytest.approx(0.4)
        return depth * 1000, [2.0, 1.0, 4.0, 0.5, 8.0][number - 1]

    with Bench(make(tmp_path, "file.bin", 8 * MIB), readers=1, size=MIB) as bench:
        bench.direct = True
        monkeypatch.setattr(bench, "_turn", turn)
        table = bench.run(2.0, lambda number, rounds: None)
    assert [(row.how, row.in_flight) for row in table] == [(BUFFERED, 1), *((DIRECT, depth) for depth in (1, 2, 4, 8))]
    assert table[0] == Row(BUFFERED, 1, 500.0, [500.0, 1000.0, 250.0, 2000.0, 125.0], 5000)
    assert best(table) == table[-1]
    assert table[-1].rate == 4000


def test_a_file_in_memory_has_no_direct_reads(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir() or not mount_of(shm).in_memory:
        pytest.skip("no /dev/shm in memory")
    folder = shm / f"tpimpi-test-{os.getpid()}"
    try:
        with Bench(make(folder, "file.bin", 2 * MIB), readers=1, size=MIB) as bench:
            table = bench.run(0.01, lambda number, rounds: None)
            remarks = " ".join(bench.remarks())
        assert [row.how for row in table] == [BUFFERED]
        assert "is in memory (tmpfs): no disk is measured, and there is no O_DIRECT" in remarks
        assert "only 2.1 MB for a reader" in remarks
    finally:
        (folder / "file.bin").unlink(missing_ok=True)
        folder.rmdir()


def test_a_file_that_shrinks_ends_the_measurement(tmp_path: Path) -> None:
    file = make(tmp_path, "file.bin", 8 * MIB)
    with Bench(file, readers=1, size=MIB) as bench:
        make(tmp_path, "file.bin", 0)
        with pytest.raises(StorageError, match=r"file.bin has become shorter while it was read"):
            bench.run(0.05, lambda number, rounds: None)


def test_table_and_report_of_the_cache_folder(tpimpi: Callable[..., Result], tmp_path: Path) -> None:
    for rank in range(2):
        make(tmp_path / "some-model", f"rank-{rank}-of-2.h5", 3 * MIB)
    report = tmp_path / "disk.json"
    arguments = ["--readers", "2", "--size", "1MiB", "--seconds", "0.05", "--json", str(report)]
    result = tpimpi("bench", "disk", *arguments, env={"TPIMPI_CACHE": str(tmp_path)})
    assert result.code == 0, result.err
    found = json.loads(report.read_text())
    assert (found["readers"], found["size"], found["disks"]) == (2, MIB, 1)
    assert [(region["start"], region["bytes"]) for region in found["regions"]] == [(0, 3 * MIB)] * 2
    expected = [(BUFFERED, 1)] + [(DIRECT, depth) for depth in (1, 2, 4, 8) if found["direct"]]
    assert [(row["how"], row["in_flight"]) for row in found["rows"]] == expected
    for row in found["rows"]:
        assert len(row["rates"]) == 5
        assert row["rate"] == sorted(row["rates"])[2] > 0
        assert row["bytes_read"] >= 5 * 2 * row["in_flight"] * MIB
    assert found["best"] in found["rows"]
    lines = [line for line in result.out.splitlines() if re.match(rf"({BUFFERED}|{DIRECT}) +\d ", line)]
    assert len(lines) == len(expected), result.out
    assert "2 readers share one disk; 1 MiB a read" in result.out
    assert mount_of(tmp_path).describe() in result.out
    assert "only 3.1 MB for a reader" in result.out


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (["/nowhere"], "/nowhere is not there; give a slice file, a folder of slices, or any large file"),
        (["/dev/null"], "/dev/null is neither a file nor a folder"),
        ([str(Path(__file__).parent)], "diagnostics has no slices in it"),
        ([__file__], r"test_bench_disk.py has \d+ bytes; each needs 1048576 at least"),
        (["--readers", "0"], "--readers is 0, must be 1 to 64"),
        (["--readers", "x"], "--readers: invalid int value: 'x'"),
        (["--size", "1000001"], "--size is 1000001, must be a multiple of 4096 bytes, at most 64MiB"),
        (["--size", "65MiB"], "--size is 65MiB, must be a multiple of 4096 bytes, at most 64MiB"),
        (["--size", "x"], "--size is 'x', must be a size such as"),
        (["--seconds", "0"], "--seconds is 0, must be a number over 0"),
        (["--json", "/nowhere/x.json"], "--json /nowhere/x.json: there is no folder /nowhere"),
        (["--formats", "f32"], "unrecognized arguments: --formats"),
        (["a", "b"], "unrecognized arguments: b"),
    ],
)
def test_bad_input_is_one_line(tpimpi: Callable[..., Result], arguments: list[str], pattern: str) -> None:
    result = tpimpi("bench", "disk", *arguments)
    assert (result.code, result.out) == (2, ""), result.err
    assert len(result.our_lines) == 1, result.err
    assert re.search(pattern, result.our_lines[0]), result.our_lines[0]


def test_help_shows_both_benches(tpimpi: Callable[..., Result]) -> None:
    result = tpimpi("bench", "--help")
    assert (result.code, result.err) == (0, "")
    assert {"--formats", "--shape", "--readers", "--size", "PATH"} <= set(result.out.split())
