"""Slices go to the hosts that need them: rank 0 reads and quantizes the model, each rank writes its own slice.

Every rank looks at what its host has, rank 0 hears that there is room for the rest, then every rank says which tiles it
lacks; those that rank 0 makes go over the star to that rank's own disk. Rank 0 needs no disk space for them: it holds three
parcels for each rank, of 2 MiB (parcels.PARCEL). A rank that has all of its tiles is sent nothing.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.compute.backends import load_quantizer
from tpimpi.compute.formats.packed import Bytes
from tpimpi.errors import ModelError, StarError, StorageError, as_ours
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Pending, Star
from tpimpi.star.control import as_note, heard, or_tell, together
from tpimpi.system.terminal import progress_bar
from tpimpi.weights.build import Sink, bytes_to_deal, deal
from tpimpi.weights.locations import cache_folder
from tpimpi.weights.make import make_header
from tpimpi.weights.slices.file import slice_name
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import slice_records
from tpimpi.weights.slices.local import Stock, tidy_up
from tpimpi.weights.slices.partition import Plan, make_plan
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import Source
from tpimpi.weights.stream import END, FAILED, PIECE, SUM, Packer, frames, the_sum

TASK = "spread slices"  # in a note of rank 0: what follows is `take_slices`
IN_FLIGHT = 2  # messages to a rank
_PATIENCE = 20.0  # seconds without a parcel after which an empty one is sent
_TURN = 0.5  # seconds of looking at files between two words to rank 0
_NAMED = 6  # ranks that are named in the title of the progress


@dataclass(frozen=True)
class Where:
    """Where slices are kept: a folder of that name on every host, or the folder of that name in each host's cache."""

    folder: str | None
    cache_name: str

    def path(self, rank: int, ranks: int) -> Path:
        folder = cache_folder() / self.cache_name if self.folder is None else Path(self.folder)
        return folder / slice_name(rank, ranks)


@dataclass(frozen=True)
class Spread:
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


def spread(
    star: Star,
    source: Source,
    plan: Plan,
    formats: ModelFormats,
    where: Where,
    *,
    verify: bool = False,
    quiet: bool = False,
    before: Callable[[], None] = lambda: None,
) -> list[Spread]:
    """Rank 0: have every rank's slice on that rank's disk; the others follow (`take_slices`). What each had, in rank order.

    `before` is called before anything is made. With `verify` every tile that is there is read, and made again where it is
    broken. Raises ModelError, StorageError, InputError, StarError.
    """
    header = make_header(source, plan, 0, formats)
    job = {
        "task": TASK,
        "model": header.model,
        "fingerprint": header.fingerprint,
        "config": header.config.to_dict(),
        "formats": header.formats.to_dict(),
        "weights": list(plan.weights),
        "folder": where.folder,
        "cache_name": where.cache_name,
        "verify": verify,
    }
    with ExitStack() as stack:
        stock = Stock(where.path(0, plan.ranks), header, verify=verify)
        stack.callback(stock.close)
        star.tell(as_note(**job))
        _, notes = together(star, stock.look)
        notes[0] = _look_note(star, stock)
        if not verify and all(note["good"] for note in notes):
            star.tell(as_note(prepare=False))
            return _what_became(notes)
        _check_room(notes)
        if not all(note["good"] for note in notes):
            before()
        star.tell(as_note(prepare=True))
        with progress_bar(f"looking at the tiles of {plan.ranks} {_ranks(plan.ranks)}", quiet=quiet) as update:
            notes = _prepare(star, stock, notes, update)
        found = _what_became(notes)
        for line in [rank.line() for rank in found]:
            if line is not None and not quiet:
                _say(line)
        lacking = {rank: _indexes(note["missing"]) for rank, note in enumerate(notes[1:], start=1) if note["missing"]}
        sinks = [Packer(rank, make_header(source, plan, rank, formats), missing) for rank, missing in lacking.items()]
        if stock.writer is not None or sinks:
            to = _named([f"r{r.rank} {r.host}" for r in found if r.rank in lacking or (r.rank == 0 and not r.good)])
            title = f"slicing {source.path.name} for {plan.ranks} {_ranks(plan.ranks)} as {formats.describe()}, to {to}"
            with progress_bar(title, quiet=quiet) as update:
                try:
                    _send(star, source, stock.writer, sinks, update)
                except ModelError:
                    stock.discard()  # of a model that is broken nothing is worth going on with
                    raise
        together(star, stock.finish)
        star.tell(as_note(publish=True))
        together(star, lambda: _publish(stock))
    return found


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"


