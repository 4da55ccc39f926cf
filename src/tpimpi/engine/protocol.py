"""The steps of a run after its start: what rank 0 asks for, and how the other ranks follow.

A step begins with a header, int64 [5] over the star: magic, operation, positions, start, routing_hash. In the same message
follow the words of PAGES (pages of each kind, and units), of STEP and PROMPT_STEP (rows, see batch), of RELEASE (pages), of
AUDIT (sum and row). Then come hidden vectors, f32 [positions, hidden], after FORWARD, PROMPT, STEP and PROMPT_STEP; notes
after KEEP and TAKE (see keep_pages), and of every rank after LIVE; after AUDIT a row, which every rank answers (see audit).
Prompt, token ids and text are in none of them.

`routing_hash` is of the experts that rank 0 has chosen so far in a mixture of experts. Ranks that chose others would add
parts of different experts, and make nonsense that looks like text: so every rank compares, before each step, and the run
ends where they differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.engine.batch import PADDED_WORDS, pack_rows, unpack_rows
from tpimpi.engine.figures import LiveFigures
from tpimpi.engine.keep_pages import SequenceFile, keep, receive_which, take
from tpimpi.engine.model import Model
from tpimpi.engine.notes import Live
from tpimpi.engine.page_files import PageFiles
from tpimpi.engine.watch import Watch
from tpimpi.errors import StarError
from tpimpi.models.keys import MAX_SIZE
from tpimpi.models.kv.cache import FULL, KINDS, WINDOWED, StepRows
from tpimpi.models.kv.pages import PageAllocator
from tpimpi.star import Star, Words
from tpimpi.star.control import gather_notes, send_note

MAGIC = 0x7470696D7069  # "tpimpi": a header that was damaged, or is of another program, does not begin with it
HEADER_WORDS = 5
NO_WORDS: Words = np.empty(0, np.int64)
MAX_PAGES = 1 << 24  # of a kind: far more than any memory holds


class Operation(IntEnum):
    """What every rank is to do next."""

    BEGIN = 1  # a sequence of at most `positions`, of which `start` are those of the sequence before
    FORWARD = 2  # `positions` hidden vectors through all layers, from position `start` on
    FINISH = 3  # the run is over
    PAGES = 4  # pages for sequences of at most `positions`; words say how many of each kind, and of all
    STEP = 5  # `positions` rows, which words describe, and their hidden vectors, through all layers
    RELEASE = 6  # memory of pages is given back: of the words the first `positions` are pages of full layers
    KEEP = 7  # pages of a sequence are to be written to a file; notes follow
    TAKE = 8  # pages of a sequence are to be read from a file; notes follow
    LIVE = 9  # every rank says how it is, in a note
    PROMPT = 10  # as FORWARD, of a prompt: over sealed links its messages are padded
    PROMPT_STEP = 11  # as STEP, with rows of a prompt among them
    AUDIT = 12  # one row of a sum is to be computed again: words say which, and the row follows (see audit)


@dataclass(frozen=True)
class StepHeader:
    """What rank 0 tells every rank before each step."""

    operation: Operation
    positions: int = 0
    start: int = 0
    routing_hash: int = 0

    def pack(self) -> Words:
        """The words on the wire: int64 [HEADER_WORDS]."""
        return np.array([MAGIC, self.operation, self.positions, self.start, self.routing_hash], np.int64)

    @classmethod
    def unpack(cls, words: Words) -> StepHeader:
        """The header that these words are. Raises StarError where they are none."""
        magic, operation, positions, start, routing_hash = words.tolist()
        sizes = 0 <= positions <= MAX_SIZE and 0 <= start <= MAX_SIZE
        if magic != MAGIC or operation not in iter(Operation) or not sizes:
            raise StarError(
                f"rank 0 sent the control header {magic, operation, positions, start, routing_hash}, which makes no sense"
            )
        return cls(Operation(operation), positions, start, routing_hash)


def send_header(star: Star, header: StepHeader, words: Words = NO_WORDS) -> None:
    """Rank 0: tell every rank what comes next, with the words (int64 [n]) that belong to it."""
    star.send_words(np.concatenate([header.pack(), words]) if len(words) else header.pack())


def receive_header(star: Star) -> tuple[StepHeader, Words]:
    """Other ranks: what comes next, however long rank 0 takes to say it, and its words. Raises StarError where it makes no
    sense."""
    words = star.receive_words()
    if len(words) < HEADER_WORDS:
        raise StarError(f"rank 0 sent a control header of {len(words)} words, which makes no sense")
    return StepHeader.unpack(words[:HEADER_WORDS]), words[HEADER_WORDS:]


def begin(model: Model, star: Star, context: int, keep: int = 0) -> None:
    """Rank 0: have every rank begin a sequence of at most `context` positions.

    It has the first `keep` positions of the one before, see model.can_keep."""
    send_header(star, StepHeader(Operation.BEGIN, context, keep, model.routing_hash))
    model.begin(context, keep)


def forward(model: Model, star: Star, x: F32, start: int, *, head: bool = True, prompt: bool = False) -> F32:
    """Rank 0: have every rank run `x` [n, hidden] through the layers at positions from `start`; returns [n, hidden].

    Unless `head`, no logits will be asked for. Of a `prompt` nobody on the network shall see how long it is.
    """
    operation = Operation.PROMPT if prompt else Operation.FORWARD
    send_header(star, StepHeader(operation, x.shape[0], start, model.routing_hash))
    star.pad_rows(prompt)
    star.broadcast(x)
    watch = None if model.auditor is None else model.auditor.watch(x.shape[0])
    hidden = model.forward(x, start, head=head, watch=watch)
    _audit(model, star, watch, lambda: model.rows_of_sequence(start, x.shape[0]))
    return hidden


def open_pages(model: Model, star: Star, context: int, allocator: PageAllocator) -> None:
    """Rank 0: have every rank make the pages of this allocator, for sequences of at most `context` positions each."""
    words = np.array([*allocator.places, allocator.units], np.int64)
    send_header(star, StepHeader(Operation.PAGES, context, routing_hash=model.routing_hash), words)
    model.open_pages(context, allocator.places, allocator.units)


def step(model: Model, star: Star, x: F32, rows: StepRows, *, head: bool = True, prompt: bool = False) -> F32:
    """Rank 0: have every rank run `x` [n, hidden] of these rows through the layers; returns [n, hidden].

    The pages are `open_pages`'s; see `forward` for `head` and `prompt`, which holds if any row is of a prompt.
    """
    operation = Operation.PROMPT_STEP if prompt else Operation.STEP
    words = pack_rows(rows, PADDED_WORDS if star.sealed else 1)
    send_header(star, StepHeader(operation, x.shape[0], routing_hash=model.routing_hash), words)
    star.pad_rows(prompt)
    star.broadcast(x)
    watch = None if model.auditor is None else model.auditor.watch(x.shape[0])
    hidden = model.step(x, rows, head=head, watch=watch)
    _audit(model, star, watch, lambda: rows)
    return hidden


def _audit(model: Model, star: Star, watch: Watch | None, rows: Callable[[], StepRows]) -> None:
    """Rank 0: have every rank compute again what was watched in a step of these rows, and compare. Raises AuditError."""
    if model.auditor is None:
        return
    model.auditor.stepped()
    if watch is not None:
        request = model.auditor.request(watch, rows())
        send_header(star, StepHeader(Operation.AUDIT, routing_hash=model.routing_hash), request.words())
        request.send_row(star)
        model.auditor.check(watch, request, star.gather_notes(b""))


def release_pages(model: Model, star: Star, pages: Sequence[Sequence[int]]) -> None:
    """Rank 0: have every rank give back the memory of these pages of each kind, which nobody uses."""
    words = np.array([page for of_kind in pages for page in of_kind], np.int64)
    send_header(star, StepHeader(Operation.RELEASE, len(pages[0]), routing_hash=model.routing_hash), words)
    _release(model, words, len(pages[0]))


def keep_pages(model: Model, star: Star, files: PageFiles, which: SequenceFile) -> list[str]:
    """Rank 0: have every rank write these pages to its file. What went wrong, a line a rank: then the files of some ranks
    may be new and of others as before, and are of no use."""
    send_header(star, StepHeader(Operation.KEEP, routing_hash=model.routing_hash))
    send_note(star, which)
    return keep(model, star, files, which)


def take_pages(model: Model, star: Star, files: PageFiles, which: SequenceFile) -> list[str]:
    """Rank 0: have every rank read these pages from its file. What went wrong, a line a rank: then none of them count."""
    send_header(star, StepHeader(Operation.TAKE, routing_hash=model.routing_hash))
    send_note(star, which)
    return take(model, star, files, which)


def live_figures(model: Model, star: Star, ours: LiveFigures) -> list[LiveFigures]:
    """Rank 0: every rank's figures as they are now, in rank order, between two steps."""
    send_header(star, StepHeader(Operation.LIVE, routing_hash=model.routing_hash))
    return [note.figures for note in gather_notes(star, Live(ours))]


