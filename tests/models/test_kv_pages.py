"""The allocator of KV pages, over thousands of steps against a plain model: none leaks, none is shared by mistake."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tpimpi.models.kv.cache import FULL, KINDS, PAGE, WINDOWED, pages_of
from tpimpi.models.kv.pages import NO_PAGE, PageAllocator, SequencePages, rows_of


class Pages(RuleBasedStateMachine):
    """What each sequence wrote is kept beside it: a token a position, in pages of a cache that is a dictionary."""

    @initialize(
        places=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        sizes=st.sampled_from([(4, 0), (0, 4), (1, 5), (3, 3)]),
        tight=st.integers(0, 30),
        window=st.integers(0, 200),
        kept=st.integers(0, 70),
    )
    def begin(self, places: tuple[int, int], sizes: tuple[int, int], tight: int, window: int, kept: int) -> None:
        self.most = sum(count * size for count, size in zip(places, sizes, strict=True)) - tight
        self.places, self.sizes = places, sizes
        self.allocator = PageAllocator(places, sizes, max(0, self.most))
        self.window, self.kept = window, kept
        self.sequences: list[tuple[SequencePages, list[int]]] = []
        self.written: dict[tuple[int, int, int], int] = {}  # by kind, page, place in it
        self.token = 0
        self.reached: dict[int, int] = {}  # positions that each sequence has had, by its id

    def _write(self, pages: SequencePages, text: list[int], n: int) -> None:
        """As a step does with n rows; each row sees what came before."""
        rows = rows_of([pages], [(len(text), n)])
        for position in rows.position.tolist():
            self.token += 1
            for kind in KINDS:
                page = int(rows.tables[kind][0, position // PAGE])
                assert page != NO_PAGE and self.allocator.users(kind, page) == 1, "written where others may read"
                self.written[kind, page, position % PAGE] = self.token
            text.append(self.token)
            self.reached[id(pages)] = max(self.reached.get(id(pages), 0), len(text))
            self._check(pages, text, position)

    def _check(self, pages: SequencePages, text: list[int], position: int) -> None:
        """The row at `position` finds its own sequence's positions, wherever they are."""
        for kind in KINDS:
            first = max(0, position - max(1, self.window) + 1) if kind == WINDOWED else 0
            for at in {first, (first + position) // 2, position}:
                page = pages.tables[kind][at // PAGE]
                assert self.written[kind, page, at % PAGE] == text[at]

    @rule(n=st.integers(1, 150))
    def new(self, n: int) -> None:
        pages = SequencePages(self.allocator, self.window, self.kept)
        self.reached[id(pages)] = 0
        before = self.allocator.used
        if pages.grow(n):
            self.sequences.append((pages, []))
            self._write(*self.sequences[-1], n)
            pages.trim()
        else:
            assert self.allocator.used == before and not any(pages.tables)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), n=st.one_of(st.just(1), st.integers(1, 150)))
    def grow(self, data: st.DataObject, n: int) -> None:
        pages, text = data.draw(st.sampled_from(self.sequences))
        tables = [list(table) for table in pages.tables]
        if pages.grow(len(text) + n):
            self._write(pages, text, n)
            pages.trim()
        else:
            assert [list(table) for table in pages.tables] == tables
            units = sum(a * b for a, b in zip(pages.missing(len(text) + n), self.sizes, strict=True))
            short = [len(self.allocator.free_pages(kind)) < pages.missing(len(text) + n)[kind] for kind in KINDS]
            assert any(short) or self.allocator.used + units > self.allocator.units, "there was room"

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), back=st.integers(0, 200))
    def truncate(self, data: st.DataObject, back: int) -> None:
        pages, text = data.draw(st.sampled_from(self.sequences))
        length = max(0, len(text) - back)
        alone = all(
            self.allocator.users(kind, table[length // PAGE]) == 1
            for kind, table in enumerate(pages.tables)
            if length // PAGE < len(table) and table[length // PAGE] != NO_PAGE
        )
        # From the greatest length that it had: what was taken back once is not kept again.
        trimmed = self.reached[id(pages)] - self.kept
        if alone and (length >= trimmed or trimmed - max(1, self.window) + 1 < PAGE):
            assert pages.holds(length), "what is kept can be taken back"
        if pages.holds(length):
            pages.truncate(length)
            del text[length:]
            assert pages.length == length
            assert [len(table) for table in pages.tables] == [pages_of(length)] * len(KINDS)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), part=st.floats(0, 1))
    def share(self, data: st.DataObject, part: float) -> None:
        pages, text = data.draw(st.sampled_from(self.sequences))
        count = int(part * (len(text) // PAGE))
        if count and pages.holds(count * PAGE):
            other = pages.shared(count)
            assert other.length == count * PAGE
            self.sequences.append((other, text[: count * PAGE]))
            self.reached[id(other)] = count * PAGE + self.kept

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.sequences))
        self.sequences = [other for other in self.sequences if other is not one]
        one[0].close()

    @invariant()
    def every_page_is_counted(self) -> None:
        if not hasattr(self, "allocator"):
            return
        units = 0
        for kind in KINDS:
            users = Counter(page for pages, _ in self.sequences for page in pages.tables[kind] if page != NO_PAGE)
            free = self.allocator.free_pages(kind)
            assert len(set(free)) == len(free) and not set(free) & set(users)
            assert len(free) + len(users) == self.places[kind], "a page is nobody's"
            assert all(self.allocator.users(kind, page) == count for page, count in users.items())
            units += len(users) * self.sizes[kind]
        assert self.allocator.used == units <= self.allocator.units

    def teardown(self) -> None:
        if not hasattr(self, "allocator"):
            return
        for pages, text in self.sequences:
            if text and pages.holds(len(text) - 1):
                self._check(pages, text, len(text) - 1)
            pages.close()
        assert self.allocator.used == 0 and [len(self.allocator.free_pages(kind)) for kind in KINDS] == list(
            self.places
        )


Pages.TestCase.settings = settings(max_examples=40, stateful_step_count=60, deadline=None)
TestPages = Pages.TestCase


def test_windows_give_back_pages_that_no_later_row_sees() -> None:
    """A window of 100 positions, of a sequence that grows by single positions: three pages of it at most."""
    allocator = PageAllocator([20, 20], [2, 5], 10_000)
    pages, most = SequencePages(allocator, window=100), 0
    for length in range(1, 1001):
        assert pages.grow(length)
        pages.trim()
        most = max(most, sum(page != NO_PAGE for page in pages.tables[WINDOWED]))
    assert most == 3
    assert allocator.used == 16 * 2 + 2 * 5  # positions 901 to 999 are in two pages
    assert pages.holds(1000) and pages.holds(995) and pages.holds(0)  # at 995 a row sees 896 and later
    assert not pages.holds(994) and not pages.holds(500)
    assert len(pages.tables[FULL]) == 16 and NO_PAGE not in pages.tables[FULL]


def test_rows_of_a_step_have_their_sequences_tables() -> None:
    allocator = PageAllocator([9, 9], [1, 1], 100)
    first, second = SequencePages(allocator), SequencePages(allocator)
    assert first.grow(70) and second.grow(3)
    rows = rows_of([first, second], [(69, 1), (0, 3)])
    assert rows.sequence.tolist() == [0, 1, 1, 1] and rows.position.tolist() == [69, 0, 1, 2]
    for kind in KINDS:
        expected = [first.tables[kind], [*second.tables[kind], NO_PAGE]]
        np.testing.assert_array_equal(rows.tables[kind], expected)
