"""What ranks tell each other before a run, and what a user is told of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.launch import Launcher
from tpimpi.engine.ranks import RankInfo, bound_to_one_core, without_native

FREE = RankInfo("laptop", frozenset({0, 1, 2, 3}), 4, True)


def test_ranks_share_the_cores_that_both_may_use_on_one_host() -> None:
    bound = [RankInfo("laptop", frozenset({core}), 4, True) for core in (0, 1)]
    assert FREE.shares_cores_with(FREE) and FREE.shares_cores_with(bound[0])
    assert not bound[0].shares_cores_with(bound[1])
    assert not FREE.shares_cores_with(RankInfo("desktop", FREE.cores, 4, True))


def test_a_rank_bound_to_one_core_of_several_is_named() -> None:
    bound, small = RankInfo("laptop", frozenset({2}), 4, True, True), RankInfo("pi", frozenset({0}), 1, True)
    assert bound_to_one_core([FREE, small]) is None
    assert bound_to_one_core([RankInfo("laptop", frozenset({2}), 4, True)]) is None, "somebody else did it"
    said = bound_to_one_core([FREE, bound, small])
    assert said is not None and said.startswith("r1 laptop: bound to one core") and "--bind-to none" in said


def test_ranks_without_kernels_are_named() -> None:
    bare = RankInfo("pi", frozenset({0}), 4, False)
    assert without_native([FREE, FREE]) is None
    said = without_native([FREE, bare, bare])
    assert said is not None and said.startswith("r1 pi, r2 pi: the native kernels are not installed")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is all that there is")
def test_a_launcher_that_binds_ranks_is_noticed(mpirun: Launcher, tiny, cache) -> None:
    arguments = ("-m", "tpimpi", "--model", str(tiny), "--prompt", "the fox", "--max-tokens", "1", "--format", "f32")
    before = os.sched_getaffinity(0)
    binding = {"PRTE_MCA_hwloc_default_binding_policy": "core"}
    if mpirun.mpi == "openmpi":
        result = mpirun(2, *arguments, env={**cache, **binding})
        assert result.code == 0, result.err
        assert "bound to one core" in result.err
        again = mpirun(2, *arguments, "--threads", "1", env={**cache, **binding})
        assert again.code == 0 and "bound to one core" not in again.err
    os.sched_setaffinity(0, {min(before)})  # as taskset does: the launcher and its ranks inherit it
    try:
        result = mpirun(2, *arguments, env=cache)
    finally:
        os.sched_setaffinity(0, before)
    assert result.code == 0, result.err
    assert "bound to one core" not in result.err


@pytest.mark.slow_but("said")
@pytest.mark.parametrize("quiet", [False, True], ids=["said", "quiet"])
def test_rank_0_says_for_whom_it_waits_before_the_ranks_have_met(
    mpirun: Launcher, tiny: Path, cache, tmp_path: Path, quiet: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, time\n"
        "rank = os.environ.get('OMPI_COMM_WORLD_RANK', os.environ.get('PMI_RANK'))\n"
        "if rank == '1':\n    time.sleep(4)\n"
        "elif rank == '0':\n    import tpimpi.star.start as start\n    start.WAIT_REPORT_S = 1.0\n"
    )
    options = ("--format", "f32", "--prompt", "x", "--max-tokens", "1", *(["--quiet"] if quiet else []))
    env = {**cache, "PYTHONPATH": str(tmp_path)}
    result = mpirun(2, "-m", "tpimpi", "--model", str(tiny), *options, env=env, timeout=60)
    assert result.code == 0, result.err
    if mpirun.mpi == "openmpi":  # whose start waits for all ranks
        assert ("tpimpi: waiting for 1 other rank to start, for 1 s" in result.err) == (not quiet)
    assert "MPI has not started" not in result.err
