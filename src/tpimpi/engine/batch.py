"""The rows of a step as words on the wire: which sequence and position each is, and where the sequences have their pages.

int32, two a word: rows, sequences, widths of the tables of full and of windowed layers; then the sequence of each row, the
position of each, and the tables; then zeros, as many as are wanted. Nothing says what a row's token is, or whose a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tpimpi.errors import StarError
from tpimpi.models.kv.cache import KINDS, PAGE, StepRows
from tpimpi.star import Words

# Over sealed links the words are a multiple of so many: they would tell how long a prompt is, and later, by the step of an
# answer at which a page is added, its exact length.
PADDED_WORDS = 64
_HEAD = 2 + len(KINDS)  # numbers before the rows


def pack_rows(rows: StepRows, multiple: int = 1) -> Words:
    """The words of these rows, int64 [n], where n is a multiple of `multiple`."""
    n, sequences = len(rows.sequence), len(rows.tables[0])
    head = np.array([n, sequences, *(table.shape[1] for table in rows.tables)], np.int32)
    parts = [head, rows.sequence, rows.position, *(table.reshape(-1) for table in rows.tables)]
    numbers = np.concatenate(parts).astype(np.int32, copy=False)
    return np.pad(numbers, (0, -len(numbers) % (2 * multiple))).view(np.int64)


def unpack_rows(words: Words, pages: Sequence[int], context: int) -> StepRows:
    """The rows that these words are, of sequences of at most `context` positions in `pages` pages of each kind.

    Raises StarError where they are none.
    """
    numbers = words.view(np.int32)
    if len(numbers) < _HEAD or (numbers[:_HEAD] < 0).any():
        raise StarError("rank 0 sent a step whose rows make no sense")
    n, sequences, *widths = numbers[:_HEAD].tolist()
    sizes = [n, n, *(sequences * width for width in widths)]
    more = numbers[_HEAD + sum(sizes) :]
    if len(numbers) < _HEAD + sum(sizes) or len(more) >= 2 * PADDED_WORDS or more.any():
        raise StarError(f"rank 0 sent a step of {n} rows and {sequences} sequences in {len(words)} words")
    sequence, position, *tables = np.split(numbers[_HEAD : _HEAD + sum(sizes)], np.cumsum(sizes)[:-1])
    rows = StepRows(
        sequence.copy(),
        position.copy(),
        tuple(table.reshape(sequences, width) for table, width in zip(tables, widths, strict=True)),
    )
    _check(rows, pages, context)
    return rows


def _check(rows: StepRows, pages: Sequence[int], context: int) -> None:
    """Every row must be of a sequence that is there, within the context, on a page that is there."""
    sequence, position = rows.sequence, rows.position
    sequences = len(rows.tables[0])
    if ((sequence < 0) | (sequence >= sequences) | (position < 0) | (position >= context)).any():
        raise StarError("rank 0 asks for a row of a sequence or position outside those that it announced")
    for table, count in zip(rows.tables, pages, strict=True):
        if ((table < -1) | (table >= count)).any() or (position // PAGE >= table.shape[1]).any():
            raise StarError(f"rank 0 asks for a page that is not there; there are {count}")
        if (table[sequence, position // PAGE] < 0).any():
            raise StarError("rank 0 asks for a row that has no page")
