"""Slices made over MPI: each on its rank's own disk, the same as one process makes, whatever breaks meanwhile."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.support.distribute_cases import by_one_process
from tests.support.launch import Launcher
from tests.support.ranks import Ranks
from tests.support.slices import datasets, spoil
from tests.support.tiny_models import write_tiny_hf
from tpimpi.weights.slices.names import slice_name

# Each rank has a cache of its own, in the folder that is given first, as on a host of its own; a file named "tweak" there is
# run by it.
PROGRAM = """
import os, sys
from pathlib import Path
rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
here = Path(sys.argv.pop(1)) / rank
here.mkdir(parents=True, exist_ok=True)
os.environ["TPIMPI_CACHE"] = str(here)
tweak = here.parent / "tweak"
if tweak.exists():
    exec(tweak.read_text())
from tpimpi.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture
def hosts(tmp_path: Path) -> tuple[str, str]:
    """A program that runs tpimpi as on hosts with a disk each, and its first argument, their folder."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    return str(program), str(tmp_path / "hosts")


def made(folder: Path, rank: int, ranks: int) -> Path:
    """A rank's slice on its own disk."""
    (path,) = (folder / str(rank)).glob(f"*/{slice_name(rank, ranks)}")
    return path


def alike(hosts: str, one: Path, ranks: int) -> None:
    """Every rank's disk has its slice, with the same bytes in every dataset as one process makes, and nothing else."""
    for rank in range(ranks):
        path = made(Path(hosts), rank, ranks)
        assert datasets(path) == datasets(one / slice_name(rank, ranks)), f"rank {rank}"
        files = [other for other in (Path(hosts) / str(rank)).rglob("*") if other.is_file() and other.suffix != ".lock"]
        # Beside it rank 0 keeps that it tried the tokenizer.
        assert [other for other in files if other.parent.name != "tokenizers" or rank] == [path]


@pytest.mark.parametrize(
    ("shares", "fmt"),
    [
        ([1, 1], "f32"),
        ([3, 1], "q8_0"),
        ([1, 1, 1], "bf16"),
        ([1, 3, 2], "q4_0"),
        ([1, 1, 1, 1, 1], "q4_0"),
        ([2, 0, 5, 1, 1], "f32"),
        ([0, 1, 1], "q8_0"),
    ],
)
@pytest.mark.slow_but("shares1-q8_0", "shares5-f32")
def test_ranks_get_the_tiles_that_one_process_makes(
    on_ranks: Ranks, hosts: tuple[str, str], tiny: Path, tmp_path: Path, shares: list[float], fmt: str
) -> None:
    ranks, text = len(shares), ",".join(map(str, shares))
    by_one_process(tiny, shares, fmt, tmp_path / "one")
    command = [*hosts, "slice", "--model", str(tiny), "--shares", text, "--format", fmt]
    result = on_ranks(ranks, *command)
    assert result.code == 0, result.err
    assert f"rank-0-of-{ranks}.h5 to rank-{ranks - 1}-of-{ranks}.h5" in result.err
    alike(hosts[1], tmp_path / "one", ranks)
    before = [made(Path(hosts[1]), rank, ranks).stat() for rank in range(ranks)]
    result = on_ranks(ranks, *command, "--ranks", str(ranks))
    assert result.code == 0, result.err
    assert "there already" in result.err
    after = [made(Path(hosts[1]), rank, ranks).stat() for rank in range(ranks)]
    assert [(s.st_ino, s.st_mtime_ns) for s in before] == [(s.st_ino, s.st_mtime_ns) for s in after]


@pytest.mark.slow
def test_the_real_model_in_its_own_format(on_ranks: Ranks, hosts, smollm2: Path, tmp_path: Path) -> None:
    by_one_process(smollm2, [1, 1, 1], "auto", tmp_path / "one")
    result = on_ranks(3, *hosts, "slice", "--model", str(smollm2))
    assert result.code == 0, result.err
    assert "for 3 ranks as q4_1, head q8_0, to r0 " in result.err
    alike(hosts[1], tmp_path / "one", 3)


def test_a_run_sends_what_is_missing_and_is_told_nothing_when_all_is_there(
    on_ranks: Ranks, hosts, tiny: Path, tmp_path: Path
) -> None:
    by_one_process(tiny, [1, 1, 1], "auto", tmp_path / "one")
    command = [*hosts, "--model", str(tiny), "--prompt", "fox", "--max-tokens", "4"]
    first = on_ranks(3, *command)
    assert first.code == 0, first.err
    assert "to r0 " in first.err and ", r2 " in first.err
    alike(hosts[1], tmp_path / "one", 3)
    made(Path(hosts[1]), 1, 3).unlink()
    second = on_ranks(3, *command)
    assert second.code == 0, second.err
    assert second.out == first.out
    assert "as f32, to r1 " in second.err
    assert ", r2 " not in second.err
    alike(hosts[1], tmp_path / "one", 3)
    third = on_ranks(3, *command)
    assert third.out == first.out
    assert "slicing" not in third.err


