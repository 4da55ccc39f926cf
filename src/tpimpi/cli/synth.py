"""`synth`: random weights in a known model's shape, written as slices, as a Hugging Face folder or as a GGUF file."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path

from tpimpi.cli import options, tool_options
from tpimpi.compute.formats import WEIGHT_FORMATS
from tpimpi.errors import InputError
from tpimpi.models.shapes import Shape, load_shape
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.make import slice_model
from tpimpi.weights.slices.file import slice_name
from tpimpi.weights.slices.partition import Partition, make_partition
from tpimpi.weights.sources.export import write_gguf, write_hf
from tpimpi.weights.sources.synthetic import SyntheticSource, quantize_exactly


def synthesize(parsed: argparse.Namespace) -> None:
    """Do what the options say, and say on stderr what was made. Raises InputError, StorageError."""
    if not parsed.out:
        raise InputError("--out is empty; give the place that gets the weights")
    if parsed.format not in WEIGHT_FORMATS:
        raise InputError(f"--format is {parsed.format[:40]!r}, must be one of {', '.join(WEIGHT_FORMATS)}")
    shape = load_shape(parsed.shape, parsed.layers)
    formats = ModelFormats.of(parsed.format, shape.config.layers)
    partition = _plan(parsed, shape)
    with contextlib.closing(SyntheticSource(shape, formats, parsed.seed)) as source:
        if partition is None:
            made = _export(source, parsed)
        else:
            title = f"random weights for {shape.name} and {_ranks(partition)} as {formats.describe()}"
            with progress_bar(title, quiet=parsed.quiet) as update:
                slice_model(source, partition, formats, Path(parsed.out), update, quantize_exactly)
            files = f"{slice_name(0, partition.ranks)} to {slice_name(partition.ranks - 1, partition.ranks)}"
            made = f"{files} ({formats.describe()}, shares {partition.describe()})"
    if not parsed.quiet:
        print(f"{parsed.out}: {made}", file=sys.stderr)


def _plan(parsed: argparse.Namespace, shape: Shape) -> Partition | None:
    """For slices; None for a whole model."""
    if parsed.kind == "slices":
        if parsed.ranks is None:
            raise InputError("--ranks is missing; say how many slices to make, or write the model --as hf or gguf")
        return make_partition(shape.config, options.share_weights(parsed.shares, tool_options.ranks_of_slices(parsed)))
    for name in ("ranks", "shares"):
        if getattr(parsed, name) is not None:
            raise InputError(f"--{name} is for slices; leave it out with --as {parsed.kind}")
    return None


def _ranks(partition: Partition) -> str:
    return f"{partition.ranks} rank{'s' if partition.ranks > 1 else ''}"


def _export(source: SyntheticSource, parsed: argparse.Namespace) -> str:
    write, what = (write_hf, "Hugging Face") if parsed.kind == "hf" else (write_gguf, "GGUF")
    about = f"random weights for {source.shape.name}, {source.formats.describe()}"
    with progress_bar(f"{about}, as {what}", quiet=parsed.quiet) as update:
        write(source, Path(parsed.out), update)
    return f"{about}, {'in bf16' if parsed.kind == 'hf' else 'no tokenizer'}"