def _named(ranks: Sequence[str]) -> str:
    return (
        ", ".join(ranks)
        if len(ranks) <= _NAMED
        else f"{', '.join(ranks[: _NAMED - 1])} and {len(ranks) - _NAMED + 1} more"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _what_became(notes: Sequence[dict[str, Any]]) -> list[Spread]:
    kept = ("host", "tiles", "good", "here", "broken", "complaint")
    return [Spread(rank, *(note[name] for name in kept)) for rank, note in enumerate(notes)]


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
            problem = StorageError(
                f"disk full: {whose} {needed / 1e9:.2f} GB, {note['folder']} has {note['free'] / 1e9:.2f} GB free; "
                "free some space there, or choose another place with --out or TPIMPI_CACHE"
            )
            problem.where = f"r{rank} {note['host']}"
            raise problem


def _prepare(
    star: Star, stock: Stock, notes: list[dict[str, Any]], update: Callable[[int, int], None]
) -> list[dict[str, Any]]:
    """Every rank looks at its tiles, in turns of a moment, so that a long look is no silence; what they found in the end."""
    total = sum(note["to_look"] for note in notes)
    looking = _Looking(star, stock)
    while True:
        _, found = together(star, looking.a_turn)
        found[0] = looking.note()
        done = all(note["ready"] for note in found)
        if total and not done:
            update(min(sum(note["looked"] for note in found), total - 1), total)
        star.tell(as_note(more=not done))
        if done:
            if total:
                update(total, total)
            return found


class _Looking:
    """`Stock.prepare`, a moment at a time."""

    def __init__(self, star: Star, stock: Stock) -> None:
        self.star, self.stock = star, stock
        self._work = stock.prepare()
        self._looked, self._ready = 0, False

    def a_turn(self) -> None:
        ends = time.monotonic() + _TURN
        while not self._ready and time.monotonic() < ends:
            try:
                self._looked += next(self._work)
            except StopIteration:
                self._ready = True

    def note(self) -> dict[str, Any]:
        stock, note = self.stock, {"looked": self._looked, "ready": self._ready}
        if not self._ready:
            return note
        missing = [] if stock.writer is None else stock.writer.missing
        return {**note, **_look_note(self.star, stock), "missing": _as_runs(missing)}


def _look_note(star: Star, stock: Stock) -> dict[str, Any]:
    return {
        "host": star.rank.host,
        "folder": str(stock.path.parent),
        "tiles": len(stock.header.records),
        **{name: getattr(stock, name) for name in ("good", "complaint", "needed", "free", "device", "to_look")},
        **{name: getattr(stock, name) for name in ("here", "broken")},
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


def _publish(stock: Stock) -> None:
    stock.publish()
    tidy_up(stock.path, stock.header.fingerprint)


# Sending: the model is read and quantized on a thread of its own, the main thread alone talks


class _Stopping(Exception):  # noqa: N818  (not an error)
    """The main thread has given up."""


def _send(
    star: Star, source: Source, own: SliceWriter | None, ways: Sequence[Packer], update: Callable[[int, int], None]
) -> None:
    """Make what is missing: ours to our file, the others' to their ranks."""
    parcels: queue.Queue[tuple[int, Bytes] | Exception | None] = queue.Queue(IN_FLIGHT)
    stopping, done = threading.Event(), 0
    sinks: list[Sink] = [*([] if own is None else [own]), *ways]
    total = max(1, bytes_to_deal(sinks, own))

    def hand_over(item: tuple[int, Bytes] | Exception | None) -> None:
        while not stopping.is_set():
            try:
                parcels.put(item, timeout=1.0)
                return
            except queue.Full:
                continue
        raise _Stopping

    def report(nbytes: int) -> None:
        nonlocal done
        done = nbytes
        if stopping.is_set():
            raise _Stopping

    def make() -> None:
        try:
            try:
                deal(source, sinks, own, report, load_quantizer(len(os.sched_getaffinity(0))))
                for way in ways:
                    way.end(END)
                hand_over(None)
            except _Stopping:
                raise
            except Exception as error:
                hand_over(error)
        except _Stopping:
            pass

    for way in ways:
        way.ready = lambda rank, parcel: hand_over((rank, parcel))
    post = _Sending(star, [way.rank for way in ways])
    maker = threading.Thread(target=make, name="tpimpi-slicing", daemon=True)
    maker.start()
    try:
        while True:
            try:
                item = parcels.get(timeout=0.2)
            except queue.Empty:
                post.keep_waiting()
            else:
                if item is None:
                    break
                if isinstance(item, Exception):
                    raise item
                post.send(*item)
                post.keep_waiting()
            update(min(done, total - 1), total)
        post.finish()
    except Exception as error:
        stopping.set()
        maker.join()
        if not isinstance(as_ours(error), StarError):
            post.give_up(ways)
        raise
    finally:
        stopping.set()
        maker.join()
    update(total, total)


class _Sending:
    """Parcels on their way to the other ranks, at most IN_FLIGHT to each."""

    def __init__(self, star: Star, ranks: Sequence[int]) -> None:
        self.star = star
        self._pending: dict[int, deque[tuple[Pending, Bytes]]] = {rank: deque() for rank in ranks}
        self._last = dict.fromkeys(ranks, time.monotonic())

    def send(self, rank: int, parcel: Bytes) -> None:
        pending = self._pending[rank]
        while len(pending) >= IN_FLIGHT:
            self.star.finish_bulk(pending.popleft()[0])
        pending.append((self.star.start_bulk(parcel, rank), parcel))  # kept until it is gone
        self._last[rank] = time.monotonic()

    def keep_waiting(self) -> None:
        """Ranks whose next tile takes long are told that it will come."""
        for rank, last in self._last.items():
            if time.monotonic() - last > _PATIENCE:
                self.send(rank, np.empty(0, np.uint8))

    def finish(self) -> None:
        for pending in self._pending.values():
            while pending:
                self.star.finish_bulk(pending.popleft()[0])

    def give_up(self, ways: Sequence[Packer]) -> None:
        """Tell the ranks that wait for tiles that none will come."""
        for way in ways:
            way.ready = self.send
            way.end(FAILED)
        self.finish()


# The other ranks


def take_slices(star: Star, note: dict[str, Any]) -> None:
    """A rank other than 0: look at what is here of our slice, write what rank 0 sends. Raises StorageError, StarError."""
    with ExitStack() as stack:

        def look() -> Stock:
            header = _header_from(note, star.rank.index, star.rank.size)
            where = Where(note["folder"], note["cache_name"])
            stock = Stock(where.path(header.rank, header.plan.ranks), header, verify=note["verify"])
            stack.callback(stock.close)
            stock.look()
            return stock

        stock = or_tell(star, look)
        star.collect(as_note(**_look_note(star, stock)))
        if not heard(star)["prepare"]:
            return
        looking = _Looking(star, stock)
        more = True
        while more:
            or_tell(star, looking.a_turn)
            star.collect(as_note(**looking.note()))
            more = heard(star)["more"]
        if stock.writer is not None and stock.writer.missing:
            _receive(star, stock.writer)
        or_tell(star, stock.finish)
        star.collect(as_note())
        heard(star)
        or_tell(star, lambda: _publish(stock))
        star.collect(as_note())


def _header_from(note: dict[str, Any], rank: int, ranks: int) -> Header:
    config = ModelConfig.from_dict(note["config"])
    formats = ModelFormats.from_dict(note["formats"], config.layers)
    plan = make_plan(config, note["weights"])
    if plan.ranks != ranks:
        raise StarError(f"rank 0 has a plan for {plan.ranks} ranks, the run has {ranks}")
    records = tuple(slice_records(config, plan.shares[rank], rank, formats, {}))
    return Header(rank, formats, note["model"], note["fingerprint"], config, plan, records)


def _receive(star: Star, writer: SliceWriter) -> None:
    """Write tiles as they come, until there are no more."""
    wanted = set(writer.missing)
    writer.awaits_sums = True
    while True:
        for index, kind, data in frames(star.take_bulk(0)):
            if kind == PIECE and index in wanted:
                name, left = writer.left_of(index)
                if not 0 < data.nbytes <= left:
                    raise StarError(f"rank 0 sent {data.nbytes} bytes for a part of tile {index} that lacks {left}")
                writer.write(index, name, data)
            elif kind == SUM and index in wanted and writer.left_of(index) == ("", 0):
                if not writer.confirm(index, the_sum(data)):
                    path = writer.header.records[index].path
                    raise StarError(f"{path} came otherwise than rank 0 sent it; start again: what came whole is kept")
                wanted.remove(index)
            elif kind == FAILED:
                heard(star)  # raises Stopped
                raise StarError("rank 0 gave up sending tiles without a reason")
            elif kind == END and not wanted:
                return
            else:
                raise StarError(f"rank 0 sent a frame of kind {kind} for tile {index}, which makes no sense")
