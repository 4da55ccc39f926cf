"""Rows of a step as words: what is packed is unpacked, and what makes no sense is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tpimpi.engine.batch import PADDED_WORDS, pack_rows, unpack_rows
from tpimpi.engine.protocol import step
from tpimpi.errors import StarError
from tpimpi.models.kv.cache import PAGE, StepRows
from tpimpi.models.kv.pages import PageAllocator, SequencePages, rows_of


@examples(60)
@given(
    runs=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=6),
    multiple=st.sampled_from([1, PADDED_WORDS]),
)
def test_what_is_packed_is_unpacked(runs: list[tuple[int, int]], multiple: int) -> None:
    allocator = PageAllocator([64, 64], [1, 1], 1000)
    sequences = [SequencePages(allocator, window=50) for _ in runs]
    for sequence, (start, n) in zip(sequences, runs, strict=True):
        assert sequence.grow(start)
        sequence.trim()
        assert sequence.grow(start + n)
    rows = rows_of(sequences, runs)
    words = pack_rows(rows, multiple)
    assert words.dtype == np.int64
    assert len(words) % multiple == 0
    found = unpack_rows(words, [64, 64], 340)
    assert found.sequence.dtype == found.position.dtype == np.int32
    for a, b in ((rows.sequence, found.sequence), (rows.position, found.position)):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(rows.tables, found.tables, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_makes_no_sense_is_refused() -> None:
    allocator = PageAllocator([4, 4], [1, 1], 100)
    first, second = SequencePages(allocator), SequencePages(allocator)
    assert first.grow(PAGE + 1) and second.grow(1)
    good = pack_rows(rows_of([first, second], [(PAGE, 1), (0, 1)]))

    def refused(what: str, place: int | None = None, number: int = 0, words: np.ndarray = good) -> None:
        """With another number at a place of the words."""
        changed = words.copy()
        if place is not None:
            changed.view(np.int32)[place] = number
        with pytest.raises(StarError, match=what):
            unpack_rows(changed, [4, 4], PAGE + 1)

    unpack_rows(good, [4, 4], PAGE + 1)
    refused("make no sense", words=np.zeros(1, np.int64))
    refused("make no sense", 0, -1)
    refused("3 rows and 2 sequences in", 0, 3)
    refused("in 9 words", words=np.append(good, 7))
    refused("in 7 words", words=good[:-1])
    refused("sequence or position", 4, 2)  # the first row's sequence
    refused("sequence or position", 6, PAGE + 1)  # and position
    refused("sequence or position", 7, -1)
    refused("page that is not there; there are 4", 8, 4)
    refused("page that is not there", 9, -2)
    refused("row that has no page", 9, -1)
    refused("2147483647 rows", 0, 2**31 - 1)


class Recorded:
    """A star whose control messages are kept, and a model that computes nothing."""

    routing_hash = 0
    sealed = "sealed"
    auditor = None

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def send_words(self, words: np.ndarray) -> None:
        self.lengths.append(len(words))

    def pad_rows(self, pad: bool) -> None: ...

    def broadcast(self, x: np.ndarray) -> None: ...

    def step(self, x: np.ndarray, rows: StepRows, *, head: bool, watch: None) -> np.ndarray:
        return x


def test_over_sealed_links_no_step_of_an_answer_tells_where_it_is_in_its_pages() -> None:
    """Where its message grew with each second page, the step at which it did would tell how long the prompt was."""
    run = Recorded()
    sequence = SequencePages(PageAllocator([64, 64], [1, 1], 1000))
    for length in range(1, 10 * PAGE):
        assert sequence.grow(length)
        rows = rows_of([sequence], [(length - 1, 1)])
        step(run, run, np.zeros((1, 4), np.float32), rows)  # type: ignore[arg-type]
    assert len(set(run.lengths)) == 1