def _release(model: Model, words: Words, full: int) -> None:
    for kind, pages in enumerate((words[:full], words[full:])):
        model.release_pages(kind, pages.tolist())


def finish(model: Model, star: Star) -> None:
    """Rank 0: tell every rank that the run is over; where there are several models, `model` is the first."""
    send_header(star, StepHeader(Operation.FINISH, routing_hash=model.routing_hash))


def follow(
    models: Sequence[Model],
    star: Star,
    files: PageFiles | None = None,
    live: Callable[[], LiveFigures] | None = None,
) -> None:
    """Other ranks: do what rank 0 says until it says that the run is over. They see hidden vectors, never ids or text.

    Where there are several models the headers are for them in turn, the first for the first. `files` is where pages may be
    kept, `live` says how this rank is. Raises StarError for a header that makes no sense, or where this rank chose other
    experts than rank 0, and what computing and reading raise.
    """
    for model in itertools.cycle(models):
        header, words = receive_header(star)
        if header.operation == Operation.FINISH and len(models) > 1:
            return  # whichever model's turn it is
        if header.routing_hash != model.routing_hash:
            raise StarError(
                "chose other experts than rank 0, so their sums would be nonsense: their kernels or slices "
                "are not the same, or a computer's memory is bad; install the same tpimpi everywhere (tpimpi doctor), make "
                "the slices again"
            )
        if header.operation == Operation.FINISH:
            return
        if header.operation == Operation.LIVE:
            if live is None:
                raise StarError("rank 0 asks for figures, and there are to be none")
            gather_notes(star, Live(live()))
        elif header.operation in (Operation.KEEP, Operation.TAKE):
            _keep_or_take(model, star, files, header)
        else:
            _follow_one(model, star, header, words)


