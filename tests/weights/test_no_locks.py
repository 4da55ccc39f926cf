"""File systems without locks, as some Lustre, NFS and FUSE mounts: slices are made and read all the same."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result

SHIM = Path(__file__).parents[1] / "support" / "programs" / "no_locks.c"
PROMPT = ("--prompt", "hi", "--max-tokens", "2")


@pytest.fixture(scope="module", params=["ENOSYS", "ENOLCK"])
def no_locks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of a process for which no lock can be had."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        pytest.skip("no C compiler")
    library = tmp_path_factory.mktemp("shim") / "no_locks.so"
    command = [compiler, "-shared", "-fPIC", f"-DFLOCK_ERROR={request.param}", "-o", str(library), str(SHIM), "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return {"LD_PRELOAD": str(library)}


def test_a_run_goes_on_without_locks_and_says_so(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, no_locks: dict[str, str]
) -> None:
    """The first run slices, the second reads what it made."""
    env = {**no_locks, "TPIMPI_CACHE": str(tmp_path / "cache")}
    first = tpimpi("--model", str(tiny), *PROMPT, env=env, timeout=60)
    assert first.code == 0, first.err
    assert f"the file system of {tmp_path / 'cache'} has no locks (" in first.err
    assert "going on without" in first.err
    assert "another tpimpi" not in first.err
    second = tpimpi("--model", str(tiny), *PROMPT, env=env, timeout=60)
    assert (second.code, second.out) == (0, first.out), second.err
    assert "no locks" not in second.err


def test_slices_are_read_where_hdf5_cannot_lock_them(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, no_locks: dict[str, str]
) -> None:
    made = tpimpi("slice", "--model", str(tiny), "--ranks", "1", "--out", str(tmp_path / "out"), "--quiet", timeout=60)
    assert made.code == 0, made.err
    result = tpimpi("--slices", str(tmp_path / "out"), *PROMPT, "--quiet", env=no_locks, timeout=60)
    assert result.code == 0, result.err
    assert "delete" not in result.err
