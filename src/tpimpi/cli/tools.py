"""The commands of one process (slice, synth, inspect, bench), and the making of slices, which a run shares with them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tpimpi.cli import options, tool_options
from tpimpi.compute.backends import load_quantizer
from tpimpi.engine.ranks import RankInfo
from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.text.tokenizer import load_tokenizer
from tpimpi.star import Star, launched_rank
from tpimpi.system.files import write_json
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.distribute import SliceOutcome, distribute_slices
from tpimpi.weights.locations import SliceLocation, cache_name, cache_names, model_path
from tpimpi.weights.make import choose_formats, make_header, requantized, slice_model
from tpimpi.weights.slices.file import slice_name
from tpimpi.weights.slices.local import LocalSlice, is_good
from tpimpi.weights.slices.partition import Partition, make_partition
from tpimpi.weights.sources import Source, open_source

if TYPE_CHECKING:
    from filelock import FileLock

COMMANDS = ("slice", "synth", "inspect", "bench")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def tool(arguments: list[str]) -> int:
    """Under mpirun rank 0 alone does it; MPI is not started."""
    if launched_rank() not in (None, 0):
        return 0
    if arguments[0] == "slice":
        return _slice(tool_options.slice_parser().parse_args(arguments[1:]))
    if arguments[0] == "synth":
        from tpimpi.cli.synth import synthesize

        with cleaning_up_on_signals():
            synthesize(tool_options.synth_parser().parse_args(arguments[1:]))
        return 0
    if arguments[0] == "bench":
        return _bench(tool_options.bench_parser().parse_args(arguments[1:]))
    from tpimpi.diagnostics.inspect import inspect

    parsed = tool_options.inspect_parser().parse_args(arguments[1:])
    inspect(Path(parsed.path), verify=parsed.verify)
    return 0


def _slice(parsed: argparse.Namespace) -> int:
    weights = options.share_weights(parsed.shares, tool_options.ranks_of_slices(parsed))
    with open_source(model_path(parsed.model)) as source:
        formats = choose_formats(source, parsed.format)
        partition = make_partition(source.config, weights)
        local_slices = slice_source(
            source, partition, formats, Path(parsed.out), quiet=parsed.quiet, verify=parsed.verify
        )
    if not parsed.quiet:
        _say_made(parsed.out, partition, formats, all(local.good for local in local_slices), verified=parsed.verify)
    return 0


def slice_together(arguments: list[str], star: Star, guests: Sequence[RankInfo]) -> None:
    """Rank 0 of `slice` under mpirun: every rank gets its slice on its own disk."""
    parsed = tool_options.slice_parser().parse_args(arguments)
    ranks = tool_options.ranks_of_slices(parsed, star.rank.size)
    auto = parsed.shares == options.AUTO
    weights = [] if auto else options.share_weights(parsed.shares, ranks)
    with open_source(model_path(parsed.model)) as source:
        formats = choose_formats(source, parsed.format)
        if auto:  # for a run without options
            usual = options.run_parser().parse_args(["--quiet"] if parsed.quiet else [])
            names = None if parsed.out else cache_names(source, formats)
            from tpimpi.diagnostics.planner.command import Survey, choose_shares

            workload, measuring = (
                tool_options.workload(usual, source.config, formats),
                tool_options.measure_options(usual),
            )
            survey = Survey(star, guests, workload, measuring)
            weights = choose_shares(survey, ranks, names, quiet=parsed.quiet)
        partition = make_partition(source.config, weights)
        location = SliceLocation(parsed.out, cache_name(source, partition, formats))
        made = ensure_slices(star, source, partition, formats, location, verify=parsed.verify, quiet=parsed.quiet)
    if not parsed.quiet:
        folder = parsed.out or f"{location.cache_name} in the cache of each host"
        _say_made(folder, partition, formats, all(rank.good for rank in made), verified=parsed.verify)


def _say_made(folder: str, partition: Partition, formats: ModelFormats, there: bool, *, verified: bool) -> None:
    files = f"{slice_name(0, partition.ranks)} to {slice_name(partition.ranks - 1, partition.ranks)}"
    remark = f", there already{' and as they should be' if verified else ''}" if there else ""
    print(f"{folder}: {files} ({formats.describe()}, shares {partition.describe()}){remark}", file=sys.stderr)


def _bench(parsed: argparse.Namespace) -> int:
    tool_options.check_bench(parsed)
    if parsed.what == "allreduce":
        raise InputError("bench allreduce measures between ranks; start it with mpirun -np 2, or more")
    if parsed.what == "disk":
        return _bench_disk(parsed)
    from tpimpi.diagnostics.bench import kernels

    formats, positions = tool_options.bench_formats(parsed.formats), tool_options.bench_positions(parsed.positions)
    backend, remark = kernels.choose_backend(parsed.backend)
    if remark:
        print(remark, file=sys.stderr, flush=True)
    bench = kernels.Bench(backend, formats, positions, tool_options.bench_shape(parsed.shape), parsed.threads)
    table, limits = bench.run(parsed.seconds, _say_round)
    kernels.print_table(table, bench.title(), limits)
    if parsed.json is not None:
        write_json(Path(parsed.json), bench.as_json(table, limits), "--json")
    return 0


def _say_round(number: int, rounds: int) -> None:
    print(f"round {number} of {rounds}", file=sys.stderr, flush=True)


def _bench_disk(parsed: argparse.Namespace) -> int:
    from tpimpi.diagnostics.bench import disk
    from tpimpi.weights.locations import cache_folder

    path = cache_folder() if parsed.path is None else Path(parsed.path)
    with disk.Bench(path, parsed.readers, tool_options.read_size(parsed.size)) as bench:
        table = bench.run(parsed.seconds, _say_round)
        disk.print_table(table, bench.title())
        if parsed.json is not None:
            write_json(Path(parsed.json), bench.as_json(table), "--json")
    return 0


# Making slices


def ensure_slices(
    star: Star,
    source: Source,
    partition: Partition,
    formats: ModelFormats,
    location: SliceLocation,
    *,
    quiet: bool,
    verify: bool = False,
) -> list[SliceOutcome]:
    """Rank 0: have every rank's slice on its host. Into the cache one run at a time; the others wait for it."""
    before = partial(_before_slicing, source, partition, formats, quiet=quiet)
    path, there = location.path(0, partition.ranks), False
    with contextlib.suppress(SliceError):
        there = is_good(path, make_header(source, partition, 0, formats))
    with contextlib.ExitStack() as stack:
        if location.folder is None and not there:
            stack.enter_context(_alone(path.parent, quiet=quiet))
        stack.enter_context(cleaning_up_on_signals())
        return distribute_slices(star, source, partition, formats, location, verify=verify, quiet=quiet, before=before)


