"""The making of slices, by one process or for all ranks: with a lock, progress, and clean ends on signals."""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path

from tpimpi.compute.backends import load_quantizer
from tpimpi.errors import SliceError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.tokenizer_trial import try_tokenizer
from tpimpi.star import Star
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.distribute import SliceOutcome, distribute_slices
from tpimpi.weights.locations import SliceLocation
from tpimpi.weights.make import make_header, only_slicing, requantized, slice_model
from tpimpi.weights.slices.local import LocalSlice, is_good
from tpimpi.weights.slices.partition import Partition
from tpimpi.weights.sources import Source


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
    before = partial(check_before_slicing, source, partition, formats, quiet=quiet)
    path, there = location.path(0, partition.ranks), False
    with contextlib.suppress(SliceError):
        there = is_good(path, make_header(source, partition, 0, formats))
    with contextlib.ExitStack() as stack:
        if location.folder is None and not there:
            stack.enter_context(only_slicing(path.parent, quiet=quiet))
        return distribute_slices(star, source, partition, formats, location, verify=verify, quiet=quiet, before=before)


def say_left_out(source: Source, *, quiet: bool) -> None:
    """One line on stderr where a model in a file can do more than tpimpi computes."""
    if source.left_out and not quiet:
        print(f"{source.path.name}: {source.left_out}", file=sys.stderr, flush=True)


def check_before_slicing(source: Source, partition: Partition, formats: ModelFormats, *, quiet: bool) -> None:
    """What is wrong with the tokenizer is said before the work, and what is quantized a second time."""
    assets, vocab = source.tokenizer_assets(), source.config.vocab
    try_tokenizer(assets, vocab, source.path)
    load_tokenizer(assets, vocab)
    if not quiet and (again := requantized(source, partition, formats)):
        print(again, file=sys.stderr, flush=True)


def slice_source(
    source: Source, partition: Partition, formats: ModelFormats, folder: Path, *, quiet: bool, verify: bool = False
) -> list[LocalSlice]:
    """The slices of all ranks in one folder, by one process; what was there of each."""
    check_before_slicing(source, partition, formats, quiet=quiet)
    ranks = f"{partition.ranks} rank{'s' if partition.ranks > 1 else ''}"
    with (
        progress_bar("looking at what is there", quiet=quiet) as looking,
        progress_bar(f"slicing {source.path.name} for {ranks} as {formats.describe()}", quiet=quiet) as update,
    ):
        quantizer = load_quantizer(len(os.sched_getaffinity(0)))
        return slice_model(source, partition, formats, folder, update, quantizer, verify=verify, looking=looking)
