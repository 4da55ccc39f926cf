"""What a rank records of its time, for a trace of the run: spans of reading, waiting, computing and the star.

See diagnostics/trace_file.py for the file.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tpimpi.errors import StarError
from tpimpi.star.control import Note

KINDS = ("read", "disk wait", "compute", "star")
READ, WAIT, COMPUTE, STAR = range(4)

MAX_PASSES = 20_000  # that rank 0 records; they take 5 MB
MAX_SPANS = 200_000  # that a rank records; they take 5.2 MB
_SPAN = np.dtype(
    [("kind", "u1"), ("lane", "u1"), ("block", "<i4"), ("tile", "<i4"), ("began", "<f8"), ("ended", "<f8")]
)
Spans = npt.NDArray[np.void]

MAX_SECONDS, MAX_BYTES = 1e10, 1e18  # more than any time or size in a trace can be


@dataclass
class PassSpan:
    """A pass through the layers, as rank 0 knows it: from `began` to `ended` of time.monotonic() `rows` of so many
    `sequences` were computed; of `drafted` ones among them so many were `accepted`, and `tokens` were chosen."""

    began: float
    ended: float
    rows: int
    sequences: int = 1
    drafted: int = 0
    accepted: int = 0
    tokens: int = 0


class Recorder:
    """Spans of this rank's time. Threads may add to it at the same time; adding takes about a microsecond.

    Memory: spans take at most `max_bytes`, as they are used; on rank 0 passes take up to 5 MB beside.
    """

    def __init__(self, most: int = MAX_SPANS) -> None:
        """Spans beyond `most` are counted, in `dropped`, and not kept."""
        self._spans = np.empty(most, _SPAN)
        self._count = 0
        self._lock = threading.Lock()
        self.passes: list[PassSpan] = []  # on rank 0

    @property
    def max_bytes(self) -> int:
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

    def add_pass(self, span: PassSpan) -> PassSpan:
        """Note a pass, which may be told what it gave later; after the first MAX_PASSES none is kept."""
        if len(self.passes) < MAX_PASSES:
            self.passes.append(span)
        return span

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


class TraceNote(Note, frozen=True):
    """What a rank recorded: all of a RankTrace but the offset. As JSON it is about 1.4 times as long as the spans."""

    host: str
    timeline: Sequence[Sequence[int | float]]
    dropped: int
    spans: bytes


@dataclass(frozen=True)
class RankTrace:
    """What one rank recorded: packed spans, and [t, resident, pinned, buffers] in bytes, t in its own monotonic seconds.

    `clock_offset` is what is to be added to its clock to get the hub's (see Star.clock_offsets). `passes` are rank 0's.
    """

    rank: int
    host: str
    clock_offset: float
    spans: bytes
    timeline: Sequence[Sequence[float]]
    dropped: int = 0
    passes: Sequence[PassSpan] = ()

    def note(self) -> TraceNote:
        """All but the offset, for the star."""
        return TraceNote(self.host, self.timeline, self.dropped, self.spans)

    @classmethod
    def from_note(cls, rank: int, note: TraceNote, clock_offset: float) -> RankTrace:
        """Hub: what `rank` recorded."""
        return cls(rank, note.host, clock_offset, note.spans, note.timeline, note.dropped)