def _alone(folder: Path, *, quiet: bool) -> FileLock:
    """A lock, taken, that keeps other processes of this host from making the slices in a folder of the cache."""
    from filelock import FileLock, Timeout

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{folder}.lock").touch()  # FileLock would wait for ever for a file that it cannot make
        lock = FileLock(f"{folder}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not quiet:
                print("another tpimpi is slicing this model; waiting for it", file=sys.stderr, flush=True)
            lock.acquire()
    except OSError as error:
        raise StorageError(
            f"cannot write to {folder.parent}: {error.strerror}; set TPIMPI_CACHE to another place"
        ) from error
    return lock


def _before_slicing(source: Source, partition: Partition, formats: ModelFormats, *, quiet: bool) -> None:
    """What is wrong with the tokenizer is said before the work, and what is quantized a second time."""
    load_tokenizer(source.tokenizer_assets(), source.config.vocab)
    if not quiet and (again := requantized(source, partition, formats)):
        print(again, file=sys.stderr, flush=True)


def slice_source(
    source: Source, partition: Partition, formats: ModelFormats, folder: Path, *, quiet: bool, verify: bool = False
) -> list[LocalSlice]:
    """The slices of all ranks in one folder, by one process; what was there of each."""
    _before_slicing(source, partition, formats, quiet=quiet)
    ranks = f"{partition.ranks} rank{'s' if partition.ranks > 1 else ''}"
    with (
        progress_bar("looking at what is there", quiet=quiet) as looking,
        progress_bar(f"slicing {source.path.name} for {ranks} as {formats.describe()}", quiet=quiet) as update,
        cleaning_up_on_signals(),
    ):
        quantizer = load_quantizer(len(os.sched_getaffinity(0)))
        return slice_model(source, partition, formats, folder, update, quantizer, verify=verify, looking=looking)


@contextlib.contextmanager
def cleaning_up_on_signals() -> Iterator[None]:
    """While files are half-written, a signal is an exception first, so that they are removed; then we leave."""

    class Signalled(BaseException):
        pass

    def interrupt(number: int, frame: object) -> None:
        raise Signalled(number)

    before = [signal.signal(number, interrupt) for number in SIGNALS]
    try:
        yield
    except Signalled as signalled:
        os._exit(128 + signalled.args[0])
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
