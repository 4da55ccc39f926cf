"""Slices go to the hosts that need them: rank 0 reads and quantizes the model, each rank writes its own slice.

Every rank looks at what its host has, rank 0 hears that there is room for the rest, then every rank says which tiles it
lacks; those that rank 0 makes go over the star to that rank's own disk. Rank 0 needs no disk space for them: it holds three
messages for each rank, of 2 MiB (stream.MESSAGE_BYTES). A rank that has all of its tiles is sent nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tpimpi.errors import ModelError, StarError
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Star
from tpimpi.star.control import encode_note, on_every_rank, receive_note, report_errors
from tpimpi.system.disk import disk_full
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.locations import SliceLocation, elsewhere
from tpimpi.weights.make import make_header
from tpimpi.weights.send import TileSender
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.local import LocalSlice, tidy_up
from tpimpi.weights.slices.partition import Partition, make_partition
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import Source
from tpimpi.weights.stream import CHECKSUM, DATA, END, FAILED, StreamWriter, checksum_in, frames

TASK = "distribute slices"  # in a note of rank 0: what follows is `receive_slices`
TURN_S = 0.5  # of looking at files between two notes to rank 0
MOST_RANKS_NAMED = 6  # in the title of the progress


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
        return f"{self.here} of {self.tiles} tiles of {where} were there already" if self.here else None


# Rank 0


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
    """Rank 0: have every rank's slice on that rank's disk; the others call `receive_slices`. What each had, in rank order.

    `before` is called before anything is made. With `verify` every tile that is there is read, and made again where it is
    broken. Raises ModelError, StorageError, InputError, StarError.
    """
    header = make_header(source, partition, 0, formats)
    with ExitStack() as stack:
        local = LocalSlice(location.path(0, partition.ranks), header, verify=verify)
        stack.callback(local.close)
        star.broadcast_note(_job_note(header, location, verify=verify))
        _, notes = on_every_rank(star, local.look)
        notes[0] = _look_note(star, local)
        if not verify and all(note["good"] for note in notes):
            star.broadcast_note(encode_note(prepare=False))
            return _outcomes(notes)
        _check_room(notes)
        if not all(note["good"] for note in notes):
            before()
        star.broadcast_note(encode_note(prepare=True))
        notes = _prepare(star, local, notes, quiet=quiet)
        found = _outcomes(notes)
        for line in [rank.line() for rank in found]:
            if line is not None and not quiet:
                _say(line)
        _make_missing(star, source, local, notes, quiet=quiet)
        on_every_rank(star, local.finish)
        star.broadcast_note(encode_note(publish=True))
        on_every_rank(star, lambda: _publish(local))
    return found


def _job_note(header: Header, location: SliceLocation, *, verify: bool) -> bytes:
    """What the other ranks need to know to call `receive_slices`: `_header_from` undoes it."""
    return encode_note(
        task=TASK,
        model=header.model,
        fingerprint=header.fingerprint,
        config=header.config.to_dict(),
        formats=header.formats.to_dict(),
        weights=list(header.partition.weights),
        folder=location.folder,
        cache_name=location.cache_name,
        verify=verify,
    )


def _make_missing(
    star: Star, source: Source, local: LocalSlice, notes: Sequence[dict[str, Any]], *, quiet: bool
) -> None:
    """Make the tiles that ranks lack: rank 0's own, and those of others, which are sent to them."""
    lacking = {rank: _indexes(note["missing"]) for rank, note in enumerate(notes[1:], start=1) if note["missing"]}
    if local.writer is None and not lacking:
        return
    partition, formats = local.header.partition, local.header.formats
    streams = [StreamWriter(r, make_header(source, partition, r, formats), missing) for r, missing in lacking.items()]
    to = [f"r{r.rank} {r.host}" for r in _outcomes(notes) if r.rank in lacking or (r.rank == 0 and not r.good)]
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
        if len(ranks) <= MOST_RANKS_NAMED
        else f"{', '.join(ranks[: MOST_RANKS_NAMED - 1])} and {len(ranks) - MOST_RANKS_NAMED + 1} more"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _outcomes(notes: Sequence[dict[str, Any]]) -> list[SliceOutcome]:
    kept = ("host", "tiles", "good", "here", "broken", "complaint")
    return [SliceOutcome(rank, *(note[name] for name in kept)) for rank, note in enumerate(notes)]


def _check_room(notes: Sequence[dict[str, Any]]) -> None:
    """Raise StorageError where a disk has not enough room for the slices of the ranks that share it."""
    for rank, note in enumerate(notes):
        beside = [
            other
            for other, found in enumerate(notes)
            if (found["host"], found["device"]) == (note["host"], note["device"]) and found["needed"]
        ]
        needed = sum(notes[other]["needed"] for other in beside)
        if note["needed"] and needed > note["free"]:
            whose = "its slice needs" if beside == [rank] else f"the slices of ranks {', '.join(map(str, beside))} need"
            problem = disk_full(whose, needed, f"{note['folder']} has", note["free"], note["elsewhere"])
            problem.where = f"r{rank} {note['host']}"
            raise problem


