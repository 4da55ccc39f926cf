"""Slices go to the hosts that need them: rank 0 reads and quantizes the model, each rank writes its own slice.

Every rank looks at what its host has, rank 0 hears that there is room for the rest, then every rank says which tiles it
lacks; those that rank 0 makes go over the star to that rank's own disk. Rank 0 needs no disk space for them: it holds three
messages for each rank, of 2 MiB (stream.MESSAGE_BYTES). A rank that has all of its tiles is sent nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from tpimpi.errors import ModelError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Star
from tpimpi.star.control import (
    Done,
    Proceed,
    on_every_rank,
    send_note,
)
from tpimpi.system.disk import disk_full
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.locations import SliceLocation
from tpimpi.weights.make import make_header
from tpimpi.weights.notes import CheckTiles, ContinueCheck, DistributeSlices, SliceFound, TilesFound
from tpimpi.weights.receive import TimedCheck, indexes_of, publish, slice_found
from tpimpi.weights.send import TileSender
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.local import LocalSlice
from tpimpi.weights.slices.partition import Partition
from tpimpi.weights.sources import Source
from tpimpi.weights.stream import StreamWriter

MAX_RANKS_NAMED = 6  # in the title of the progress


@dataclass(frozen=True)
class SliceOutcome:
    """What has become of a rank's slice."""

    rank: int
    host: str
    tiles: int
    good: bool  # it was there, and is as it should be
    here: int  # tiles of one that was not, that were on its host already
    broken: int  # tiles of one that was there, that were broken
    complaint: str  # what is wrong with a file of its name that could not be used at all

    def line(self) -> str | None:
        """What the user is told of it."""
        where = f"r{self.rank} {self.host}"
        if self.broken:
            return f"{where}: {self.broken} of {self.tiles} tiles {'was' if self.broken == 1 else 'were'} broken; made again"
        if self.complaint:
            return f"{where}: {self.complaint.split(';')[0]}; it is made again"
        if not self.here:
            return None
        were = "was" if self.here == 1 else "were"
        return f"{where}: {self.here} of {self.tiles} parts of its slice {were} there already, in slices made earlier"


def distribute_slices(
    star: Star,
    source: Source,
    partition: Partition,
    formats: ModelFormats,
    location: SliceLocation,
    *,
    verify: bool = False,
    quiet: bool = False,
    before: Callable[[], None] = lambda: None,
) -> list[SliceOutcome]:
    """Have every rank's slice on that rank's disk; the others call `receive.receive_slices`. What each had, in rank order.

    `before` is called before anything is made. With `verify` every tile that is there is read, and made again where it is
    broken. Raises ModelError, StorageError, InputError, StarError.
    """
    header = make_header(source, partition, 0, formats)
    with ExitStack() as stack:
        path, of_cache = location.path(0, partition.ranks), location.folder is None
        local = LocalSlice(path, header, verify=verify, of_cache=of_cache)
        stack.callback(local.close)
        send_note(star, _job_note(header, location, verify=verify))
        _, others = on_every_rank(star, local.look, SliceFound)
        slices = [slice_found(star, local), *others]
        if not verify and all(each.good for each in slices):
            send_note(star, CheckTiles(prepare=False))
            return _outcomes(slices)
        _check_room(slices)
        if not all(each.good for each in slices):
            before()
        send_note(star, CheckTiles(prepare=True))
        slices, lacking = _prepare(star, local, slices, quiet=quiet)
        found = _outcomes(slices)
        for line in [rank.line() for rank in found]:
            if line is not None and not quiet:
                _say(line)
        _make_missing(star, source, local, found, lacking, quiet=quiet)
        on_every_rank(star, local.finish, Done)
        send_note(star, Proceed())
        on_every_rank(star, lambda: publish(local), Done)
    return found


