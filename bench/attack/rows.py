"""Rows of the embedding table in recorded bytes: byte for byte, wherever they stand, or the nearest ones."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes

WINDOW_BYTES = 16
WINDOWS = 4  # of each row: one of them is whole, wherever a library cuts a message and puts a header of its own
MIN_KINDS_OF_BYTES = 8  # in a window; others, of zeros say, stand anywhere
FILTER_BITS = 24
SEARCHED_BYTES = 1 << 24  # at a time
MIN_COSINE = 0.999  # of a vector with the row that it is taken for; vectors of other tokens are below 0.95
SEARCHED_ROWS = 256  # at a time


class Found(NamedTuple):
    """A row: where it begins, and whose it is."""

    start: int
    token: int


class RowIndex:
    """Finds rows in bytes, without knowing how these are framed. Memory: about 300 bytes a row."""

    def __init__(self, rows: Bytes) -> None:
        """`rows`: uint8 [vocab, bytes a row], as they are on the wire."""
        self._width = width = rows.shape[1]
        starts = sorted({min(width * window // WINDOWS, width - WINDOW_BYTES) for window in range(WINDOWS)})
        self._windows: dict[bytes, Found] = {}  # where in a row, and in which
        repeated = set()
        for start in starts:
            cut = np.ascontiguousarray(rows[:, start : start + WINDOW_BYTES])
            for token, window in enumerate(map(bytes, cut)):
                if window in self._windows:
                    repeated.add(window)  # alike in several rows: it tells nothing
                elif len(set(window)) >= MIN_KINDS_OF_BYTES:
                    self._windows[window] = Found(start, token)
        for window in repeated:
            del self._windows[window]
        keys = np.frombuffer(b"".join(window[:8] for window in self._windows), "<u8")
        self._keys = np.sort(keys)
        self._filter = np.zeros(1 << FILTER_BITS, np.bool_)
        self._filter[keys & ((1 << FILTER_BITS) - 1)] = True

    def find(self, data: bytes) -> list[Found]:
        """The rows in `data`, in the order in which they stand there."""
        hits = []
        for first in range(0, len(data), SEARCHED_BYTES):
            part = data[first : first + SEARCHED_BYTES + WINDOW_BYTES - 1]
            for place in self._places(part):
                if (window := self._windows.get(part[place : place + WINDOW_BYTES])) is not None:
                    hits.append(Found(first + place - window.start, window.token))
        found: list[Found] = []
        for hit in sorted(set(hits)):
            last = next((row for row in found[-WINDOWS:] if row.token == hit.token), None)
            if last is None or hit.start - last.start > self._width // 2:  # else another window of the same row
                found.append(hit)
        return found

    def _places(self, part: bytes) -> list[int]:
        """Where eight bytes stand with which a window begins."""
        places: list[npt.NDArray[np.int64]] = []
        for offset in range(8):
            words = np.frombuffer(part, "<u8", max(0, len(part) - offset) // 8, offset)
            some = np.flatnonzero(self._filter[words & np.uint64((1 << FILTER_BITS) - 1)])
            at = np.searchsorted(self._keys, words[some]).clip(max=max(0, len(self._keys) - 1))
            places.append(some[self._keys[at] == words[some]] * 8 + offset if len(self._keys) else some[:0])
        return [int(place) for place in np.sort(np.concatenate(places))]


def nearest_rows(vectors: F32, table: F32, least: float = MIN_COSINE) -> list[int]:
    """For each of `vectors` [n, hidden] the row of `table` [vocab, hidden] with the same direction; -1 where there is none.

    So are rows found that were rounded, or that come from another file of the same model.
    """
    unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-30)
    tokens = []
    for first in range(0, len(vectors), SEARCHED_ROWS):
        with np.errstate(all="ignore"):  # what is no vector: any bytes
            some = vectors[first : first + SEARCHED_ROWS].astype(np.float64)
            some = some / np.linalg.norm(some, axis=1, keepdims=True)
        some = np.where(np.isfinite(some), some, 0).astype(np.float32)
        cosines = some @ unit.T
        best = cosines.argmax(axis=1)
        tokens += np.where(cosines[np.arange(len(some)), best] >= least, best, -1).tolist()
    return tokens
