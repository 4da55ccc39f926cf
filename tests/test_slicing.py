"""Slicing keeps what it promises: memory, formats, and that it needs neither MPI nor torch."""

from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from conftest import run_command
from tiny_models import write_tiny_hf
from tpimpi.errors import InputError
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
