"""What happens to a slice file, or to the disk under it, while a run reads from it: an error that names it, or a wait; never
a wrong answer. Every fault here is a real one, and every run a program of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import pytest

from bench import limits
from tests.support.faults_cases import (
    MANY,
    SOME,
    Runs,
    on_one_and_two_ranks,
    on_one_rank,
)
from tests.support.launch import run_command

TILE = r"(layers/\d{4}/(attn|mlp)/tile-\d{3}|head/tile-\d{3}|the embedding|a row of the embedding)"


@pytest.fixture
def copies(folder: Path, slices: Callable[..., Path]) -> Iterator[Callable[[int], Path]]:
    """A copy of the slices that a test may spoil."""
    made: list[Path] = []

    def copy(ranks: int) -> Path:
        made.append(Path(tempfile.mkdtemp(dir=folder)))
        for path in slices(ranks).iterdir():
            shutil.copy(path, made[-1])
        return made[-1]

    yield copy
    for path in made:
        shutil.rmtree(path)


# The file


@on_one_and_two_ranks
@pytest.mark.parametrize("part", [0, 0.5])
@pytest.mark.slow
def test_a_slice_that_shrinks(runs: Runs, copies: Callable[[int], Path], part: float) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    os.truncate(path, int(path.stat().st_size * part))
    line = rf"slice file {path} was changed while this run was using it: {TILE} is no longer what it was; .*"
    runs.check_ended(running.finish(), line)


@on_one_and_two_ranks
@pytest.mark.parametrize("by", ["noise", "another model's slice"])
@pytest.mark.slow
def test_a_slice_that_is_written_over(runs: Runs, copies, slices, by: str) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    size = path.stat().st_size
    other = os.urandom(size) if by == "noise" else runs.slice_of_victim(slices(runs.ranks, seed=1)).read_bytes()
    assert len(other) == size
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    with path.open("r+b") as file:
        file.write(other)
    line = rf"slice file {path} was changed while this run was using it: {TILE} is no longer what it was; .*"
    runs.check_ended(running.finish(), line)


@on_one_rank
@pytest.mark.slow
def test_a_slice_that_is_written_over_while_all_tiles_are_pinned(runs: Runs, copies, slices) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    other = runs.slice_of_victim(slices(runs.ranks, seed=1)).read_bytes()
    running = runs.start(runs.command("--memory", "2G", slices=folder, tokens=MANY))
    with path.open("r+b") as file:
        file.write(other)
    result = running.finish()
    tokens = result.out.split()
    assert tokens == runs.text[: len(tokens)], "only rows of the embedding are still read, and they are another model's"
    assert result.code != 0 or len(tokens) == MANY, result.err


@on_one_and_two_ranks
@pytest.mark.parametrize("how", ["replaced", "removed"])
@pytest.mark.slow_but("removed-1")
def test_a_slice_that_is_replaced_is_used_to_the_end(runs: Runs, copies, slices, how: str) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    new = folder / "new"
    shutil.copy(runs.slice_of_victim(slices(runs.ranks, seed=1)), new)
    running = runs.start(runs.command(*runs.little, slices=folder))
    if how == "replaced":
        new.replace(path)
    else:
        path.unlink()
    result = running.finish()
    assert (result.code, result.our_lines) == (0, []), result.err
    assert result.out.split() == runs.text[:SOME]


# Slices that another tool has packed, which h5py reads


@pytest.fixture(scope="module")
def packed(folder: Path, slices: Callable[..., Path]) -> Path:
    """The slice of one rank with every dataset compressed."""
    out = folder / "packed"
    out.mkdir()
    (path,) = slices(1).iterdir()
    with h5py.File(path) as old, h5py.File(out / path.name, "w") as new:

        def copy(name: str, item: object) -> None:
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[...], compression="lzf")

        old.visititems(copy)
    return out


@on_one_rank
@pytest.mark.parametrize(
    "fault",
    ["truncated", "written over", "replaced"],
)
@pytest.mark.slow
def test_packed_slices_under_a_fault(runs: Runs, packed: Path, tmp_path: Path, fault: str) -> None:
    path = tmp_path / runs.slice_of_victim(packed).name
    shutil.copy(runs.slice_of_victim(packed), path)
    tokens = 10 if fault == "replaced" else MANY
    running = runs.start(runs.command("--memory", f"{runs.least + 20}M", slices=tmp_path, tokens=tokens))
    if fault == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif fault == "written over":
        with path.open("r+b") as file:
            file.write(os.urandom(path.stat().st_size))
    else:
        path.unlink()
    result = running.finish(30)
    path.unlink(missing_ok=True)
    if fault == "replaced":
        assert (result.code, result.our_lines) == (0, []), result.err
        assert result.out.split() == runs.text[:tokens]
    else:
        what = rf"({TILE}|layers/\d{{4}}/\w+/tile-\d{{3}}/\w+|head/tile-\d{{3}}/rows|embedding)"
        runs.check_ended(result, rf"slice file {path} was changed while this run was using it: {what} is no .*")


@on_one_rank
@pytest.mark.parametrize("kind", ["as written", "packed"])
@pytest.mark.slow_but("as written-1")
def test_a_run_whose_reader_goes_away_ends(runs: Runs, packed: Path, kind: str) -> None:
    slices = runs.slices if kind == "as written" else packed
    command = runs.command("--memory", f"{runs.least + 20}M", slices=slices, tokens=MANY)
    result = run_command(["sh", "-c", '{ "$@"; echo "code $?" >&2; } | head -c 20', "sh", *command], env={}, timeout=30)
    assert (result.err, len(result.out)) == ("code 1\n", 20)


# The disk


def _call(*command: str) -> str:
    """Run a command of the system; skips the test where it cannot be had."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        pytest.skip(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