def _keep_or_take(model: Model, star: Star, files: PageFiles | None, header: StepHeader) -> None:
    which = receive_which(model, star)
    if files is None:
        raise StarError("rank 0 asks for a file of keys and values, and there is to be none")
    (keep if header.operation == Operation.KEEP else take)(model, star, files, which)


def _follow_one(model: Model, star: Star, header: StepHeader, words: Words) -> None:
    """Do what one header says, with its words. Raises StarError where it makes no sense."""
    batched = header.operation in (Operation.STEP, Operation.PROMPT_STEP)
    if len(words) and not (batched or header.operation in (Operation.PAGES, Operation.RELEASE, Operation.AUDIT)):
        raise StarError(f"rank 0 sent {len(words)} words with a header that has none")
    if header.operation == Operation.BEGIN:
        if not model.can_keep(header.start, header.positions):
            raise StarError(f"rank 0 keeps {header.start} positions of a sequence, which are not all there")
        model.begin(header.positions, header.start)
        return
    if header.operation == Operation.PAGES:
        if len(words) != len(KINDS) + 1 or (words < 0).any() or (words[:-1] > MAX_PAGES).any():
            raise StarError(f"rank 0 asks for {words[:8].tolist()} pages, which makes no sense")
        *pages, units = words.tolist()
        model.open_pages(header.positions, pages, units)
        return
    if model.cache is None:
        raise StarError("rank 0 asks for a step before it said how much a cache must hold")
    if header.operation == Operation.RELEASE:
        _check_pages(words[: header.positions], model.cache.pages[FULL])
        _check_pages(words[header.positions :], model.cache.pages[WINDOWED])
        _release(model, words, header.positions)
        return
    if header.operation == Operation.AUDIT:
        from tpimpi.engine.audit import answer, receive_request  # which a run without audits does without

        star.gather_notes(answer(model, receive_request(model, star, words)).tobytes())
        return
    star.pad_rows(header.operation in (Operation.PROMPT, Operation.PROMPT_STEP))
    if batched:
        rows = unpack_rows(words, model.cache.pages, model.context)
        if len(rows.sequence) != header.positions:
            raise StarError(f"rank 0 sent a step of {header.positions} rows, and {len(rows.sequence)} in its words")
        x = np.empty((header.positions, model.config.hidden), np.float32)
        star.broadcast(x)
        model.step(x, rows)
        return
    last = header.start + header.positions
    if last > model.context or not model.has_one_sequence:
        raise StarError(f"rank 0 asks for position {last}, which is outside the context it announced")
    x = np.empty((header.positions, model.config.hidden), np.float32)
    star.broadcast(x)
    model.forward(x, header.start)


def _check_pages(pages: Words, count: int) -> None:
    if ((pages < 0) | (pages >= count)).any():
        raise StarError(f"rank 0 gives back a page that is not there; there are {count}")
