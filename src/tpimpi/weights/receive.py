"""A rank looks at its slice, and writes what rank 0 sends of it (see distribute.py).

Ranks other than 0 import nothing that reads or makes models.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from tpimpi.errors import StarError
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Star
from tpimpi.star.control import Done, Proceed, Task, gather_notes, receive_note, receive_stop, report_errors
from tpimpi.weights.locations import SliceLocation, elsewhere
from tpimpi.weights.notes import CheckTiles, ContinueCheck, DistributeSlices, SliceFound, TilesFound
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.local import LocalSlice, tidy_up
from tpimpi.weights.slices.partition import make_partition

if TYPE_CHECKING:
    from tpimpi.weights.slices.writer import SliceWriter

CHECK_TIME_S = 0.5  # that a rank checks files between two notes to rank 0


class TimedCheck:
    """`LocalSlice.prepare`, CHECK_TIME_S at a time."""

    def __init__(self, star: Star, local: LocalSlice) -> None:
        self.star, self.local = star, local
        self._work = local.prepare()
        self._looked, self._ready = 0, False

    def run(self) -> None:
        ends = time.monotonic() + CHECK_TIME_S
        while not self._ready and time.monotonic() < ends:
            try:
                self._looked += next(self._work)
            except StopIteration:
                self._ready = True

    def note(self) -> TilesFound:
        if not self._ready:
            return TilesFound(self._looked)
        missing = [] if self.local.writer is None else self.local.writer.missing
        return TilesFound(self._looked, slice_found(self.star, self.local), _as_runs(missing))


def slice_found(star: Star, local: LocalSlice) -> SliceFound:
    return SliceFound(
        host=star.rank.host,
        folder=str(local.path.parent),
        elsewhere=elsewhere(local.path),
        tiles=len(local.header.records),
        good=local.good,
        complaint=local.complaint,
        needed=local.needed,
        free=local.free,
        device=local.device,
        to_look=local.to_look,
        here=local.here,
        broken=local.broken,
    )


def _as_runs(indexes: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as runs [first, behind the last]."""
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        else:
            runs.append((index, index + 1))
    return runs


def indexes_of(runs: Sequence[tuple[int, int]], count: int, sender: str) -> list[int]:
    """The numbers of such runs, of tiles of which there are `count`. Raises StarError where they are of others."""
    ends = [0, *(end for run in runs for end in run), count]
    if any(before > behind for before, behind in itertools.pairwise(ends)):
        raise StarError(f"{sender} says that it lacks tiles that its slice has not, which has {count}")
    return [index for first, last in runs for index in range(first, last)]


def publish(local: LocalSlice) -> None:
    local.publish()
    tidy_up(local.path, local.header.fingerprint)


def receive_slices(star: Star, task: Task) -> None:
    """A rank other than 0: look at what is here of our slice, write what rank 0 sends. Raises StorageError, StarError."""
    note = task.note(DistributeSlices)
    with ExitStack() as stack:

        def look() -> LocalSlice:
            header = _header_from(note, star.rank.index, star.rank.size)
            location = SliceLocation(note.folder, note.cache_name)
            path, of_cache = location.path(header.rank, header.partition.ranks), location.folder is None
            local = LocalSlice(path, header, verify=note.verify, of_cache=of_cache)
            stack.callback(local.close)
            local.look()
            return local

        local = report_errors(star, look)
        gather_notes(star, slice_found(star, local))
        if not receive_note(star, CheckTiles).prepare:
            return
        check = TimedCheck(star, local)
        more = True
        while more:
            report_errors(star, check.run)
            gather_notes(star, check.note())
            more = receive_note(star, ContinueCheck).more
        if local.writer is not None and local.writer.missing:
            _receive(star, local.writer)
        report_errors(star, local.finish)
        gather_notes(star, Done())
        receive_note(star, Proceed)
        report_errors(star, lambda: publish(local))
        gather_notes(star, Done())


def _header_from(note: DistributeSlices, rank: int, ranks: int) -> Header:
    try:
        config = ModelConfig.from_dict(note.config)
        formats = ModelFormats.from_dict(note.formats, config.layers)
        partition = make_partition(config, note.weights)
        if partition.ranks != ranks:
            raise StarError(f"rank 0 has a plan for {partition.ranks} ranks, the run has {ranks}")
        records = tuple(slice_records(config, partition.shares[rank], rank, formats, {}))
    except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise StarError(
            f"rank 0 sent a plan of slices that makes no sense ({type(error).__name__}: {error}); see that every host has "
            "the same tpimpi"
        ) from error
    return Header(rank, formats, note.model, note.fingerprint, config, partition, records)


def _receive(star: Star, writer: SliceWriter) -> None:
    """Write tiles as they come, until there are no more."""
    from tpimpi.weights.stream import CHECKSUM, DATA, END, FAILED, checksum_in, frames

    wanted = set(writer.missing)
    writer.awaits_sums = True
    while True:
        for index, kind, data in frames(star.take_bulk(0)):
            if kind == DATA and index in wanted:
                name, left = writer.left_of(index)
                if not 0 < data.nbytes <= left:
                    raise StarError(f"rank 0 sent {data.nbytes} bytes for a part of tile {index} that lacks {left}")
                writer.write(index, name, data)
            elif kind == CHECKSUM and index in wanted and writer.left_of(index) == ("", 0):
                if not writer.confirm(index, checksum_in(data)):
                    path = writer.header.records[index].path
                    raise StarError(f"{path} came otherwise than rank 0 sent it; start again: what came whole is kept")
                wanted.remove(index)
            elif kind == FAILED:
                receive_stop(star)
            elif kind == END and not wanted:
                return
            else:
                raise StarError(f"rank 0 sent a frame of kind {kind} for tile {index}, which makes no sense")
