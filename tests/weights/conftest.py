"""What the tests of this room share."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.slice_file_cases import SHARES
from tests.support.synth_cases import made, write_config
from tests.support.tiny_models import write_tiny_hf
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source
from tpimpi.weights.sources.synthetic import quantize_exactly


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("slicefile") / "model", "llama-bias")
    (path / "tokenizer.json").write_text('{"some": "tokenizer"}')
    return path


@pytest.fixture(scope="module")
def slices(model: Path) -> Path:
    folder = model.parent / "slices"
    with open_source(model) as source:
        slice_model(source, make_partition(source.config, SHARES), choose_formats(source, "f32"), folder)
    return folder


@pytest.fixture(scope="module")
def synthetic_slices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synth")
    source = made(write_config(folder / "shape"))
    plan = make_partition(source.config, [1.0])
    with closing(source):
        slice_model(source, plan, source.formats, folder / "slices", quantizer=quantize_exactly)
    return folder / "slices"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_hf(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture
def llama(pristine: Path, tmp_path: Path) -> Path:
    """A tiny llama that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "llama"))


@pytest.fixture(scope="module")
def llama_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny_hf(tmp_path_factory.mktemp("slicing") / "model", "llama")
    (path / "tokenizer.json").write_text("{}")
    return path