def test_into_a_folder_that_the_ranks_share(on_ranks: Ranks, tiny: Path, tmp_path: Path) -> None:
    by_one_process(tiny, [1, 1, 1], "q8_0", tmp_path / "one")
    out = tmp_path / "out"
    command = ["-m", "tpimpi", "slice", "--model", str(tiny), "--format", "q8_0", "--out", str(out)]
    result = on_ranks(3, *command, env={"TPIMPI_CACHE": str(tmp_path / "cache")})
    assert result.code == 0, result.err
    assert sorted(path.name for path in out.iterdir()) == [slice_name(rank, 3) for rank in range(3)]
    for rank in range(3):
        assert datasets(out / slice_name(rank, 3)) == datasets(tmp_path / "one" / slice_name(rank, 3))


def test_what_is_broken_is_mended(on_ranks: Ranks, hosts, tiny: Path, tmp_path: Path) -> None:
    by_one_process(tiny, [1, 1, 1], "auto", tmp_path / "one")
    command = [*hosts, "slice", "--model", str(tiny)]
    assert on_ranks(3, *command).code == 0
    spoil(made(Path(hosts[1]), 1, 3), "layers/0001/mlp/tile-000/gate", 9)
    spoil(made(Path(hosts[1]), 0, 3), "embedding/weight", 300)
    inodes = [made(Path(hosts[1]), rank, 3).stat().st_ino for rank in range(3)]
    run = on_ranks(3, *hosts, "--model", str(tiny), "--prompt", "fox", "--max-tokens", "4")
    assert run.code == 2
    assert any("mend it with: python -m tpimpi slice --verify" in line for line in run.our_lines), run.err
    result = on_ranks(3, *command, "--verify")
    assert result.code == 0, result.err
    said = "".join(result.our_lines)
    assert "1 of 7 tiles was broken" in said and "r2" not in said, result.err
    assert inodes == [made(Path(hosts[1]), rank, 3).stat().st_ino for rank in range(3)], "mended in place"
    alike(hosts[1], tmp_path / "one", 3)
    result = on_ranks(3, *command, "--verify")
    assert "there already and as they should be" in result.err, result.err
    made(Path(hosts[1]), 2, 3).write_bytes(b"no slice at all")
    result = on_ranks(3, *command)
    assert result.code == 0, result.err
    assert "is broken (" in result.err and "it is made again" in result.err
    alike(hosts[1], tmp_path / "one", 3)


@pytest.mark.slow
def test_tiles_that_are_there_are_not_sent_with_another_number_of_ranks(
    on_ranks: Ranks, hosts, tiny: Path, tmp_path: Path
) -> None:
    by_one_process(tiny, [1, 1, 0], "auto", tmp_path / "one")
    assert on_ranks(2, *hosts, "slice", "--model", str(tiny)).code == 0
    result = on_ranks(3, *hosts, "slice", "--model", str(tiny), "--shares", "1,1,0")
    assert result.code == 0, result.err
    (said,) = [line for line in result.our_lines if line.startswith("r1 ")]
    assert said.endswith(": 5 of 5 parts of its slice were there already, in slices made earlier")
    assert "to r0 " in result.err and ", r1 " not in result.err
    for rank in range(3):
        assert datasets(made(Path(hosts[1]), rank, 3)) == datasets(tmp_path / "one" / slice_name(rank, 3))


# What cannot be done


def test_another_number_of_ranks_than_the_worlds(mpirun: Launcher, hosts, tiny: Path) -> None:
    result = mpirun(2, *hosts, "slice", "--model", str(tiny), "--ranks", "3")
    assert result.code == 2
    assert len(result.our_lines) == 1
    assert "--ranks is 3, but mpirun started 2, each of which gets its slice; leave --ranks out" in result.our_lines[0]


