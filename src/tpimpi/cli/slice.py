"""`slice`: makes the slices of a model, all by one process, or under mpirun each rank's on its own disk."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpimpi.cli.network_options import add_seal
from tpimpi.cli.options import ComputeOptions, NetworkOptions
from tpimpi.cli.parser import Parser, offer
from tpimpi.cli.prepare import choose_partition
from tpimpi.cli.process import Job, say
from tpimpi.cli.run_options import parsed_into
from tpimpi.cli.run_parser import add_shares
from tpimpi.cli.slicing import ensure_slices, say_left_out, slice_source
from tpimpi.cli.values import AUTO, MAX_RANKS, given_model, path_given, share_weights, slice_count, whole_number
from tpimpi.engine.ranks import gather_rank_infos
from tpimpi.models.weight_formats import FORMAT_CHOICES, ModelFormats
from tpimpi.star import Star
from tpimpi.star.control import StopNote, send_note, stop_others_on_error
from tpimpi.weights.locations import SliceLocation, cache_name, model_path
from tpimpi.weights.make import choose_formats
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import Partition, make_partition
from tpimpi.weights.sources import open_source


@dataclass(frozen=True)
class SliceOptions:
    """What `slice` takes; `out` None is the cache folder of each host."""

    model: str | None
    ranks: int | None
    format: str
    shares: str | None
    out: str | None
    verify: bool
    quiet: bool


def slice_parser() -> argparse.ArgumentParser:
    """Options of `slice`."""
    parser = Parser(
        prog="python -m tpimpi slice",
        description="Make the ranks' slices of a model. Under mpirun each rank's slice goes to that rank's own disk. What "
        "is there already stays; what was interrupted goes on. Slices of another model, format or shares are never "
        "replaced: remove them first, or give another --out.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=given_model, metavar="PATH", help="where the model is (default: as in a run)")
    parser.add_argument(
        "--ranks",
        type=whole_number("--ranks", 1, MAX_RANKS),
        metavar="N",
        help="how many slices to make (default: as many as mpirun starts)",
    )
    add_shares(parser)
    add_seal(parser)
    weights = parser.add_argument(
        "--format", default="auto", help=f"auto, {', '.join(FORMAT_CHOICES)} (default: as in a run)"
    )
    offer(weights, (AUTO, *FORMAT_CHOICES))
    parser.add_argument(
        "--out",
        type=path_given("--out", "the folder that gets the slices"),
        metavar="DIR",
        help="gets rank-R-of-N.h5 for each rank R (default, under mpirun: each host's cache folder, where a run looks)",
    )
    parser.add_argument(
        "--verify", action="store_true", help="read every tile that is there, and make again what is broken"
    )
    parser.add_argument("--quiet", action="store_true", help="only errors")
    return parser


def parse_slice(arguments: Sequence[str]) -> SliceOptions:
    """The options of `slice`. Raises InputError for what cannot be used."""
    return parsed_into(SliceOptions, slice_parser().parse_args(arguments))


def slice_alone(job: Job) -> int:
    """`slice` of one process: the slices of all ranks in one folder."""
    options = parse_slice(job.arguments[1:])
    weights = share_weights(options.shares, slice_count(options.ranks, options.out))
    folder = Path(options.out or "")
    with open_source(model_path(options.model)) as source:
        say_left_out(source, quiet=options.quiet)
        formats = choose_formats(source, options.format)
        partition = make_partition(source.config, weights)
        made = slice_source(source, partition, formats, folder, quiet=options.quiet, verify=options.verify)
    _say_made(options, str(options.out), partition, formats, there=all(slice.good for slice in made))
    return 0


def slice_together(star: Star, job: Job) -> int:
    """Rank 0 of `slice` under mpirun: every rank gets its slice on its own disk."""
    with stop_others_on_error(star):
        ranks = gather_rank_infos(star, job.arguments)
        options = parse_slice(job.arguments[1:])
        slice_count(options.ranks, options.out, star.rank.size)
        with open_source(model_path(options.model)) as source:
            say_left_out(source, quiet=options.quiet)
            formats = choose_formats(source, options.format)
            usual = ComputeOptions(), NetworkOptions()  # --shares auto is for a run without options
            partition = choose_partition(
                *(star, ranks, source, formats, options.shares, *usual),
                look_in_cache=options.out is None,
                quiet=options.quiet,
            )
            location = SliceLocation(options.out, cache_name(source, partition, formats))
            made = ensure_slices(star, source, partition, formats, location, verify=options.verify, quiet=options.quiet)
        folder = options.out or f"{location.cache_name} in the cache of each host"
        _say_made(options, folder, partition, formats, there=all(rank.good for rank in made))
    send_note(star, StopNote(0))
    return 0


def _say_made(options: SliceOptions, folder: str, partition: Partition, formats: ModelFormats, *, there: bool) -> None:
    files = f"{slice_name(0, partition.ranks)} to {slice_name(partition.ranks - 1, partition.ranks)}"
    remark = f", there already{' and as they should be' if options.verify else ''}" if there else ""
    line = f"{folder}: {files} ({formats.describe()}, shares {partition.describe()}){remark}"
    say(None if options.quiet else line)
