"""Slicing keeps what it promises: memory, formats, and that it needs neither MPI nor torch."""

from __future__ import annotations

import errno
import sys
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from conftest import run_command
from tiny_models import write_tiny_hf
from tpimpi.errors import InputError, StorageError
from tpimpi.plan import make_plan
from tpimpi.slicefile import SliceFile, slice_name
from tpimpi.slicing import choose_format, slice_model
from tpimpi.sources import open_source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(
        tmp_path_factory.mktemp("slicing") / "model", "llama", vocab_size=20_000, intermediate_size=4096
    )
    (path / "tokenizer.json").write_text("{}")
    return path


def test_one_tensor_and_its_part_at_a_time(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        sizes = [int(np.prod(info.shape)) * 4 for info in source.tensors().values()]
        assert sum(sizes) > 3 * max(sizes), "this model is one tensor: the test shows nothing"
        plan = make_plan(source.config, [1, 1])
        slice_model(source, plan, "f32", tmp_path / "first")  # what is imported on first use does not count
        tracemalloc.start()
        slice_model(source, plan, "f32", tmp_path / "second")
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 1.5 * max(sizes), f"{peak} bytes for a largest tensor of {max(sizes)}"


def test_progress_goes_up_to_all_there_is(model: Path, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    with open_source(model) as source:
        slice_model(
            source, make_plan(source.config, [1, 2]), "bf16", tmp_path, lambda done, total: steps.append((done, total))
        )
    done = [step[0] for step in steps]
    assert done == sorted(done)
    assert steps[-1][0] == steps[-1][1]
    assert len({total for _, total in steps}) == 1


@pytest.mark.parametrize(
    ("dtype", "wanted", "found"),
    [
        ("float32", "auto", "f32"),
        ("bfloat16", "auto", "bf16"),
        ("float16", "auto", "bf16"),
        ("bfloat16", "f32", "f32"),
        ("float32", "bf16", "bf16"),
    ],
)
def test_auto_keeps_the_precision_of_the_source(tmp_path: Path, dtype: str, wanted: str, found: str) -> None:
    path = write_tiny_hf(tmp_path / "model", "qwen2", dtype=dtype)
    with open_source(path) as source:
        assert choose_format(source, wanted) == found
        slice_model(source, make_plan(source.config, [1]), found, tmp_path)
        file = SliceFile(tmp_path / slice_name(0, 1))
        formats = {
            p.format for r in file.records if r.block.kind in ("attn", "mlp") for p in r.parts if "bias" not in p.name
        }
        file.close()
        assert formats == {found}
        with pytest.raises(InputError, match="format is 'f16', must be auto, f32 or bf16"):
            choose_format(source, "f16")


def test_slicing_starts_neither_mpi_nor_torch(tiny: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from tpimpi.cli import main\n"
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
        (errno.EACCES, "Permission denied; choose another place with --out or TPIMPI_CACHE"),
        (errno.EROFS, "Read-only file system; choose another place"),
        (errno.ENOSPC, "disk full while writing .*: No space left on device; free some space there"),
        (errno.EMFILE, r"Too many open files; .*\(ulimit -n 4096\), or slice for fewer ranks"),
    ],
)
@pytest.mark.parametrize("in_text", [False, True])
def test_what_hdf5_says_of_the_disk_is_one_line(
    model: Path, tmp_path: Path, monkeypatch, number: int, said: str, in_text: bool
) -> None:
    text = f"Unable to synchronously create file (unable to open file: name = 'x', errno = {number}, flags = 13)"

    def failing(*_: object, **__: object) -> None:
        raise OSError(text) if in_text else OSError(number, text)

    monkeypatch.setattr(h5py, "File", failing)
    with open_source(model) as source, pytest.raises(StorageError, match=said) as seen:
        slice_model(source, make_plan(source.config, [1, 1]), "f32", tmp_path)
    assert "errno" not in str(seen.value).lower()
    assert ("free some space" in str(seen.value)) == (number == errno.ENOSPC)
    assert not list(tmp_path.iterdir())


def test_too_many_ranks_for_the_limit_of_open_files(tiny: Path, tmp_path: Path) -> None:
    """`ulimit -n 64; tpimpi slice --ranks 100`"""
    program = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))\n"
        "from tpimpi.cli import main\n"
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


def test_a_directory_in_the_way_is_found_before_anything_is_replaced(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        slice_model(source, make_plan(source.config, [1, 1]), "f32", tmp_path)
        (tmp_path / slice_name(1, 2)).unlink()
        (tmp_path / slice_name(1, 2)).mkdir()
        before = (tmp_path / slice_name(0, 2)).read_bytes()
        steps: list[int] = []
        with pytest.raises(StorageError, match=r"rank-1-of-2\.h5: a directory of that name is there; remove it"):
            slice_model(
                source, make_plan(source.config, [2, 1]), "f32", tmp_path, lambda done, total: steps.append(done)
            )
    assert (tmp_path / slice_name(0, 2)).read_bytes() == before
    assert not steps
    assert len(list(tmp_path.iterdir())) == 2


def test_a_leftover_that_cannot_be_removed_is_in_nobodys_way(model: Path, tmp_path: Path) -> None:
    (tmp_path / ".rank-0-of-1.h5.999999999.partial").mkdir()
    with open_source(model) as source:
        slice_model(source, make_plan(source.config, [1]), "f32", tmp_path)
    assert (tmp_path / slice_name(0, 1)).is_file()