@pytest.mark.slow
def test_a_model_that_cannot_be_quantized_ends_every_rank(mpirun: Launcher, hosts, tiny: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.numpy import load_file, save_file

    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][70, 3] = np.inf
    save_file(tensors, model / "model.safetensors")
    result = mpirun(3, *hosts, "slice", "--model", str(model), "--format", "q8_0", timeout=60)
    assert result.code == 2
    assert len(result.our_lines) == 1, result.err
    assert "layers.1.mlp.up_proj.weight holds numbers that are not finite" in result.our_lines[0]
    assert not list(Path(hosts[1]).rglob("rank-*.h5"))


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk is mounted, which only root may")
@pytest.mark.parametrize("tweak", ["", "full later"])
@pytest.mark.slow_but("")
def test_a_full_disk_names_the_rank_and_leaves_nothing(
    mpirun: Launcher, hosts, tiny: Path, tmp_path: Path, tweak: str
) -> None:
    """Before anything is sent; and where the space that was there is gone when it is used."""
    disk = Path(hosts[1]) / "1"
    disk.mkdir(parents=True)
    if tweak:
        (Path(hosts[1]) / "tweak").write_text(
            "import os, collections\n"
            "os.statvfs = lambda path: collections.namedtuple('Room', 'f_bavail f_frsize')(10**12, 1)\n"
            "os.posix_fallocate = lambda *_: None\n"
        )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tpimpi-test", str(disk)], check=True)
    try:
        result = mpirun(3, *hosts, "slice", "--model", str(tiny), timeout=60)
        assert result.code == 1, result.err
        assert len(result.our_lines) == 1, result.err
        wanted = "disk full while writing" if tweak else "disk full: its slice needs 0.00 GB"
        assert result.our_lines[0].startswith("r1 ") and wanted in result.our_lines[0]
        assert str(disk) in result.our_lines[0]
        assert not list(Path(hosts[1]).rglob("rank-*.h5"))
        if not tweak:
            assert not [path for path in Path(hosts[1]).rglob("*") if path.is_file() and path.suffix != ".lock"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_folder_that_one_rank_cannot_write(mpirun: Launcher, hosts, tiny: Path) -> None:
    Path(hosts[1]).mkdir()
    (Path(hosts[1]) / "tweak").write_text("if rank == '1':\n    os.environ['TPIMPI_CACHE'] = '/proc/nowhere'\n")
    result = mpirun(3, *hosts, "slice", "--model", str(tiny), timeout=60)
    assert result.code == 1
    assert len(result.our_lines) == 1, result.err
    assert result.our_lines[0].startswith("r1 ") and "cannot write /proc/nowhere" in result.our_lines[0]


# Broken off


def _ranks_of(launcher: psutil.Process) -> list[psutil.Process]:
    found = []
    for process in launcher.children(recursive=True):
        try:
            if "python" in process.name():
                found.append(process)
        except psutil.Error:
            continue
    return found


def _break_off(command: list[str], env: dict[str, str], hosts: Path, seconds: float, victim: int | None) -> int:
    """Run, and kill -9 a rank (any, by number) or mpirun so long after the first tiles; the exit code of mpirun."""
    process = subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    launcher = psutil.Process(process.pid)
    ranks: list[psutil.Process] = []
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None and not list(hosts.rglob(".rank-1-*.partial")):
            time.sleep(0.005)
        ranks = _ranks_of(launcher) if process.poll() is None else []
        time.sleep(seconds)
        if process.poll() is None and ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # it was too fast
                (launcher if victim is None else ranks[victim % len(ranks)]).kill()
        code = process.wait(timeout=60)
        _, alive = psutil.wait_procs(ranks, timeout=30)
        assert not alive, f"ranks outlive their launcher: {alive}"
        return code
    finally:
        for left in [*ranks, launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()


def _broken_off(
    mpirun: Launcher, hosts: tuple[str, str], arguments: list[str], ranks: int, longest: float, attempts: int
) -> int:
    """How many of so many slicings were really broken off: of all victims in turn, at moments all over `longest` seconds."""
    dice, broken = random.Random(f"{mpirun.mpi} {ranks}"), 0
    command = mpirun.command(ranks, [*hosts, "slice", *arguments, "--quiet"])
    victims = [None, *range(ranks)]  # the first is the launcher
    moments = [longest * (part + dice.random()) / attempts for part in range(attempts)]
    dice.shuffle(victims)
    dice.shuffle(moments)
    for attempt, moment in enumerate(moments):
        broken += _break_off(command, mpirun.env, Path(hosts[1]), moment, victims[attempt % len(victims)]) != 0
        if len(list(Path(hosts[1]).rglob("rank-*.h5"))) == ranks:
            for path in Path(hosts[1]).rglob("rank-*.h5"):  # it was too fast: once more from the start
                path.unlink()
    return broken


@pytest.mark.parametrize("fmt", ["q8_0", "f32"])
@pytest.mark.slow
def test_a_slicing_of_a_tiny_model_broken_off_again_and_again(
    mpirun: Launcher, hosts, tiny: Path, tmp_path: Path, fmt: str
) -> None:
    model = write_tiny_hf(
        tmp_path / "model", "qwen3", vocab_size=300, num_hidden_layers=24, hidden_size=256, intermediate_size=1536
    )
    (model / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    by_one_process(model, [1, 2, 1], fmt, tmp_path / "one")
    arguments = ["--model", str(model), "--shares", "1,2,1", "--format", fmt]
    assert _broken_off(mpirun, hosts, arguments, 3, 0.4, attempts=4) >= 2
    result = mpirun(3, *hosts, "slice", *arguments)
    assert result.code == 0, result.err
    alike(hosts[1], tmp_path / "one", 3)


@pytest.mark.slow
def test_a_slicing_of_the_real_model_broken_off_again_and_again(
    mpirun: Launcher, hosts, smollm2: Path, tmp_path: Path
) -> None:
    by_one_process(smollm2, [1, 1, 1, 1], "q8_0", tmp_path / "one")
    arguments = ["--model", str(smollm2), "--format", "q8_0"]
    assert _broken_off(mpirun, hosts, arguments, 4, 1.0, attempts=5) >= 2
    result = mpirun(4, *hosts, "slice", *arguments)
    assert result.code == 0, result.err
    alike(hosts[1], tmp_path / "one", 4)
