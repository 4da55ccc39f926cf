"""Which page is whose: rank 0's allocator of the KV pages, the same for all ranks, of which it alone decides.

A sequence has pages of each kind of layers. A page is counted by who uses it: a full page may be of several sequences, and
of what is kept for later ones, since nobody writes to it again; all others are of one. Pages of windowed layers that no
later row sees are given back as the sequence grows. Nothing here knows what a sequence is for, or holds memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.arrays import I32
from tpimpi.models.kv.cache import FULL, KINDS, PAGE, WINDOWED, StepRows, pages_of

NO_PAGE = -1


class PageAllocator:
    """The pages of a run: of each kind `places[kind]` at most, and all together no more than `units`.

    A page of a kind takes `sizes[kind]` units (layers of that kind): how many of each there are is not fixed before.
    """

    def __init__(self, places: Sequence[int], sizes: Sequence[int], units: int) -> None:
        self.sizes, self.units = tuple(sizes), units
        self.used = 0  # units
        self._users: list[list[int]] = [[0] * count for count in places]
        # The page that was given back last is taken first: its memory is there.
        self._free = [list(range(count - 1, -1, -1)) for count in places]

    @classmethod
    def of_layers(cls, kinds: Sequence[int], units: int) -> PageAllocator:
        """For a model whose layers are of these kinds: any part of `units` pages of a layer may be of either kind."""
        sizes = [kinds.count(kind) for kind in KINDS]
        fewest = min(size for size in sizes if size)  # a kind that has no layers has as many pages as the other
        return cls([units // (size or fewest) for size in sizes], sizes, units)

    @property
    def places(self) -> tuple[int, ...]:
        """Pages of each kind that there can be."""
        return tuple(map(len, self._users))

    def can_take(self, counts: Sequence[int]) -> bool:
        """Whether so many pages of each kind are to be had at once."""
        return self.used + self.units_of(counts) <= self.units and all(
            count <= len(free) for count, free in zip(counts, self._free, strict=True)
        )

    def has(self, counts: Sequence[int]) -> bool:
        """Whether there are so many pages of each kind, whoever uses them."""
        return self.units_of(counts) <= self.units and all(a <= b for a, b in zip(counts, self.places, strict=True))

    def units_of(self, counts: Sequence[int]) -> int:
        """What so many pages of each kind take."""
        return sum(count * size for count, size in zip(counts, self.sizes, strict=True))

    def take(self, kind: int) -> int:
        """A page that nobody uses; `can_take` has said that there is one."""
        assert self.used + self.sizes[kind] <= self.units
        page = self._free[kind].pop()
        self._users[kind][page] = 1
        self.used += self.sizes[kind]
        return page

    def share(self, kind: int, page: int) -> None:
        """One more uses this page."""
        assert self._users[kind][page] > 0
        self._users[kind][page] += 1

    def give_back(self, kind: int, page: int) -> None:
        """One less uses this page; it is free when nobody does."""
        users = self._users[kind]
        assert users[page] > 0
        users[page] -= 1
        if not users[page]:
            self._free[kind].append(page)
            self.used -= self.sizes[kind]

    def users(self, kind: int, page: int) -> int:
        """How many use this page, 0 where it is free."""
        return self._users[kind][page]

    def free_pages(self, kind: int) -> list[int]:
        """Pages that nobody uses: their memory may be given back to the system (see KVCache.release)."""
        return list(self._free[kind])


def first_seen(length: int, window: int) -> int:
    """The first page of layers with this window (0: there are none) that a row at position `length` or later sees."""
    return max(0, length - max(1, window) + 1) // PAGE


@dataclass
class SequencePages:
    """The pages of one sequence of `length` positions.

    tables[kind][i] has those from i * PAGE on, NO_PAGE where it was given back. `window` is the longest of the windowed
    layers; `kept` is how many positions can be taken back at any time, from the greatest length that it has had.
    """

    allocator: PageAllocator
    window: int = 0
    kept: int = 0
    length: int = 0
    tables: tuple[list[int], ...] = field(default_factory=lambda: tuple([] for _ in KINDS))

    def missing(self, length: int) -> list[int]:
        """Pages of each kind that it takes to grow to so many positions."""
        return [max(0, pages_of(length) - len(table)) for table in self.tables]

    def grow(self, length: int) -> bool:
        """Have pages for so many positions, which the next step writes; False, with nothing changed, where too few are free.

        Positions that the step's rows see stay until the next `grow`, or `trim`.
        """
        if not self.allocator.can_take(self.missing(length)):
            return False
        for kind, (table, count) in enumerate(zip(self.tables, self.missing(length), strict=True)):
            table.extend(self.allocator.take(kind) for _ in range(count))
        self.length = max(self.length, length)
        return True

    def _first_seen(self, length: int) -> int:
        return first_seen(length, self.window)

    def trim(self) -> None:
        """Give back pages of windowed layers that no row sees from position `length` - `kept` on."""
        table = self.tables[WINDOWED]
        for i in range(min(self._first_seen(self.length - self.kept), len(table)) - 1, -1, -1):
            if table[i] == NO_PAGE:
                break
            self.allocator.give_back(WINDOWED, table[i])
            table[i] = NO_PAGE

    def holds(self, length: int) -> bool:
        """Whether the sequence can go on from position `length`: all that the row there sees is held, and it would not write
        to a page of others."""
        if not 0 <= length <= self.length:
            return False
        ends_within = length % PAGE and any(
            table[length // PAGE] != NO_PAGE and self.allocator.users(kind, table[length // PAGE]) > 1
            for kind, table in enumerate(self.tables)
        )
        return not ends_within and all(
            page != NO_PAGE for page in self.tables[WINDOWED][self._first_seen(length) : pages_of(length)]
        )

    def truncate(self, length: int) -> None:
        """Take back all positions from `length` on; see `holds`."""
        assert self.holds(length)
        for kind, table in enumerate(self.tables):
            for page in reversed(table[pages_of(length) :]):
                if page != NO_PAGE:
                    self.allocator.give_back(kind, page)
            del table[pages_of(length) :]
        self.length = length

    def shared(self, pages: int) -> SequencePages:
        """A sequence that begins with the first `pages` pages of this one, which are full: `holds(pages * PAGE)`."""
        assert self.holds(pages * PAGE)
        return self.beginning_with(self.allocator, [table[:pages] for table in self.tables], self.window, self.kept)

    @classmethod
    def beginning_with(
        cls, allocator: PageAllocator, pages: Sequence[Sequence[int]], window: int = 0, kept: int = 0
    ) -> SequencePages:
        """A sequence that begins with these full pages of each kind, which others use: of windowed layers with those that
        the next row sees, which must be there."""
        length = len(pages[FULL]) * PAGE
        first = first_seen(length, window)
        sequence = cls(allocator, window, kept, length)
        for kind, (table, theirs) in enumerate(zip(pages, sequence.tables, strict=True)):
            seen = first if kind == WINDOWED else 0
            theirs.extend(NO_PAGE if i < seen else page for i, page in enumerate(table))
            for page in theirs[seen:]:
                allocator.share(kind, page)
        return sequence

    def close(self) -> None:
        """Give everything back."""
        self.length = 0
        for kind, table in enumerate(self.tables):
            for page in reversed(table):
                if page != NO_PAGE:
                    self.allocator.give_back(kind, page)
            table.clear()


def rows_of(sequences: Sequence[SequencePages], runs: Iterable[tuple[int, int]]) -> StepRows:
    """The rows of a step: of each sequence (first position, rows), in order; the pages are there (see `grow`)."""
    sequence: list[int] = []
    position: list[int] = []
    for number, (start, n) in enumerate(runs):
        sequence += [number] * n
        position += range(start, start + n)
    tables = []
    for kind in (FULL, WINDOWED):
        width = max(len(one.tables[kind]) for one in sequences)
        table: I32 = np.full((len(sequences), width), NO_PAGE, np.int32)
        for number, one in enumerate(sequences):
            table[number, : len(one.tables[kind])] = one.tables[kind]
        tables.append(table)
    return StepRows(np.array(sequence, np.int32), np.array(position, np.int32), tuple(tables))
