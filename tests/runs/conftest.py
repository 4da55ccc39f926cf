"""What the tests of this room share."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.faults_cases import (
    SHAPE,
    Runs,
)
from tests.support.launch import Launcher, run_command
from tests.support.slurm import Cluster, slurm, why_not


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on the disk for large files, which are not kept after the tests as pytest's own are."""
    path = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def slices(folder: Path) -> Callable[..., Path]:
    """Makes slices for so many ranks, of a model that a seed tells, once."""
    (folder / "config.json").write_text(json.dumps(SHAPE))

    def make(ranks: int, seed: int = 0) -> Path:
        out = folder / f"{ranks}-{seed}"
        if not out.exists():
            options = ("--format", "q8_0", "--ranks", str(ranks), "--seed", str(seed), "--quiet", "--out", str(out))
            done = run_command(
                [sys.executable, "-m", "tpimpi", "synth", "--shape", str(folder / "config.json"), *options], env={}
            )
            assert done.code == 0, done.err
        return out

    return make


@pytest.fixture(scope="module")
def all_runs(slices: Callable[..., Path]) -> dict[int, Runs]:
    """By the number of ranks; so that what they know is found out once."""
    return {}


@pytest.fixture
def runs(request: pytest.FixtureRequest, all_runs: dict[int, Runs], slices: Callable[..., Path]) -> Iterator[Runs]:
    """Of one rank without a launcher, or of two under mpirun; what still runs at the end is killed."""
    ranks: int = request.param
    if ranks not in all_runs:
        launcher = request.getfixturevalue("mpirun") if ranks > 1 else None
        all_runs[ranks] = Runs(launcher, ranks, slices(ranks))
    yield all_runs[ranks]
    all_runs[ranks].end()


@pytest.fixture(scope="module")
def cluster(mpirun: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes."""
    if reason := why_not():
        pytest.skip(f"no Slurm: {reason}")
    with slurm(mpirun, tmp_path_factory.mktemp("slurm")) as started:
        yield started