@pytest.fixture
def failing_disk(folder: Path) -> Iterator[Callable[[Path], tuple[Path, Callable[[], None]]]]:
    """Puts a file on a disk of its own: gives its path there, and what makes every read of it fail."""
    if os.geteuid() != 0:
        pytest.skip("loop devices need root")
    with contextlib.ExitStack() as stack:

        def put(file: Path) -> tuple[Path, Callable[[], None]]:
            place = Path(tempfile.mkdtemp(dir=folder))
            stack.callback(shutil.rmtree, place)
            image, mounted = place / "image", place / "mounted"
            mounted.mkdir()
            with image.open("wb") as disk:
                disk.truncate(file.stat().st_size + (64 << 20))
            _call("mkfs.ext4", "-q", "-F", str(image))
            device = _call("losetup", "--find", "--show", str(image))
            stack.callback(subprocess.run, ["losetup", "--detach", device], check=False, timeout=60)
            _call("mount", "-t", "ext4", device, str(mounted))
            try:
                shutil.copy(file, mounted)
            finally:
                subprocess.run(["umount", str(mounted)], check=True, timeout=60)
            # Read-only, so that nothing has to be written when it is unmounted.
            _call("mount", "-t", "ext4", "-o", "ro", device, str(mounted))
            # Lazily, should something still have the file open, so that the device goes in any case.
            stack.callback(subprocess.run, ["umount", "--lazy", str(mounted)], check=False, timeout=60)
            return mounted / file.name, lambda: os.truncate(image, 1 << 20)

        yield put


@on_one_and_two_ranks
@pytest.mark.slow_but("1")
def test_a_disk_that_fails(runs: Runs, copies, failing_disk) -> None:
    folder = copies(runs.ranks)
    path = runs.slice_of_victim(folder)
    there, fail = failing_disk(path)
    path.unlink()
    path.symlink_to(there)
    running = runs.start(runs.command(*runs.little, slices=folder, tokens=MANY))
    fail()
    result = running.finish()
    runs.check_ended(
        result, rf"slice file {path} can no longer be read at {TILE}: Input/output error; check the disk .*"
    )
    runs.end()


@on_one_and_two_ranks
@pytest.mark.slow
def test_a_disk_that_stalls_is_waited_for(runs: Runs) -> None:
    if reason := limits.available("io"):
        pytest.skip(reason)
    try:
        group = limits.Group(f"tpimpi-test-stall-{os.getpid()}", device=runs.slices)
    except limits.LimitError as error:
        pytest.skip(str(error))
    with group:
        running = runs.start(group.command(runs.command(*runs.little)))
        group.set_read_bps(1024)
        running.wait_until("word of the stall", lambda out, err: "waiting for the disk" in err)
        time.sleep(3)
        group.set_read_bps(None)
        result = running.finish()
    assert result.code == 0, result.err
    assert result.out.split() == runs.text[:SOME]
    who = "tpimpi" if runs.ranks == 1 else r"r[01] \S+"
    stalled = [line for line in result.our_lines if "waiting for" in line]
    assert 1 <= len(stalled) <= runs.ranks, "none is told twice in eight seconds"
    for line in stalled:
        where = rf"{runs.slices}/rank-\d-of-{runs.ranks}\.h5"
        assert re.fullmatch(
            rf"{who}: waiting for the disk for [5-7] s, for {TILE}: slow, not gone \({where}\)", line
        ), line
    goes_on = [line for line in result.our_lines if "the disk goes on" in line]
    assert len(goes_on) == len(stalled) and len(result.our_lines) == 2 * len(stalled), result.err