def _prepare(star: Star, local: LocalSlice, notes: list[dict[str, Any]], *, quiet: bool) -> list[dict[str, Any]]:
    """Every rank looks at its tiles, in turns of a moment, so that a long look is no silence; what they found in the end."""
    total = sum(note["to_look"] for note in notes)
    looking = _LookingInTurns(star, local)
    with progress_bar(f"looking at the tiles of {len(notes)} {_ranks(len(notes))}", quiet=quiet) as update:
        while True:
            _, found = on_every_rank(star, looking.a_turn)
            found[0] = looking.note()
            done = all(note["ready"] for note in found)
            if total and not done:
                update(min(sum(note["looked"] for note in found), total - 1), total)
            star.broadcast_note(encode_note(more=not done))
            if done:
                if total:
                    update(total, total)
                return found


class _LookingInTurns:
    """`LocalSlice.prepare`, a moment at a time."""

    def __init__(self, star: Star, local: LocalSlice) -> None:
        self.star, self.local = star, local
        self._work = local.prepare()
        self._looked, self._ready = 0, False

    def a_turn(self) -> None:
        ends = time.monotonic() + TURN_S
        while not self._ready and time.monotonic() < ends:
            try:
                self._looked += next(self._work)
            except StopIteration:
                self._ready = True

    def note(self) -> dict[str, Any]:
        local, note = self.local, {"looked": self._looked, "ready": self._ready}
        if not self._ready:
            return note
        missing = [] if local.writer is None else local.writer.missing
        return {**note, **_look_note(self.star, local), "missing": _as_runs(missing)}


def _look_note(star: Star, local: LocalSlice) -> dict[str, Any]:
    return {
        "host": star.rank.host,
        "folder": str(local.path.parent),
        "elsewhere": elsewhere(local.path),
        "tiles": len(local.header.records),
        **{name: getattr(local, name) for name in ("good", "complaint", "needed", "free", "device", "to_look")},
        **{name: getattr(local, name) for name in ("here", "broken")},
    }


def _as_runs(indexes: Sequence[int]) -> list[list[int]]:
    """Ascending numbers as runs [first, behind the last]."""
    runs: list[list[int]] = []
    for index in indexes:
        if runs and runs[-1][1] == index:
            runs[-1][1] = index + 1
        else:
            runs.append([index, index + 1])
    return runs


def _indexes(runs: Sequence[Sequence[int]]) -> list[int]:
    return [index for first, last in runs for index in range(first, last)]


def _publish(local: LocalSlice) -> None:
    local.publish()
    tidy_up(local.path, local.header.fingerprint)


# The other ranks


def receive_slices(star: Star, note: dict[str, Any]) -> None:
    """A rank other than 0: look at what is here of our slice, write what rank 0 sends. Raises StorageError, StarError."""
    with ExitStack() as stack:

        def look() -> LocalSlice:
            header = _header_from(note, star.rank.index, star.rank.size)
            location = SliceLocation(note["folder"], note["cache_name"])
            local = LocalSlice(location.path(header.rank, header.partition.ranks), header, verify=note["verify"])
            stack.callback(local.close)
            local.look()
            return local

        local = report_errors(star, look)
        star.gather_notes(encode_note(**_look_note(star, local)))
        if not receive_note(star)["prepare"]:
            return
        looking = _LookingInTurns(star, local)
        more = True
        while more:
            report_errors(star, looking.a_turn)
            star.gather_notes(encode_note(**looking.note()))
            more = receive_note(star)["more"]
        if local.writer is not None and local.writer.missing:
            _receive(star, local.writer)
        report_errors(star, local.finish)
        star.gather_notes(encode_note())
        receive_note(star)
        report_errors(star, lambda: _publish(local))
        star.gather_notes(encode_note())


def _header_from(note: dict[str, Any], rank: int, ranks: int) -> Header:
    config = ModelConfig.from_dict(note["config"])
    formats = ModelFormats.from_dict(note["formats"], config.layers)
    partition = make_partition(config, note["weights"])
    if partition.ranks != ranks:
        raise StarError(f"rank 0 has a plan for {partition.ranks} ranks, the run has {ranks}")
    records = tuple(slice_records(config, partition.shares[rank], rank, formats, {}))
    return Header(rank, formats, note["model"], note["fingerprint"], config, partition, records)


def _receive(star: Star, writer: SliceWriter) -> None:
    """Write tiles as they come, until there are no more."""
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
                receive_note(star)  # raises Stopped
                raise StarError("rank 0 gave up sending tiles without a reason")
            elif kind == END and not wanted:
                return
            else:
                raise StarError(f"rank 0 sent a frame of kind {kind} for tile {index}, which makes no sense")
