"""What tests of distribute share."""

from __future__ import annotations

from pathlib import Path

from tpimpi.compute.backends import load_quantizer
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


def by_one_process(model: Path, shares: list[float], fmt: str, folder: Path) -> None:
    with open_source(model) as source:
        plan, formats = make_partition(source.config, shares), choose_formats(source, fmt)
        slice_model(source, plan, formats, folder, quantizer=load_quantizer(2))
