"""What a rank may take: sizes as they are written, what hosts, cgroups and jobs have free, and what a budget buys."""

from __future__ import annotations

import itertools
import platform
import sys
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tests.support.launch import run_command
from tests.support.memory_cases import GB, HOST, MB
from tpimpi.engine.budget import RESERVE_BYTES, Needs, divide, make_budget, per_rank
from tpimpi.errors import InputError
from tpimpi.system.memory import JOB, Place, headroom, places, resident_bytes
from tpimpi.system.units import parse_size, show_megabytes_rounded_up, show_size

pytestmark = pytest.mark.usefixtures("host")


# This process

FREED_AND_RELEASED = """
from tpimpi.system.memory import release_freed_memory, resident_bytes
kept = [bytearray(4000) for _ in range(16_000)]
del kept[:-1]  # what stays lies at the end of the heap, so the C library gives nothing back by itself
before = resident_bytes()
release_freed_memory()
print(before - resident_bytes())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory")
def test_freed_memory_goes_back_to_the_system() -> None:
    result = run_command([sys.executable, "-c", FREED_AND_RELEASED], env={})
    assert int(result.out) > 50e6, result.err


# Sizes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("700M", 700_000_000),
        ("700MB", 700_000_000),
        ("700m", 700_000_000),
        ("412 MB", 412_000_000),  # as the message about a budget writes it
        (" 2G\n", 2_000_000_000),
        ("2.5G", 2_500_000_000),
        ("512MiB", 512 * 2**20),
        ("512Mi", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("1000kB", 1_000_000),
        ("1000KiB", 1_024_000),
        ("1T", 10**12),
        ("700000000", 700_000_000),
        ("700000000B", 700_000_000),
        ("1.0000019M", 1_000_001),  # no part of a byte, and never more than was written
    ],
)
def test_m_and_g_are_powers_of_ten_and_mib_and_gib_of_two(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@given(
    st.decimals(min_value=2, max_value=9999, places=3),
    st.sampled_from([("M", 10**6), ("MB", 10**6), ("G", 10**9), ("MiB", 2**20), ("Gi", 2**30), ("TB", 10**12)]),
)
def test_any_size_is_what_decimal_says(number: Decimal, unit: tuple[str, int]) -> None:
    assert parse_size(f"{number}{unit[0]}", "--memory") == int(number * unit[1])


NOT_SIZES = [
    *("", " ", "0", "0M", "-1G", "+1G", "1e9", "1e9M", "700", "999999", "0.9M", "M", "iB", "700i", "700iB"),
    *("1.5.2G", ".5G", "5.G", "1,5G", "1_000M", "0x10M", "700MM", "700M;", "700M 700M", "700M\0", "\x1b[31m700M"),
    *("inf", "nan", "auto", "all", "--memory", "2E", "99999999T", "9" * 400, "9" * 400 + "M"),
    *("\u0661\u0662M", "\uff17\uff10\uff10M", "\u00b2G", "700\u041c\u0431"),  # digits and letters of other scripts
]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_what_is_no_size_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="--memory is ") as caught:
        parse_size(text, "--memory")
    message = str(caught.value)
    assert len(message) < 200 and len(message.splitlines()) == 1 and message.isprintable()
    assert "700M" in message, "it says what a size looks like"


@pytest.mark.parametrize("text", ["7000000\u212a", "700M\u0131", "700M\u0130B"])
def test_letters_that_only_look_like_units_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_size(text, "--memory")


def test_sizes_for_people() -> None:
    assert (show_size(412_345_678), show_size(3_900_000_000)) == ("412 MB", "3.90 GB")
    assert (show_megabytes_rounded_up(412_000_000), show_megabytes_rounded_up(412_000_001)) == ("412 MB", "413 MB")


@given(st.integers(MB, 10**12))
def test_the_size_that_a_message_names_is_enough(size: int) -> None:
    assert size <= parse_size(show_megabytes_rounded_up(size), "--memory") < size + MB


def test_what_this_process_has_resident() -> None:
    assert abs(resident_bytes() - psutil.Process().memory_info().rss) < 32 * MB  # the kernel's counters are not exact


@pytest.mark.parametrize(("sizes", "ranks", "each"), [([7], 3, [7, 7, 7]), ([7, 8, 9], 3, [7, 8, 9]), ([7], 1, [7])])
def test_one_size_for_each_or_one_for_all(sizes: list[int], ranks: int, each: list[int]) -> None:
    assert per_rank(sizes, ranks) == each


@pytest.mark.parametrize(("sizes", "ranks"), [([7, 8], 1), ([7, 8], 3), ([7, 8, 9, 9], 3)])
def test_another_number_of_sizes_is_refused(sizes: list[int], ranks: int) -> None:
    with pytest.raises(InputError, match=f"--memory has {len(sizes)} sizes, this run has {ranks} ranks"):
        per_rank(sizes, ranks)


# What there is


def _v1(folder: Path, limit: object, usage: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    stat = f"cache 1\ninactive_file 3\nhierarchical_memory_limit 5\ntotal_cache 7\ntotal_inactive_file {cached}\n"
    (folder / "memory.stat").write_text(stat)


def _v2(folder: Path, limit: object, usage: int = 0, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\nfile 2\ninactive_anon 3\ninactive_file {cached}\nactive_file 5\n")


@pytest.fixture
def tree(tmp_path: Path) -> tuple[Path, Path]:
    """Folders that stand for /proc and /sys/fs/cgroup."""
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroups.mkdir()
    return proc, cgroups


def _found(tree: tuple[Path, Path], lines: str) -> list[tuple[str, int, int]]:
    proc, cgroups = tree
    (proc / "self" / "cgroup").write_text(lines)
    found = places(proc, cgroups)
    assert found[0] == Place("", HOST, 20 * GB)
    return [(str(Path(place.name).relative_to(cgroups)), place.total, place.free) for place in found[1:]]


def test_nested_cgroups_of_version_2(tree: tuple[Path, Path]) -> None:
    _v2(tree[1] / "batch", 8 * GB, usage=5 * GB, cached=1 * GB)
    _v2(tree[1] / "batch" / "job", "max", usage=4 * GB)
    _v2(tree[1] / "batch" / "job" / "step", 6 * GB, usage=1 * GB)
    assert _found(tree, "0::/batch/job/step\n") == [
        ("batch/job/step", 6 * GB, 5 * GB),
        ("batch", 8 * GB, 4 * GB),
    ]


def test_nested_cgroups_of_version_1(tree: tuple[Path, Path]) -> None:
    # As the kernel writes "no limit" in version 1: the largest number of bytes in whole pages.
    _v1(tree[1] / "memory", 9223372036854771712, usage=9 * GB)
    _v1(tree[1] / "memory" / "batch", 8 * GB, usage=5 * GB, cached=1 * GB)
    _v1(tree[1] / "memory" / "batch" / "job:1", 9223372036854771712, usage=1)
    lines = "12:cpu,cpuacct:/batch\n9:memory:/batch/job:1\n1:name=systemd:/x\n0::/\n"
    assert _found(tree, lines) == [("memory/batch", 8 * GB, 4 * GB)]


def test_version_1_beside_an_empty_version_2(tree: tuple[Path, Path]) -> None:
    _v1(tree[1] / "memory" / "job", 2 * GB, usage=500 * MB)
    (tree[1] / "unified").mkdir()
    assert _found(tree, "4:hugetlb,memory:/job\n0::/job\n") == [("memory/job", 2 * GB, 1500 * MB)]


@pytest.mark.parametrize("lines", ["9:memory:/docker/0123\n", "9:memory:/../../0123\n", "9:memory:/\n"])
def test_in_a_container_the_top_of_the_tree_is_its_own(tree: tuple[Path, Path], lines: str) -> None:
    _v1(tree[1] / "memory", 2 * GB, usage=500 * MB)
    assert _found(tree, lines) == [("memory", 2 * GB, 1500 * MB)]


def test_a_limit_beyond_the_host_and_what_is_not_there_are_left_out(tree: tuple[Path, Path]) -> None:
    assert places(*tree) == [Place("", HOST, 20 * GB)], "no /proc/self/cgroup"
    _v2(tree[1] / "a", 64 * GB)
    assert _found(tree, "0::/a\n") == []
    assert _found(tree, "0::/gone\n") == []
    assert _found(tree, "") == []
    for name in ("memory.max", "memory.current", "memory.stat"):
        _v2(tree[1] / "b", 1 * GB)
        (tree[1] / "b" / name).unlink()
        assert _found(tree, "0::/b\n") == []
    _v2(tree[1] / "c", "nonsense")
    assert _found(tree, "0::/c\n") == []


def test_a_cgroup_over_its_limit_has_nothing_free(tree: tuple[Path, Path]) -> None:
    _v2(tree[1] / "a", 1 * GB, usage=1 * GB + 4096)
    assert _found(tree, "0::/a\n") == [("a", 1 * GB, 0)]


def test_what_slurm_allows_the_job(tree: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> list[Place]:
        return [place for place in places(*tree) if place.name == JOB]

    # https://slurm.schedmd.com/srun.html: SLURM_MEM_PER_NODE is --mem, SLURM_MEM_PER_CPU is --mem-per-cpu, in MB of 2^20
    # bytes; --mem=0 is all of the host's memory.
    assert job() == []
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "2000")
    assert job() == [], "how many CPUs is not known"
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "3")
    assert job() == [Place(JOB, 6000 * 2**20, 6000 * 2**20)]
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    assert job() == [Place(JOB, 4 * 2**30, 4 * 2**30)]
    for text in ("0", "1000000", "much", "4096M"):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", text)
        assert job() == [], text


def test_what_is_left_for_others() -> None:
    assert Place("", 24 * GB, 0).reserve == 1_500_000_000
    assert Place("", 2 * GB, 0).reserve == 256_000_000
    assert Place("", 400 * MB, 0).reserve == 100_000_000
    host, group, job = Place("", 16 * GB, 9 * GB), Place("/g", 4 * GB, 2 * GB), Place(JOB, GB, 0)
    assert headroom([host]) == 8 * GB
    assert headroom([host, group, job]) == 2 * GB - 256 * MB, "the tightest counts, and nobody keeps count of a job"
    assert headroom([host, Place("/g", 4 * GB, 0)]) == -256 * MB


# Budgets


def _needs(fixed: int, tiles: int, least: int = 0, usual: int = 0) -> Needs:
    """So much in all for base, cache, work and reserve (of which no less than RESERVE_BYTES)."""
    base = (fixed - RESERVE_BYTES) // 2
    work = (fixed - RESERVE_BYTES - base) // 2
    return Needs(base, fixed - RESERVE_BYTES - base - work, work, least, max(least, usual), tiles)


NEEDS = _needs(fixed=200 * MB, tiles=1000 * MB, least=30 * MB, usual=80 * MB)


def test_the_parts_of_a_budget() -> None:
    assert (NEEDS.fixed, NEEDS.least, NEEDS.most) == (200 * MB, 230 * MB, 1200 * MB)


@pytest.mark.parametrize("promise", [MB, 229 * MB, 230 * MB - 1])
def test_a_budget_that_cannot_work_is_refused(promise: int) -> None:
    # 4 MB more than the least are named, since the program is not always as large.
    with pytest.raises(
        InputError, match=r"--memory is \d+ MB, this rank needs at least 234 MB \(.*\); give that"
    ) as caught:
        make_budget(NEEDS, promise)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(InputError, match="--memory auto finds 5 MB, this rank needs at least 234 MB"):
        make_budget(NEEDS, promise, "--memory auto finds 5 MB")


@pytest.mark.parametrize(
    ("promise", "buffers", "pinned"),
    [
        (230, 30, 0),
        (231, 30, 1),
        (320, 30, 90),
        (400, 50, 150),  # a quarter of what is left
        (520, 80, 240),
        (1199, 80, 919),
        (1200, 80, 1000),  # all of it, and then the ring takes nothing
        (5000, 80, 1000),
    ],
)
def test_what_a_budget_buys(promise: int, buffers: int, pinned: int) -> None:
    budget = make_budget(NEEDS, promise * MB)
    assert (budget.buffers, budget.pinned) == (buffers * MB, pinned * MB)


sizes = st.integers(0, 10**12)


@given(sizes, sizes, sizes, sizes, st.integers(0, 10**10), st.integers(0, 10**10), st.integers(0, 2 * 10**10))
def test_a_budget_never_exceeds_its_promise(base, cache, work, least, more, tiles_more, extra) -> None:
    needs = Needs(base, cache, work, least, least + more, least + tiles_more)
    promise = needs.least + extra
    budget = make_budget(needs, promise)
    assert least <= budget.buffers <= needs.usual_buffers and 0 <= budget.pinned <= needs.tiles
    taken = needs.fixed + budget.pinned + (budget.buffers if budget.pinned < needs.tiles else 0)
    assert taken <= promise


# Dividing


def _streamed(needs: Mapping[int, Needs], shares: Mapping[int, int]) -> int:
    """What the rank that reads most reads for a token, buffers left aside."""
    return max(max(0, need.tiles - (shares[rank] - need.fixed)) for rank, need in needs.items())


rank_needs = st.builds(_needs, st.integers(RESERVE_BYTES, RESERVE_BYTES + 50), st.integers(0, 60))


@examples(300)
@given(st.lists(rank_needs, min_size=1, max_size=6), st.integers(0, 6 * (RESERVE_BYTES + 120)))
def test_never_more_is_given_out_than_there_is(each: list[Needs], free: int) -> None:
    needs = dict(enumerate(each))
    shares = divide(free, needs)
    assert shares.keys() == needs.keys() and sum(shares.values()) <= free
    assert free - sum(shares.values()) <= len(needs) or sum(n.fixed for n in each) > free, "and nothing is left lying"
    assert min(shares.values()) >= 0


@examples(150)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=3),
    st.integers(0, 40),
)
def test_what_is_streamed_is_as_level_as_can_be(each: list[tuple[int, int]], spare: int) -> None:
    needs = {rank: _needs(RESERVE_BYTES + fixed, tiles) for rank, (fixed, tiles) in enumerate(each)}
    fixed = sum(need.fixed for need in needs.values())
    # Every way to divide what is to be spared, tried out.
    ways = itertools.product(*(range(need.tiles + 1) for need in needs.values()))
    best = min(
        _streamed(needs, {rank: need.fixed + kept[rank] for rank, need in needs.items()})
        for kept in ways
        if sum(kept) <= spare
    )
    assert _streamed(needs, divide(fixed + spare, needs)) == best


def test_each_gets_what_works_where_there_is_enough_for_all() -> None:
    # Rank 0 has a head that is larger than all that is to spare; rank 1 still needs its buffers.
    needs = {0: _needs(100 * MB, tiles=1000 * MB, least=20 * MB), 1: _needs(80 * MB, tiles=400 * MB, least=20 * MB)}
    for free in (220 * MB, 260 * MB, 500 * MB, 700 * MB, 1000 * MB, 1700 * MB):
        shares = divide(free, needs)
        assert sum(shares.values()) <= free
        for rank, need in needs.items():
            make_budget(need, shares[rank])  # raises where it is too little


def test_the_rank_with_most_to_keep_gets_more() -> None:
    needs = {
        0: _needs(100 * MB, tiles=900 * MB),
        1: _needs(80 * MB, tiles=500 * MB),
        2: _needs(80 * MB, tiles=500 * MB),
    }
    assert divide(1000 * MB, needs) == {0: 100 * MB + 513_333_333, 1: 80 * MB + 113_333_333, 2: 80 * MB + 113_333_333}
    assert divide(460 * MB, needs) == {0: 300 * MB, 1: 80 * MB, 2: 80 * MB}
    assert divide(2760 * MB, needs) == {0: 1200 * MB, 1: 780 * MB, 2: 780 * MB}, "more than is of use: divided evenly"
    assert divide(130 * MB, needs) == {0: 50 * MB, 1: 40 * MB, 2: 40 * MB}, "too little in any case: in proportion"
