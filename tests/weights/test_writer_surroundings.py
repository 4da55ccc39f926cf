"""What surrounds slicing: imports, limits of the system, folders that are in the way, others that slice too."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import pytest

from tests.support.launch import run_command
from tests.support.tiny_models import write_tiny_hf
from tpimpi.errors import InputError, StorageError
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices import writer
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


def test_slicing_starts_neither_mpi_nor_torch(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from tpimpi.cli.main import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'mpi4py.MPI', 'torch', 'transformers'} & set(sys.modules)\n"
        "    print('heavy:', heavy)\n"
    )
    for command in (
        ["slice", "--model", str(tiny), "--ranks", "2", "--out", str(tmp_path)],
        ["inspect", str(tmp_path)],
    ):
        result = run_command([sys.executable, "-c", program, *command], env={})
        assert result.code == 0, result.err
        assert "heavy: set()" in result.out


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "Permission denied; choose another place with --out$"),
        (errno.EROFS, "Read-only file system; choose another place"),
        (errno.ENOSPC, "disk full while writing .*: No space left on device; free some space there"),
        (errno.EMFILE, r"Too many open files; .*\(ulimit -n 4096\), or slice for fewer ranks"),
    ],
)
@pytest.mark.parametrize("in_text", [False, True])
def test_what_hdf5_says_of_the_disk_is_one_line(
    llama_model: Path, tmp_path: Path, monkeypatch, number: int, said: str, in_text: bool
) -> None:
    text = f"Unable to synchronously create file (unable to open file: name = 'x', errno = {number}, flags = 13)"

    def failing(*_: object, **__: object) -> None:
        raise OSError(text) if in_text else OSError(number, text)

    monkeypatch.setattr(h5py, "File", failing)
    with open_source(llama_model) as source, pytest.raises(StorageError, match=said) as seen:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), tmp_path)
    assert "errno" not in str(seen.value).lower()
    assert ("free some space" in str(seen.value)) == (number == errno.ENOSPC)
    assert not list(tmp_path.iterdir())


def test_the_disk_works_while_we_do(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written goes to the disk beside the writing of more; all of it is there at the end."""
    pwrite, fsync, going_on, synced = os.pwrite, os.fsync, threading.Event(), []

    def written(*arguments: Any) -> int:
        going_on.set()
        return pwrite(*arguments)

    def slow(descriptor: int) -> None:
        going_on.clear()
        synced.append(going_on.wait(10) if not synced else True)  # in the thread that writes it would wait for itself

    def last(descriptor: int) -> None:
        synced.append(True)
        fsync(descriptor)

    monkeypatch.setattr(writer, "_SYNC_BYTES", 100_000)
    monkeypatch.setattr(os, "pwrite", written)
    monkeypatch.setattr(os, "fdatasync", slow)
    monkeypatch.setattr(os, "fsync", last)
    with open_source(tiny) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path)
    assert len(synced) > 2 and synced[0] and synced[-1]


def test_a_disk_that_fails_beside_the_writing_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_source(tiny) as source:
        plan, formats = make_partition(source.config, [1]), choose_formats(source, "f32")
        with monkeypatch.context() as patched:
            patched.setattr(writer, "_SYNC_BYTES", 100_000)
            patched.setattr(os, "fdatasync", fail)
            with pytest.raises(StorageError, match="Input/output error"):
                slice_model(source, plan, formats, tmp_path)
        slice_model(source, plan, formats, tmp_path)
    assert (tmp_path / slice_name(0, 1)).exists()


def test_too_many_ranks_for_the_limit_of_open_files(tiny: Path, tmp_path: Path) -> None:
    """`ulimit -n 64; tpimpi slice --ranks 100`"""
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from tpimpi.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", program, "slice", "--model", str(tiny), "--ranks", "100", "--out", str(tmp_path)]
    result = run_command(command, env={})
    assert result.code == 1, result.err
    assert "Too many open files" in result.err
    assert "ulimit -n" in result.err
    assert "errno" not in result.err
    assert "Traceback" not in result.err
    assert not list(tmp_path.iterdir())


def test_a_directory_in_the_way_is_found_before_anything_is_replaced(llama_model: Path, tmp_path: Path) -> None:
    with open_source(llama_model) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), tmp_path)
        (tmp_path / slice_name(1, 2)).unlink()
        (tmp_path / slice_name(1, 2)).mkdir()
        before = (tmp_path / slice_name(0, 2)).read_bytes()
        steps: list[int] = []
        with pytest.raises(StorageError, match=r"rank-1-of-2\.h5: a directory of that name is there; remove it"):
            slice_model(
                source,
                make_partition(source.config, [1, 1]),
                choose_formats(source, "f32"),
                tmp_path,
                lambda done, total: steps.append(done),
            )
    assert (tmp_path / slice_name(0, 2)).read_bytes() == before
    assert not steps
    assert len(list(tmp_path.iterdir())) == 2


def test_a_leftover_that_cannot_be_removed_is_in_nobodys_way(llama_model: Path, tmp_path: Path) -> None:
    (tmp_path / ".rank-0-of-1.h5.999999999.partial").mkdir()
    with open_source(llama_model) as source:
        slice_model(source, make_partition(source.config, [1]), choose_formats(source, "f32"), tmp_path)
    assert (tmp_path / slice_name(0, 1)).is_file()


def test_two_slicings_do_not_mix_their_files_in_one_folder(tmp_path: Path) -> None:
    model, out = write_tiny_hf(tmp_path / "tiny", "smollm"), tmp_path / "slices"
    (model / "tokenizer.json").write_text("{}")
    out.mkdir()
    with open_source(model) as source:
        arguments = (source, make_partition(source.config, [1, 1]), choose_formats(source, "q8_0"), out)
        held = os.open(out, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)  # as another process that is slicing holds it
        with pytest.raises(InputError, match="another tpimpi is slicing into"):
            slice_model(*arguments)
        assert list(out.iterdir()) == []
        os.close(held)
        slice_model(*arguments)
        slice_model(*arguments)  # the first let go
    assert sorted(path.name for path in out.iterdir()) == ["rank-0-of-2.h5", "rank-1-of-2.h5"]
