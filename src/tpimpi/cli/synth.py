"""`synth`: random weights in a known model's shape, written as slices, as a Hugging Face folder or as a GGUF file."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tpimpi.cli.parser import Parser, offer
from tpimpi.cli.process import Job
from tpimpi.cli.run_options import parsed_into
from tpimpi.cli.values import MAX_RANKS, path_given, share_weights, slice_count, whole_number
from tpimpi.errors import InputError, shorten
from tpimpi.models.shapes import SHAPES, Shape, load_shape
from tpimpi.models.weight_formats import FORMAT_CHOICES
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.make import slice_model, wanted_formats
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Partition, make_partition
from tpimpi.weights.sources.export import write_gguf, write_hf
from tpimpi.weights.sources.synthetic import SyntheticSource, quantize_exactly, with_trace


@dataclass(frozen=True)
class SynthOptions:
    """What `synth` takes; `kind` is slices, hf or gguf."""

    shape: str
    layers: int | None
    format: str
    seed: int
    kind: str
    ranks: int | None
    shares: str | None
    routing: str | None
    predicted: float
    out: str
    quiet: bool


class _WholeNames(argparse.HelpFormatter):
    """Breaks no line within a name, as at the hyphen of gpt-oss."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


def synth_parser() -> argparse.ArgumentParser:
    """Options of `synth`."""
    parser = Parser(
        prog="python -m tpimpi synth",
        description="Write random weights in a known model's shape, to measure speed and memory with: no tokenizer, and "
        "answers without sense.",
        allow_abbrev=False,
        formatter_class=_WholeNames,
    )
    shapes = f"{', '.join(SHAPES)}, or the path of a config.json or of its folder"
    offer(parser.add_argument("--shape", required=True, metavar="NAME", help=shapes), SHAPES)
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers (default: as the shape has)")
    weights = parser.add_argument(
        "--format", type=weight_format, default="q4_0", help=f"{', '.join(FORMAT_CHOICES)} (default q4_0)"
    )
    offer(weights, FORMAT_CHOICES)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other weights for another one (default 0)")
    parser.add_argument(
        "--as",
        dest="kind",
        default="slices",
        choices=("slices", "hf", "gguf"),
        help="slices (the default), or the same weights as a Hugging Face folder in bf16 or as a GGUF file",
    )
    parser.add_argument(
        "--ranks", type=whole_number("--ranks", 1, MAX_RANKS), metavar="N", help="how many slices to make"
    )
    parser.add_argument("--shares", metavar="3,1,1,1", help="proportion of the model for each rank (default: equal)")
    parser.add_argument(
        "--routing",
        type=path_given("--routing", "a trace of routing, .npy"),
        metavar="FILE",
        help="of a mixture, as slices: choose the experts of this trace, uint16 [positions, layers, experts a token]",
    )
    parser.add_argument(
        "--predicted",
        type=part_of_one,
        default=0.9,
        metavar="P",
        help="the part of a trace's experts that is predicted rightly, 0 to 1 (default 0.9)",
    )
    parser.add_argument(
        "--out",
        type=path_given("--out", "the place that gets the weights"),
        required=True,
        metavar="PATH",
        help="folder of the slices, or of hf; or the .gguf file",
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def part_of_one(text: str) -> float:
    """The meaning of `--predicted`: a number of 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise InputError(f"--predicted is {shorten(text)!r}, must be a number of 0 to 1")
    return value


def weight_format(text: str) -> str:
    """The meaning of `--format`: one of FORMAT_CHOICES."""
    if text not in FORMAT_CHOICES:
        raise InputError(f"--format is {shorten(text)!r}, must be one of {', '.join(FORMAT_CHOICES)}")
    return text


def synth_alone(job: Job) -> int:
    """The whole command."""
    options = parsed_into(SynthOptions, synth_parser().parse_args(job.arguments[1:]))
    synthesize(options)
    return 0


def synthesize(options: SynthOptions) -> None:
    """Do what the options say, and say on stderr what was made. Raises InputError, StorageError."""
    shape, trace = load_shape(options.shape, options.layers), None
    if options.routing is not None:
        if options.kind != "slices":
            raise InputError(f"--routing is for slices, which follow it; leave it out with --as {options.kind}")
        shape, trace = with_trace(shape, Path(options.routing), options.predicted)
    formats = wanted_formats(options.format, shape.config)
    partition = _partition(options, shape)
    with contextlib.closing(SyntheticSource(shape, formats, options.seed, trace)) as source:
        if partition is None:
            made = _export(source, options)
        else:
            title = f"random weights for {shape.name} and {_ranks(partition)} as {formats.describe()}"
            with progress_bar(title, quiet=options.quiet) as update:
                slice_model(source, partition, formats, Path(options.out), update, quantize_exactly)
            files = f"{slice_name(0, partition.ranks)} to {slice_name(partition.ranks - 1, partition.ranks)}"
            made = f"{files} ({formats.describe()}, shares {partition.describe()})"
    if not options.quiet:
        print(f"{options.out}: {made}", file=sys.stderr)


def _partition(options: SynthOptions, shape: Shape) -> Partition | None:
    """For slices; None for a whole model."""
    if options.kind == "slices":
        if options.ranks is None:
            raise InputError("--ranks is missing; say how many slices to make, or write the model --as hf or gguf")
        return make_partition(shape.config, share_weights(options.shares, slice_count(options.ranks, options.out)))
    for name, given in (("ranks", options.ranks), ("shares", options.shares)):
        if given is not None:
            raise InputError(f"--{name} is for slices; leave it out with --as {options.kind}")
    return None


def _ranks(partition: Partition) -> str:
    return f"{partition.ranks} rank{'s' if partition.ranks > 1 else ''}"


def _export(source: SyntheticSource, options: SynthOptions) -> str:
    write, what = (write_hf, "Hugging Face") if options.kind == "hf" else (write_gguf, "GGUF")
    about = f"random weights for {source.shape.name}, {source.formats.describe()}"
    with progress_bar(f"{about}, as {what}", quiet=options.quiet) as update:
        write(source, Path(options.out), update)
    return f"{about}, {'in bf16' if options.kind == 'hf' else 'no tokenizer'}"
