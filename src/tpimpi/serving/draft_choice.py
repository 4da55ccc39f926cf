"""Whether a draft model drafts in a run, and how many tokens: as makes most tokens a second by what was measured, none too.

What is compared: a pass of one row, with one of 1 + n rows and the n tokens that the draft model is to say before it; for
several sequences at once, a pass of a row of each, with one that has n more of each, and the n passes of the draft model
over a row of each. Where all of the model stays in memory, both are measured beside each other.

Where tiles are streamed, the memory of the draft model is taken from them, so that each pass reads more, its own tokens or
not: to be off it has to go. So such a run begins without it; passes of one row are timed; the draft model is loaded and
tried; and unless it makes more tokens a second than those passes did, it goes again and its memory holds tiles. It is tried
again after so many passes, twice as many each time, and so that trials, with the loading and the reading of the text that
they begin with, take a small part of the time: disks, other programs and texts change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.speculation import DraftedPass, Drafter

if TYPE_CHECKING:  # most runs have none for several sequences
    from tpimpi.serving.draft_model import BatchedDraftModel
    from tpimpi.serving.scheduler import Request

_MIN_TIMED = 3  # passes of one row, before a draft is thought of: the middle one counts
_MIN_TIMED_AWAY = 5  # the same where the draft model is then loaded, after which they cannot be timed again
_TRIAL = 2  # tokens of a draft that is tried
_TRIED = (
    3  # drafts of a trial, where the draft model was loaded for it, before it is judged: the first waits for the disk
)
_DOUBTS = 4  # judgements in a row after which it goes
_FIRST_PAUSE, _LAST_PAUSE = 4, 1024  # passes until the next trial
_FIRST_PAUSE_AWAY = 64  # the same where it has to be loaded, and reads the whole sequence anew
_TRIAL_SHARE = 0.02  # of the time, at most, is for trials that come to nothing
_FIRST_ROW_OF_DRAFTS, _LAST_ROW_OF_DRAFTS = 8, 64  # drafts, after which a pass of one row is timed again


class Lent(Protocol):
    """A draft model that takes memory from the model that it drafts for, from `load` until `unload`."""

    def load(self) -> None: ...

    def unload(self) -> None: ...


class Drafting(Lent, Protocol):
    """A draft model for one sequence after the other. `leaves` says whether its memory is lent."""

    @property
    def leaves(self) -> bool: ...

    def seconds(self, sequences: int) -> float: ...  # of a token for each of so many; 0 where that is not known yet

    def begin(self, context: int) -> None: ...  # another sequence, of at most so many positions

    def room(self, length: int) -> int: ...  # how many tokens it can draft behind so many

    def propose(self, ids: Sequence[int], most: int) -> list[int]: ...

    def close(self) -> None: ...


class DraftChoice:
    """How many tokens a draft model drafts for each pass of a run."""

    def __init__(
        self,
        drafting: Callable[[int], float],
        times: PassTimes,
        lent: Lent | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drafting` says what a token for each of so many sequences takes, in seconds, 0 where that is not known yet;
        `times` are those of the run's passes, `clock` gives seconds. A model that is `lent` memory has to be loaded."""
        self._drafting, self._times, self._lent, self._clock = drafting, times, lent, clock
        self._on = False
        self._alone = math.inf  # seconds of a pass of one row while the draft model was away
        self._to_try, self._doubts = 0, 0  # drafts of a trial; judgements in a row that it does not pay
        self._tried = 0  # drafts of this trial so far
        self._spent = 0.0  # seconds of this trial so far, but for its passes: loading, reading the text, and drafting
        self._waited, self._pause = 0, 1  # passes without it; after so many it is tried
        self._next_pause = _FIRST_PAUSE_AWAY if lent else _FIRST_PAUSE
        self._in_row, self._row = 0, _FIRST_ROW_OF_DRAFTS

    def length(self, of: DraftedPass, most: int, otherwise: float = 0.0) -> int:
        """How many tokens it is to draft for each sequence of the next pass, at most `most`, which is 1 at least.

        0 where none are worth their time, or another draft gives `otherwise` tokens a second, which is more."""
        if not (self._on or self._begin(of)):
            return 0
        if self._to_try or self._times.max_rows <= of.rows(0):
            self._to_try = max(0, self._to_try - 1)
            return self._try(most)
        seconds = partial(self._seconds, of)
        tried = max(1, (2 * self._times.max_rows + 1) // len(of.rates))  # twice the rows that were tried
        found = of.best_length(seconds, min(most, tried), than=of.tokens(0) / self._without(of))
        if not found:
            return self._doubt(of, most)
        self._doubts, self._tried, self._spent = 0, 0, 0.0
        if not self._lent:
            self._next_pause = _FIRST_PAUSE
        if otherwise >= of.tokens(found) / seconds(found):
            return 0
        self._in_row += 1
        if self._in_row > self._row:  # what a pass of one row takes may have changed
            self._in_row, self._row = 0, min(2 * self._row, _LAST_ROW_OF_DRAFTS)
            return 0
        return found

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What is done inside is for drafts."""
        began = self._clock()
        yield
        self._spent += self._clock() - began

    def try_again(self) -> None:
        """There was no draft yet, as the text is still read."""
        self._to_try += 1

    def leave(self) -> None:
        """There will be no drafts for a while, so that tiles may have its memory."""
        if self._on and self._lent:
            self._pause = self._next_pause
            self._end()

    def _seconds(self, of: DraftedPass, drafted: int) -> float:
        """Of a pass with so many tokens drafted for each, and of drafting them."""
        return self._times.seconds(of.rows(drafted)) + drafted * self._drafting(len(of.rates))

    def _without(self, of: DraftedPass) -> float:
        """Seconds of a pass without a draft, without the draft model where it can go."""
        rows = of.rows(0)
        if not self._lent:
            return self._times.seconds(rows)
        return min(self._alone, self._times.seconds(rows) if self._times.count(rows) else math.inf)

    def _begin(self, of: DraftedPass) -> bool:
        """Whether it drafts from now on, once passes without a draft are timed, and after a pause."""
        if self._times.count(of.rows(0)) < (_MIN_TIMED_AWAY if self._lent else _MIN_TIMED):
            return False
        self._waited += 1
        if self._waited < self._pause:
            return False
        self._on, self._doubts = True, 0
        self._to_try = 0 if self._pause == 1 else 1
        if self._lent:
            self._alone, self._to_try = self._times.seconds(of.rows(0)), _TRIED
            with self.spending():
                self._lent.load()
            self._times.clear()
        return True

    def _try(self, most: int) -> int:
        """How many tokens a draft has that is to show what it costs: in turn _TRIAL and one less, as it may be that fewer
        pay and more do not."""
        self._tried += 1
        return min(most, _TRIAL - (self._tried + 1) % 2)

    def _doubt(self, of: DraftedPass, most: int) -> int:
        """It does not pay, it seems: a few drafts more where it would have to be loaded again, else it is off."""
        self._doubts += 1
        if self._lent and self._doubts < _DOUBTS:
            return self._try(most)
        spent = self._spent + self._tried * self._times.seconds(of.rows(_TRIAL))
        self._pause = max(self._next_pause, math.ceil(spent / (_TRIAL_SHARE * self._without(of))))
        self._next_pause = max(self._pause, min(2 * self._pause, _LAST_PAUSE))
        self._end()
        return 0

    def _end(self) -> None:
        """It is off, until there were passes enough without it."""
        self._on, self._waited, self._tried, self._spent = False, 0, 0, 0.0
        if self._lent:
            self._lent.unload()
            self._times.clear()


class ModelDrafts:
    """The drafts of a model, for one sequence after the other; the choice is of the run. `times` are those of its passes,
    `clock` gives seconds."""

    def __init__(self, model: Drafting, times: PassTimes, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._choice = DraftChoice(model.seconds, times, model if model.leaves else None, clock)

    def length(self, rate: float, most: int, otherwise: float = 0.0, behind: int = 0) -> int:
        """How many tokens it is to draft for the next pass, at most `most` and `behind` so many of the sequence, if each is
        right with probability `rate`; see DraftChoice."""
        if most < 1:
            return 0
        most = min(most, self._model.room(behind))
        if most < 1:  # nor will there be any for this sequence: it is longer than what the model can read
            self._choice.leave()
            return 0
        return self._choice.length(DraftedPass((rate,), (most,)), most, otherwise)

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that follow `ids`."""
        with self._choice.spending():
            return self._model.propose(ids, most)

    def begin(self, context: int) -> None:
        """Another sequence, of at most so many positions."""
        self._model.begin(context)

    def close(self) -> None:
        self._model.close()


class BatchDrafts:
    """The drafts of a model for all sequences of a step, of as many tokens for each; the choice is of the run."""

    def __init__(self, model: BatchedDraftModel, times: PassTimes, longest: int, *, always: bool) -> None:
        """`longest` is how many tokens for each at most; with `always` so many, whatever that costs. `times` are those of
        the run's passes."""
        self._model, self._times, self._longest, self._always = model, times, longest, always
        self._choice = DraftChoice(model.seconds, times)

    def propose(self, drafters: Mapping[Request, Drafter], room: int) -> dict[Request, list[int]]:
        """What the model drafts for the answers of the next step, these, of which all have room for `room` drafted tokens.

        Nothing for those of which the text knows more or the model cannot read as much, and for all where that would not
        pay. What it holds of others is given up."""
        readable = {one: behind for one in drafters if (behind := self._model.room(len(one.ids)))}
        self._model.keep(readable)
        each = min(self._longest, room // max(1, len(drafters)))
        rooms = {
            one: min(each, behind, one.most - len(one.ids) - 1)
            for one, behind in readable.items()
            if drafters[one].wants_model
        }
        rooms = {one: most for one, most in rooms.items() if most > 0}
        length = each if self._always else self._length(drafters, rooms, each)
        if not rooms or not length:
            return {}
        with self._choice.spending():
            found = self._model.propose({one: (one.ids, min(length, most)) for one, most in rooms.items()})
        if not found:
            self._choice.try_again()
        return found

    def forget(self, one: Request) -> None:
        """It has ended."""
        self._model.forget(one)

    def close(self) -> None:
        self._model.close()

    def _length(self, drafters: Mapping[Request, Drafter], rooms: Mapping[Request, int], each: int) -> int:
        """How many tokens the model is to draft for each of those that have room, where those of the text do not give
        more."""
        if not rooms:
            return 0
        others, otherwise = len(drafters) - len(rooms), 0.0
        texts = [drafters[one].from_text for one in rooms]
        lengths = [min(most, there) for most, (_, there) in zip(rooms.values(), texts, strict=True)]
        of_text = DraftedPass([rate for rate, _ in texts], lengths, others)
        if any(lengths) and self._times.count(of_text.rows(0)):

            def seconds(drafted: int) -> float:
                return self._times.seconds(of_text.rows(drafted))

            if length := of_text.best_length(seconds, max(lengths)):
                otherwise = of_text.tokens(length) / seconds(length)
        of_model = DraftedPass([drafters[one].rate_of_model for one in rooms], list(rooms.values()), others)
        return self._choice.length(of_model, each, otherwise)
