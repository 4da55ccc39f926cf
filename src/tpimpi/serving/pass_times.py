"""What a pass costs for so many rows, as measured in this run."""

from __future__ import annotations

import bisect
from collections import deque

from tpimpi.compute.arrays import median

_TIMES_KEPT = 9  # passes of as many rows
_FEW_TIMES = 2  # of which the least counts: there is no middle that a slow one is not part of


class PassTimes:
    """Seconds of the passes of a run, by how many rows they had: the median of the last ones of each.

    They show what a pass is bound by: with a disk or a link eight rows take about as long as one, with a processor longer;
    of a mixture they include the experts that more rows read.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}
        self._rows: list[int] = []  # in order
        self._begun = False

    def add(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took so long. A prompt's first one counts for nothing: it waits for tiles that are read
        once, to stay in memory."""
        begun, self._begun = self._begun, True
        if not begun and rows > 1:
            return
        if rows not in self._times:
            self._times[rows] = deque(maxlen=_TIMES_KEPT)
            bisect.insort(self._rows, rows)
        self._times[rows].append(seconds)

    def clear(self) -> None:
        """What passes take has changed: those before count for nothing."""
        self._times.clear()
        self._rows.clear()

    def count(self, rows: int) -> int:
        """How many passes over so many rows were timed, at most _TIMES_KEPT."""
        return len(self._times.get(rows, ()))

    @property
    def max_rows(self) -> int:
        """Of a pass that was timed."""
        return self._rows[-1] if self._rows else 0

    def seconds(self, rows: int) -> float:
        """What a pass over so many rows takes: between those that were timed on a line, beyond them as the nearest; not more
        than a pass over more rows, so that one slow pass does not count where others are known."""
        at = bisect.bisect_left(self._rows, rows)
        if at == len(self._rows):
            return self._median(self._rows[-1])
        least = min(map(self._median, self._rows[at:]))
        if at == 0 or self._rows[at] == rows:
            return least
        less, more = self._rows[at - 1], self._rows[at]
        part = (rows - less) / (more - less)
        return min(least, self._median(less) * (1 - part) + self._median(more) * part)

    def _median(self, rows: int) -> float:
        times = list(self._times[rows])
        if len(times) <= _FEW_TIMES:
            return min(times)
        return median(times)

    def rows_within(self, rows: int, delay: float, most: int) -> int:
        """The most rows, from `rows` to `most`, with which a pass takes at most `delay` times as long as one of `rows`."""
        if not self._rows:
            return most
        limit = delay * self.seconds(rows)
        counts = range(rows, most + 1)
        return rows + max(0, bisect.bisect_right(counts, limit, key=self.seconds) - 1)
