"""What the tests of this room share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be spoiled."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(scope="module")
def slices(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slices of the tiny model for two ranks."""
    folder = tmp_path_factory.mktemp("slices") / "two"
    with open_source(tiny) as source:
        slice_model(source, make_partition(source.config, [1, 1]), choose_formats(source, "f32"), folder)
    return folder


@pytest.fixture
def two(slices: Path, tmp_path: Path) -> Path:
    """A copy of the slices for two ranks, to be spoiled."""
    return Path(shutil.copytree(slices, tmp_path / "slices"))
