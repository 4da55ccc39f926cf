"""Whether a draft model drafts in a run, and how many tokens: as makes most tokens a second by what was measured, none too.

What is compared: a pass of one row, with one of 1 + n rows and the n tokens that the draft model is to say before it. Where
all of the model stays in memory, both are measured beside each other.

Where tiles are streamed, the memory of the draft model is taken from them, so that each pass reads more, its own tokens or
not: to be off it has to go. So such a run begins without it; passes of one row are timed; the draft model is loaded and
tried; and unless it makes more tokens a second than those passes did, it goes again and its memory holds tiles. It is tried
again after so many passes, twice as many each time, and so that trials, with the loading and the reading of the text that
they begin with, take a small part of the time: disks, other programs and texts change.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.speculation import best_length, expected_tokens

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


class Drafting(Protocol):
    """A draft model. `leaves` says whether it takes memory from the model that it drafts for, until `unload`."""

    @property
    def leaves(self) -> bool: ...

    @property
    def seconds(self) -> float: ...  # of a token that it drafts; 0 where that is not known yet

    def begin(self, context: int) -> None: ...  # another sequence, of at most so many positions

    def room(self, length: int) -> int: ...  # how many tokens it can draft behind so many

    def propose(self, ids: Sequence[int], most: int) -> list[int]: ...

    def load(self) -> None: ...

    def unload(self) -> None: ...

    def close(self) -> None: ...


class ModelDrafts:
    """The drafts of a model, for one sequence after the other; the choice is of the run. `times` are those of its passes,
    `clock` gives seconds."""

    def __init__(self, model: Drafting, times: PassTimes, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._times, self._clock = model, times, clock
        self._away = model.leaves  # whether it has to be loaded
        self._on = False
        self._alone = math.inf  # seconds of a pass of one row while the draft model was away
        self._to_try, self._doubts = 0, 0  # drafts of a trial; judgements in a row that it does not pay
        self._tried = 0  # drafts of this trial so far
        self._spent = 0.0  # seconds of this trial so far, but for its passes: loading, reading the text, and drafting
        self._waited, self._pause = 0, 1  # passes without it; after so many it is tried
        self._next_pause = _FIRST_PAUSE_AWAY if self._away else _FIRST_PAUSE
        self._in_row, self._row = 0, _FIRST_ROW_OF_DRAFTS

    def length(self, rate: float, most: int, otherwise: float = 0.0, behind: int = 0) -> int:
        """How many tokens it is to draft for the next pass, at most `most` and `behind` so many of the sequence, if each is
        right with probability `rate`.

        0 where none are worth their time, or another draft gives `otherwise` tokens a second, which is more."""
        if most < 1:
            return 0
        most = min(most, self._model.room(behind))
        if most < 1:  # nor will there be any for this sequence: it is longer than what the model can read
            if self._on and self._away:
                self._pause = self._next_pause
                self._end()
            return 0
        if not (self._on or self._begin()):
            return 0
        if self._to_try or self._times.max_rows < 2:
            self._to_try = max(0, self._to_try - 1)
            return self._try(most)
        found = best_length(rate, self._seconds, min(most, 2 * self._times.max_rows + 1), than=1 / self._one_row())
        if not found:
            return self._doubt(most)
        self._doubts, self._tried, self._spent = 0, 0, 0.0
        if not self._away:
            self._next_pause = _FIRST_PAUSE
        if otherwise >= expected_tokens(rate, found) / self._seconds(1 + found):
            return 0
        self._in_row += 1
        if self._in_row > self._row:  # what a pass of one row takes may have changed
            self._in_row, self._row = 0, min(2 * self._row, _LAST_ROW_OF_DRAFTS)
            return 0
        return found

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that follow `ids`."""
        began = self._clock()
        draft = self._model.propose(ids, most)
        self._spent += self._clock() - began
        return draft

    def begin(self, context: int) -> None:
        """Another sequence, of at most so many positions."""
        self._model.begin(context)

    def close(self) -> None:
        self._model.close()

    def _seconds(self, rows: int) -> float:
        return self._times.seconds(rows) + (rows - 1) * self._model.seconds

    def _one_row(self) -> float:
        """Seconds of a pass of one row, without the draft model where it can go."""
        if not self._away:
            return self._times.seconds(1)
        return min(self._alone, self._times.seconds(1) if self._times.count(1) else math.inf)

    def _begin(self) -> bool:
        """Whether it drafts from now on, once passes of one row are timed, and after a pause."""
        if self._times.count(1) < (_MIN_TIMED_AWAY if self._away else _MIN_TIMED):
            return False
        self._waited += 1
        if self._waited < self._pause:
            return False
        self._on, self._doubts = True, 0
        self._to_try = 0 if self._pause == 1 else 1
        if self._away:
            self._alone, self._to_try = self._times.seconds(1), _TRIED
            began = self._clock()
            self._model.load()
            self._spent += self._clock() - began
            self._times.clear()
        return True

    def _try(self, most: int) -> int:
        """How many tokens a draft has that is to show what it costs."""
        self._tried += 1
        return min(most, _TRIAL)

    def _doubt(self, most: int) -> int:
        """It does not pay, it seems: a few drafts more where it would have to be loaded again, else it is off."""
        self._doubts += 1
        if self._away and self._doubts < _DOUBTS:
            return self._try(most)
        spent = self._spent + self._tried * self._times.seconds(1 + _TRIAL)
        self._pause = max(self._next_pause, math.ceil(spent / (_TRIAL_SHARE * self._one_row())))
        self._next_pause = max(self._pause, min(2 * self._pause, _LAST_PAUSE))
        self._end()
        return 0

    def _end(self) -> None:
        """It is off, until there were passes enough without it."""
        self._on, self._waited, self._tried, self._spent = False, 0, 0, 0.0
        if self._away:
            self._model.unload()
            self._times.clear()
