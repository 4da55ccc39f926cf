"""Traces as files: what each rank did when, on one clock, for ui.perfetto.dev and chrome://tracing.

The file is a JSON object in the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU):

    {"traceEvents": [EVENT, …], "displayTimeUnit": "ms", "otherData": {…}}

one event a line. A process is a rank (its pid), a thread a lane: compute, star, disk wait, read 0, read 1, … and of rank 0
passes. Events are "X" (a span: its name is the block, its category the kind, args the tile; or a pass, args its rows,
sequences, drafted, accepted and chosen tokens), "C" (resident, pinned and buffer memory, in MB)
and "M" (names and order). `ts` and `dur` are whole microseconds, from the earliest event on the hub's clock.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.engine.trace import COMPUTE, KINDS, MAX_BYTES, MAX_SECONDS, READ, STAR, WAIT, RankTrace, Spans, unpack
from tpimpi.errors import StarError
from tpimpi.system.files import replacing
from tpimpi.system.own_files import TRACE_BEGINNING

_LANES = {COMPUTE: 0, STAR: 1, WAIT: 2, READ: 3}  # from top to bottom; there may be many lanes that read


_FIRST_TID = (
    10_000  # the passes'; over any rank: a thread whose id is that of its process would be shown as its main thread
)


_PASS = "pass"
_COUNTERS = ("resident", "pinned", "buffers")


_CHUNK = 2_000  # events or spans handled at a time


def chrome_trace(ranks: Sequence[RankTrace], blocks: Sequence[str]) -> dict[str, Any]:
    """The trace as one object, as `write_trace` writes it; for short ones, since an event takes about a kilobyte.

    Raises StarError where a rank's spans make no sense.
    """
    return {"traceEvents": list(_events(ranks, blocks)), **_about(ranks)}


def write_trace(path: Path, ranks: Sequence[RankTrace], blocks: Sequence[str], option: str = "--trace") -> None:
    """Write the trace to `path`, which `option` gave, piece by piece: a file for its owner alone, whole or not at all.

    Memory: a few megabytes beside the spans themselves. Raises StorageError, and StarError as `chrome_trace` does.
    """
    encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
    with replacing(path, option, private=True) as file:
        file.write(TRACE_BEGINNING + b"[")
        events, between = _events(ranks, blocks), "\n"
        while chunk := list(itertools.islice(events, _CHUNK)):
            file.write((between + ",\n".join(map(encode, chunk))).encode("ascii"))
            between = ",\n"
        file.write(b"\n]," + encode(_about(ranks))[1:].encode("ascii") + b"\n")


def left_out(ranks: Sequence[RankTrace]) -> str | None:
    """What to tell the user where spans were dropped; None where none were."""
    parts = [f"{r.dropped} of r{r.rank} {r.host}" for r in ranks if r.dropped]
    return f"the trace ends early: later spans are left out, {', '.join(parts)}; trace fewer tokens" if parts else None


def _about(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    about = {"program": "tpimpi", "dropped": {f"r{r.rank}": r.dropped for r in ranks if r.dropped}}
    return {"displayTimeUnit": "ms", "otherData": about}


def _events(ranks: Sequence[RankTrace], blocks: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All events of all ranks, in no order of time; the format asks for none."""
    spans = [_checked(rank, blocks) for rank in ranks]
    starts = [float(s["began"].min()) + r.clock_offset for r, s in zip(ranks, spans, strict=True) if s.size]
    starts += [one.began + rank.clock_offset for rank in ranks for one in rank.passes]
    starts += [point[0] + rank.clock_offset for rank in ranks for point in rank.timeline]
    origin = min(starts, default=0.0)
    for rank, rank_spans in zip(ranks, spans, strict=True):
        yield from _names(rank, rank_spans)
        yield from _span_events(rank, rank_spans, blocks, origin)
        yield from _pass_events(rank, origin)
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
    if not ((abs(began) < MAX_SECONDS) & (abs(ended) < MAX_SECONDS) & (ended >= began)).all():
        raise StarError(f"{where} recorded a span that ends before it begins, or at no time that a clock shows")
    if any(len(point) != 1 + len(_COUNTERS) or not all(abs(v) < MAX_BYTES for v in point) for point in rank.timeline):
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
    if rank.passes:
        yield named("thread_name", _FIRST_TID, name="passes")
        yield named("thread_sort_index", _FIRST_TID, sort_index=_FIRST_TID)
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


def _pass_events(rank: RankTrace, origin: float) -> Iterator[dict[str, Any]]:
    for one in rank.passes:
        ts, end = (_microseconds(t + rank.clock_offset - origin) for t in (one.began, one.ended))
        counted = {name: count for name, count in asdict(one).items() if name not in ("began", "ended")}
        name = "prompt" if one.tokens == 0 else "pass"
        where = {"pid": rank.rank, "tid": _FIRST_TID}
        yield {"name": name, "cat": _PASS, "ph": "X", "ts": ts, "dur": end - ts, **where, "args": counted}


def _tid(kind: int, lane: int) -> int:
    return _FIRST_TID + 1 + _LANES[kind] + (lane if kind == READ else 0)


def _microseconds(seconds: Any) -> Any:
    """Whole microseconds of a number, or of each of an array."""
    if isinstance(seconds, np.ndarray):
        return np.rint(seconds * 1e6).astype(np.int64)
    return round(seconds * 1e6)
