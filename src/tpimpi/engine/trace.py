"""A trace of a run: what each rank did when, on one clock, for chrome://tracing and ui.perfetto.dev.

The file is a JSON object in the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):

    {"traceEvents": [EVENT, …], "displayTimeUnit": "ms", "otherData": {…}}

one event a line. A process is a rank (its pid), a thread a lane: compute, star, disk wait, read 0, read 1, … Events are
"X" (a span: its name is the block, its category the kind, args the tile), "C" (resident, pinned and buffer memory, in MB)
and "M" (names and order). `ts` and `dur` are whole microseconds, from the earliest event on the hub's clock.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tpimpi.errors import StarError, StorageError

KINDS = ("read", "disk wait", "compute", "star")
READ, WAIT, COMPUTE, STAR = range(4)
BEGINNING = b'{"traceEvents":'  # of every trace that is written here

MOST_SPANS = 200_000  # of a rank: 5.2 MB
_SPAN = np.dtype(
    [("kind", "u1"), ("lane", "u1"), ("block", "<i4"), ("tile", "<i4"), ("began", "<f8"), ("ended", "<f8")]
)
Spans = npt.NDArray[np.void]

_LANES = {COMPUTE: 0, STAR: 1, WAIT: 2, READ: 3}  # from top to bottom; there may be many lanes that read
_FIRST_TID = 10_000  # over any rank: a thread whose id is that of its process would be shown as its main thread
_COUNTERS = ("resident", "pinned", "buffers")
_MOST_SECONDS, _MOST_BYTES = 1e10, 1e18  # beyond what is meant as a time or a size
_CHUNK = 2_000  # events or spans handled at a time


class Recorder:
    """Spans of this rank's time. Threads may add to it at the same time; adding takes about a microsecond.

    Memory: at most `most_bytes`, taken as it is used.
    """

    def __init__(self, most: int = MOST_SPANS) -> None:
        """Spans beyond `most` are counted, in `dropped`, and not kept."""
        self._spans = np.empty(most, _SPAN)
        self._count = 0
        self._lock = threading.Lock()

    @property
    def most_bytes(self) -> int:
        return self._spans.nbytes

    @property
    def dropped(self) -> int:
        return max(0, self._count - len(self._spans))

    def add(self, kind: int, block: int, tile: int, began: float, ended: float, lane: int = 0) -> None:
        """Note that this rank was busy with `kind` from `began` to `ended`, both of time.monotonic().

        `block` is an index into the names that `chrome_trace` gets, `tile` a number within that block; -1 is none. `lane`,
        under 256, tells apart the threads that read.
        """
        with self._lock:
            place = self._count
            self._count += 1
        if place < len(self._spans):
            self._spans[place] = kind, lane, block, tile, began, ended

    @contextlib.contextmanager
    def span(self, kind: int, block: int, tile: int = -1) -> Iterator[None]:
        """Add what is done inside."""
        began = time.monotonic()
        yield
        self.add(kind, block, tile, began, time.monotonic())

    def pack(self) -> bytes:
        """The spans as bytes, 26 each, when nothing is added any more; `unpack` reads them."""
        return self._spans[: self._count].tobytes()


def unpack(data: bytes) -> Spans:
    """The spans that `pack` made bytes of. Raises StarError where these are no spans."""
    if len(data) % _SPAN.itemsize:
        raise StarError(f"a rank sent {len(data)} bytes of spans, which is no multiple of {_SPAN.itemsize}")
    return np.frombuffer(data, _SPAN)


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded: packed spans, and [t, resident, pinned, buffers] in bytes, t in its own monotonic seconds.

    `clock_offset` is what is to be added to its clock to get the hub's (see Star.clock_offsets).
    """

    rank: int
    host: str
    clock_offset: float
    spans: bytes
    timeline: Sequence[Sequence[float]]
    dropped: int = 0

    def note(self) -> bytes:
        """All but the offset as JSON, for the star; about 1.4 times as long as the spans."""
        spans = base64.b64encode(self.spans).decode("ascii")
        values = {"host": self.host, "timeline": self.timeline, "dropped": self.dropped}
        return json.dumps({**values, "spans": spans}).encode()

    @classmethod
    def from_note(cls, rank: int, note: bytes, clock_offset: float) -> RankTrace:
        """Hub: what `note`, which `rank` sent, says. Raises StarError where that makes no sense."""
        try:
            values = json.loads(note)
            spans = base64.b64decode(values["spans"], validate=True)
            timeline = [[float(value) for value in point] for point in values["timeline"]]
            return cls(rank, str(values["host"]), clock_offset, spans, timeline, int(values["dropped"]))
        except (ValueError, TypeError, LookupError, OverflowError) as error:
            raise StarError(f"rank {rank} sent a trace that makes no sense: {error!r}") from error


def chrome_trace(ranks: Sequence[RankTrace], blocks: Sequence[str]) -> dict[str, Any]:
    """The trace as one object, as `write_trace` writes it; for short ones, since an event takes about a kilobyte.

    Raises StarError where a rank's spans make no sense.
    """
    return {"traceEvents": list(_events(ranks, blocks)), **_about(ranks)}


def write_trace(path: Path, ranks: Sequence[RankTrace], blocks: Sequence[str], option: str = "--trace") -> None:
    """Write the trace to `path`, which `option` gave, piece by piece: a regular file whole or not at all.

    Memory: a few megabytes beside the spans themselves. Raises StorageError, and StarError as `chrome_trace` does.
    """
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    with replacing(path, option) as file:
        file.write(BEGINNING + b"[")
        events, between = _events(ranks, blocks), "\n"
        while chunk := list(itertools.islice(events, _CHUNK)):
            file.write((between + ",\n".join(map(encode, chunk))).encode("ascii"))
            between = ",\n"
        file.write(b"\n]," + encode(_about(ranks))[1:].encode("ascii") + b"\n")