def _job_note(header: Header, location: SliceLocation, *, verify: bool) -> DistributeSlices:
    """What the other ranks need to know to call `receive_slices`: `receive._header_from` undoes it."""
    return DistributeSlices(
        model=header.model,
        fingerprint=header.fingerprint,
        config=header.config.to_dict(),
        formats=header.formats.to_dict(),
        weights=list(header.partition.proportions),
        folder=location.folder,
        cache_name=location.cache_name,
        verify=verify,
    )


def _make_missing(
    star: Star,
    source: Source,
    local: LocalSlice,
    found: Sequence[SliceOutcome],
    lacking: Mapping[int, Sequence[tuple[int, int]]],
    *,
    quiet: bool,
) -> None:
    """Make the tiles that ranks lack: rank 0's own, and those of others (`lacking`), which are sent to them."""
    if local.writer is None and not lacking:
        return
    partition, formats = local.header.partition, local.header.formats
    streams = []
    for rank, runs in lacking.items():
        header = make_header(source, partition, rank, formats)
        streams.append(StreamWriter(rank, header, indexes_of(runs, len(header.records), star.rank_name(rank))))
    to = [f"r{r.rank} {r.host}" for r in found if r.rank in lacking or (r.rank == 0 and not r.good)]
    ranks = f"{partition.ranks} {_ranks(partition.ranks)}"
    title = f"slicing {source.path.name} for {ranks} as {formats.describe()}, to {_named(to)}"
    with progress_bar(title, quiet=quiet) as update:
        try:
            TileSender(star, source, local.writer, streams).run(update)
        except ModelError:
            local.discard()  # of a model that is broken nothing is worth going on with
            raise


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"


def _named(ranks: Sequence[str]) -> str:
    return (
        ", ".join(ranks)
        if len(ranks) <= MAX_RANKS_NAMED
        else f"{', '.join(ranks[: MAX_RANKS_NAMED - 1])} and {len(ranks) - MAX_RANKS_NAMED + 1} more"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _outcomes(slices: Sequence[SliceFound]) -> list[SliceOutcome]:
    return [
        SliceOutcome(rank, each.host, each.tiles, each.good, each.here, each.broken, each.complaint)
        for rank, each in enumerate(slices)
    ]


def _check_room(slices: Sequence[SliceFound]) -> None:
    """Raise StorageError where a disk has not enough room for the slices of the ranks that share it."""
    for rank, each in enumerate(slices):
        beside = [
            other
            for other, found in enumerate(slices)
            if (found.host, found.device) == (each.host, each.device) and found.needed
        ]
        needed = sum(slices[other].needed for other in beside)
        if each.needed and needed > each.free:
            whose = "its slice needs" if beside == [rank] else f"the slices of ranks {', '.join(map(str, beside))} need"
            problem = disk_full(whose, needed, f"{each.folder} has", each.free, each.elsewhere)
            problem.where = f"r{rank} {each.host}"
            raise problem


def _prepare(
    star: Star, local: LocalSlice, slices: Sequence[SliceFound], *, quiet: bool
) -> tuple[list[SliceFound], dict[int, Sequence[tuple[int, int]]]]:
    """Every rank looks at its tiles, in turns of a moment, so that a long look is no silence. What they found in the end,
    and the runs of tiles that ranks other than 0 lack."""
    total = sum(each.to_look for each in slices)
    check = TimedCheck(star, local)
    with progress_bar(f"looking at the tiles of {len(slices)} {_ranks(len(slices))}", quiet=quiet) as update:
        while True:
            _, others = on_every_rank(star, check.run, TilesFound)
            notes = [check.note(), *others]
            done = all(note.ready for note in notes)
            if total and not done:
                update(min(sum(note.looked for note in notes), total - 1), total)
            send_note(star, ContinueCheck(more=not done))
            if done:
                if total:
                    update(total, total)
                lacking = {rank: note.missing for rank, note in enumerate(others, start=1) if note.missing}
                return [note.found for note in notes if note.found is not None], lacking