def left_out(ranks: Sequence[RankTrace]) -> str | None:
    """What to tell the user where spans were dropped; None where none were."""
    parts = [f"{r.dropped} of r{r.rank} {r.host}" for r in ranks if r.dropped]
    return f"the trace ends early: later spans are left out, {', '.join(parts)}; trace fewer tokens" if parts else None


# Events


def _about(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    about = {"program": "tpimpi", "dropped": {f"r{r.rank}": r.dropped for r in ranks if r.dropped}}
    return {"displayTimeUnit": "ms", "otherData": about}


def _events(ranks: Sequence[RankTrace], blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All events of all ranks, in no order of time; the format asks for none."""
    spans = [_checked(rank, blocks) for rank in ranks]
    starts = [float(s["began"].min()) + r.clock_offset for r, s in zip(ranks, spans, strict=True) if s.size]
    starts += [point[0] + rank.clock_offset for rank in ranks for point in rank.timeline]
    origin = min(starts, default=0.0)
    for rank, rank_spans in zip(ranks, spans, strict=True):
        yield from _names(rank, rank_spans)
        yield from _span_events(rank, rank_spans, blocks, origin)
        for t, *values in rank.timeline:
            ts = _microseconds(t + rank.clock_offset - origin)
            for name, value in zip(_COUNTERS, values, strict=True):
                yield {"name": name, "ph": "C", "ts": ts, "pid": rank.rank, "args": {"MB": value / 1e6}}


def _checked(rank: RankTrace, blocks: Sequence[str]) -> Spans:
    """The rank's spans. Raises StarError unless they and its timeline make sense, so that nothing below can go wrong."""
    spans = unpack(rank.spans)
    where = f"r{rank.rank} {rank.host}"
    for name, least, limit in (("kind", 0, len(KINDS)), ("block", -1, len(blocks)), ("tile", -1, 1 << 31)):
        wrong = spans[name][(spans[name] < least) | (spans[name] >= limit)]
        if wrong.size:
            raise StarError(f"{where} recorded a span of {name} {wrong[0]}, must be from {least} to {limit - 1}")
    began, ended = spans["began"], spans["ended"]
    if not ((abs(began) < _MOST_SECONDS) & (abs(ended) < _MOST_SECONDS) & (ended >= began)).all():
        raise StarError(f"{where} recorded a span that ends before it begins, or at no time that a clock shows")
    if any(len(point) != 1 + len(_COUNTERS) or not all(abs(v) < _MOST_BYTES for v in point) for point in rank.timeline):
        raise StarError(f"{where} sent a timeline that is not [time, {', '.join(_COUNTERS)}]")
    return spans


def _names(rank: RankTrace, spans: Spans) -> Iterator[dict[str, Any]]:
    """Names and order of a rank's process, and of those of its threads that have spans."""

    def named(what: str, tid: int, **args: object) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": rank.rank, "tid": tid, "args": args}

    yield named("process_name", 0, name=f"r{rank.rank} {rank.host}")
    yield named("process_sort_index", 0, sort_index=rank.rank)
    if rank.dropped:
        yield named("process_labels", 0, labels=f"{rank.dropped} later spans left out")
    for number in np.unique(spans["kind"].astype(np.int64) * 256 + spans["lane"]).tolist():
        kind, lane = divmod(number, 256)
        tid = _tid(kind, lane)
        yield named("thread_name", tid, name=f"read {lane}" if kind == READ else KINDS[kind])
        yield named("thread_sort_index", tid, sort_index=tid)


def _span_events(rank: RankTrace, spans: Spans, blocks: Sequence[str], origin: float) -> Iterator[dict[str, Any]]:
    for first in range(0, spans.size, _CHUNK):
        chunk = spans[first : first + _CHUNK]
        # Both ends are rounded, not the length: spans that touch then still touch, and none overlap.
        begins, ends = (_microseconds(chunk[end] + rank.clock_offset - origin) for end in ("began", "ended"))
        columns = (chunk["kind"].tolist(), chunk["lane"].tolist(), chunk["block"].tolist(), chunk["tile"].tolist())
        for kind, lane, block, tile, ts, end in zip(*columns, begins.tolist(), ends.tolist(), strict=True):
            yield {
                "name": blocks[block] if block >= 0 else KINDS[kind],
                "cat": KINDS[kind],
                "ph": "X",
                "ts": ts,
                "dur": end - ts,
                "pid": rank.rank,
                "tid": _tid(kind, lane),
                "args": {"tile": tile} if tile >= 0 else {},
            }


def _tid(kind: int, lane: int) -> int:
    return _FIRST_TID + _LANES[kind] + (lane if kind == READ else 0)


def _microseconds(seconds: Any) -> Any:
    """Whole microseconds of a number, or of each of an array."""
    if isinstance(seconds, np.ndarray):
        return np.rint(seconds * 1e6).astype(np.int64)
    return round(seconds * 1e6)


# Files


@contextlib.contextmanager
def replacing(path: Path, option: str) -> Iterator[BinaryIO]:
    """A file to write what `path` shall hold; a regular file changes whole or not at all, a device or pipe as it is written.

    Raises StorageError.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        target = path.resolve()  # a link stays a link
        temporary = target.with_name(f".{os.getpid()}.{option.lstrip('-')}.partial")
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another {option}") from error
