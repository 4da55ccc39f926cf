"""Speculation, on rank 0: drafts of the next tokens, which one pass checks all at once. It changes no token.

A pass over the last token and k drafted ones gives the logits of k + 1 positions. The sampler goes through them in order,
with the history and the random stream that it would have had one token a pass; as long as it draws what was drafted, the
next row is that of the sequence, and it goes on. The first other token is the answer's next one, and the rows behind it are
taken back. This is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192) with a draft q that puts all its
probability on one token x: that accepts x with probability min(1, p(x) / q(x)) = p(x), the target's own, and draws otherwise
from max(0, p - q), normalized, which is p without x. To draw from p and compare is the same, at every temperature; and the
draws are those of a run without drafts, so that a seed gives the same answer.

That is to the bit where a row's logits do not depend on the rows beside it, as with our kernels. The torch backend adds in
another order for several rows: there a near-tie may go the other way, and since times decide about drafts, not in every run.

Drafts are from the text itself: what followed the longest suffix of prompt and answer that was there before (prompt
lookup); or where that was short, from a small model, if there is one (draft_model.py) and it pays (draft_choice.py). How
long they are is a matter of time alone: see `DraftedPass.best_length`.
"""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tpimpi.compute.arrays import F32
from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.sampling import Sampler

if TYPE_CHECKING:  # most runs have none
    from tpimpi.serving.draft_choice import ModelDrafts

# How often what followed a suffix is right, by its length in tokens, in texts and code (python -m bench.studies.speculation
# --suffixes): 1: 13 to 19 %, 2: a quarter to a third, 3 and 4: 34 to 63 %, 5 to 8: 47 to 76 %, more: about 80 %.
SHORTEST_SUFFIX = 2  # tokens
_CLASSES = (3, 5, 9)  # tokens of a suffix from which on another rate of acceptance counts
_PRIOR_RATES = (0.25, 0.45, 0.6, 0.8, 0.6)  # of each class, and of a draft model
_LONG_SUFFIX = 5  # tokens from which on what followed is better than what a draft model says, and costs nothing
_INDEXED = (
    6,
    SHORTEST_SUFFIX,
)  # tokens of the suffixes that are in tables: a pair may be there too often to look at all
_SLOTS = 1 << 15  # of a table
_MAX_COMPARED = 32  # tokens of a suffix, and places where it may have been
_PRIOR_WEIGHT = 4.0  # tokens that the prior counts for
_HALF_LIFE = 32.0  # tokens after which one that was compared counts for half
MAX_RATE = 0.98
_MIN_TIMED = 2  # passes of one row, before a draft is thought of
_MIN_GAIN = 1.03  # of tokens a second
_FIRST_TRIAL, _LAST_TRIAL = 4, 1024  # passes with a draft that was not worth its time, after which one is tried


class _Places:
    """Where suffixes of `size` tokens have been: a slot of a table has the place where the last of its suffixes ended, and
    `before` for each place the one before it in the same slot, so that nothing is ever searched but these."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._last = array("i", [-1]) * _SLOTS
        self._before = array("i")

    def add(self, ids: array[int]) -> None:
        """`ids` have one token more."""
        place, before = len(ids) - 1, -1
        if len(ids) >= self.size:
            slot = hash(tuple(ids[-self.size :])) % _SLOTS
            before, self._last[slot] = self._last[slot], place
        self._before.append(before)

    def before(self) -> Iterator[int]:
        """Where the last suffix may have ended before, from the end on, at most _MAX_COMPARED places."""
        place = self._before[-1] if self._before else -1
        for _ in range(_MAX_COMPARED):
            if place < 0:
                return
            yield place
            place = self._before[place]


class TextDrafts:
    """What may follow a sequence, from its own text. 12 bytes of memory a token, and 256 KiB."""

    def __init__(self, ids: Iterable[int] = ()) -> None:
        self._ids = array("i")
        self._places = [_Places(size) for size in _INDEXED]
        self._place = (
            -1
        )  # where the longest suffix of the text was before: the place of its last token, -1 if not known
        self.matched = 0  # tokens of it
        self.add(ids)

    def add(self, ids: Iterable[int]) -> None:
        """The sequence goes on with `ids`."""
        for token in ids:
            goes_on = self._place >= 0 and self._ids[self._place + 1] == token
            self._ids.append(token)
            # A suffix that is one token longer has no other place, or another as good.
            self._place, self.matched = (self._place + 1, self.matched + 1) if goes_on else (-1, 0)
            for places in self._places:
                places.add(self._ids)

    def propose(self, most: int) -> list[int]:
        """At most so many tokens: what followed the longest suffix of the text that was there before, where it was last.

        At the end of the text it goes on with itself, as a text does that repeats. Empty where not even the last
        SHORTEST_SUFFIX tokens were there before; `matched` is how many were.
        """
        if self._place < 0:
            self._find()
        if self._place < 0:
            return []
        found = list(self._ids[self._place + 1 : self._place + 1 + most])
        period = len(self._ids) - 1 - self._place
        while len(found) < most:
            found.append(found[len(found) - period])
        return found

    def _find(self) -> None:
        """The place where the longest suffix was before, among those that the tables give."""
        for places in self._places:
            for place in places.before():
                length = self._common(place)
                if length >= places.size and length > self.matched:
                    self._place, self.matched = place, length
            if self.matched:
                return

    def _common(self, place: int) -> int:
        """How many tokens up to `place` are the last ones of the text, as far as it matters."""
        ids, last = self._ids, len(self._ids) - 1
        most = min(_MAX_COMPARED, place + 1)
        return next((i for i in range(most) if ids[place - i] != ids[last - i]), most)


def expected_tokens(rate: float, drafted: int) -> float:
    """Tokens that a pass gives with so many drafted, each right with probability `rate` if those before it are."""
    rate = min(rate, MAX_RATE)
    return float((1 - rate ** (drafted + 1)) / (1 - rate))


@dataclass(frozen=True)
class DraftedPass:
    """A pass over the last token of each of several sequences, and over drafts of as many tokens for each.

    Of sequence i a drafted token is right with probability `rates[i]` if those before it are, and no more than `rooms[i]`
    are drafted; for `others` none."""

    rates: Sequence[float]
    rooms: Sequence[int]
    others: int = 0

    def rows(self, drafted: int) -> int:
        """Rows with so many tokens drafted for each."""
        return self.others + len(self.rooms) + sum([min(drafted, room) for room in self.rooms])

    def tokens(self, drafted: int) -> float:
        """Tokens that it gives then."""
        lengths = [min(drafted, room) for room in self.rooms]
        return self.others + sum(map(expected_tokens, self.rates, lengths))

    def best_length(self, seconds: Callable[[int], float], most: int, *, than: float | None = None) -> int:
        """How many tokens to draft for each, 0 to `most`, for most tokens a second; `seconds(n)` is what n take.

        0 unless another is better by _MIN_GAIN at least, than `than` tokens a second, or those without a draft.
        """
        best, speed = 0, _MIN_GAIN * (self.tokens(0) / seconds(0) if than is None else than)
        for drafted in range(1, most + 1):
            if (found := self.tokens(drafted) / seconds(drafted)) > speed:
                best, speed = drafted, found
        return best


def best_length(rate: float, seconds: Callable[[int], float], most: int) -> int:
    """How many tokens to draft for one sequence, 0 to `most`, for most tokens a second; `seconds(n)` is what a pass takes
    over n rows. 0 unless another is better by _MIN_GAIN at least than a pass of one row."""
    return DraftedPass((rate,), (most,)).best_length(lambda drafted: seconds(1 + drafted), most)


class Acceptance:
    """How often what is drafted is right, by how long the suffix was that it followed, or of the draft model (None); what
    was long ago counts for less."""

    def __init__(self) -> None:
        self._right = [rate * _PRIOR_WEIGHT for rate in _PRIOR_RATES]
        self._compared = [_PRIOR_WEIGHT] * len(_PRIOR_RATES)

    def rate(self, matched: int | None) -> float:
        """Of drafts after a suffix of so many tokens."""
        of = _class_of(matched)
        return self._right[of] / self._compared[of]

    def add(self, matched: int | None, right: int, compared: int) -> None:
        """Of `compared` tokens of such a draft, so many were right."""
        of, kept = _class_of(matched), 0.5 ** (compared / _HALF_LIFE)
        self._right[of] = self._right[of] * kept + right
        self._compared[of] = self._compared[of] * kept + compared


def _class_of(matched: int | None) -> int:
    return len(_CLASSES) + 1 if matched is None else bisect.bisect_right(_CLASSES, matched)


class Drafter:
    """Drafts for one sequence: which tokens, and how many of them."""

    def __init__(
        self,
        ids: Sequence[int],
        times: PassTimes,
        longest: int,
        *,
        always: bool = False,
        model: ModelDrafts | None = None,
    ) -> None:
        """For a sequence that begins with `ids`. `longest` is how many tokens at most; with `always` all of them, whatever
        that costs. `times` are those of the run; a draft `model` has begun this sequence."""
        self._text, self._times, self._longest, self._always = TextDrafts(ids), times, longest, always
        self._model, self._ids = model, [] if model is None else list(ids)
        self._acceptance = Acceptance()
        self._whole: list[int] | None = None  # the draft from the text, before it was cut; None: it is yet to be found
        self._matched = 0
        self._of_model: list[int] = []  # the model's
        self._passes_off, self._trial = 0, _FIRST_TRIAL

    def propose(self, most: int, *, others: int = 0, of_model: Sequence[int] = ()) -> list[int]:
        """The draft to check in the next pass, at most `most` tokens; [] for none. The pass has so many rows of `others`.

        `of_model` is what a model drafted that does so for several sequences, if one `wants_model`: it goes before the
        text's."""
        whole, self._of_model = self._from_text(), []
        most = max(0, min(most, self._longest))
        if self._model is not None and self.wants_model and most:
            length = most if self._always else self._length_of_model(self._model, most)
            self._of_model = self._model.propose(self._ids, length) if length else []
        elif of_model:
            self._of_model = list(of_model[:most])
        if self._of_model:
            return self._of_model
        most = min(most, len(whole))
        if self._always or not most:
            return whole[:most]
        return whole[: self._length(most, others)]

    @property
    def wants_model(self) -> bool:
        """Whether a draft model may know better than the text what follows."""
        self._from_text()
        return self._matched < _LONG_SUFFIX

    @property
    def rate_of_model(self) -> float:
        """How often a token of a draft model is right."""
        return self._acceptance.rate(None)

    @property
    def from_text(self) -> tuple[float, int]:
        """How often a token from the text is right, and how many it has now."""
        whole = self._from_text()
        return self._acceptance.rate(self._matched), len(whole)

    def _from_text(self) -> list[int]:
        """The draft from the text, before it is cut."""
        if self._whole is None:
            self._whole = self._text.propose(self._longest)
            self._matched = self._text.matched
        return self._whole

    def _length_of_model(self, model: ModelDrafts, most: int) -> int:
        """How many tokens the model is to draft, where those of the text do not give more."""
        (rate, text), times = self.from_text, self._times
        otherwise = 0.0
        if text and times.count(1) and (length := best_length(rate, times.seconds, min(most, text))):
            otherwise = expected_tokens(rate, length) / times.seconds(1 + length)
        return model.length(self.rate_of_model, most, otherwise, len(self._ids))

    def _length(self, most: int, others: int) -> int:
        """How many tokens from the text are worth their time."""
        if self._times.count(1 + others) < _MIN_TIMED:
            return 0

        def seconds(rows: int) -> float:
            return self._times.seconds(others + rows)

        rate = self._acceptance.rate(self._matched)
        most = min(most, 2 * self._times.max_rows + 1)  # twice the rows that were tried
        if length := best_length(rate, seconds, most):
            self._passes_off, self._trial = 0, _FIRST_TRIAL
            return length
        self._passes_off += 1
        if self._passes_off < self._trial:
            return 0
        # What passes take may have changed: another disk, other programs. About as many tokens as would be right.
        self._passes_off, self._trial = 0, min(2 * self._trial, _LAST_TRIAL)
        return max(1, min(most, round(rate / (1 - min(rate, MAX_RATE)))))

    def add(self, ids: Sequence[int]) -> None:
        """The sequence went on with `ids`. What was drafted is compared whether it was checked or not, so that a draft that
        was too dear is known to be good."""
        for matched, draft in ((self._matched, self._whole or []), (None, self._of_model)):
            if compared := min(len(draft), len(ids)):
                right = next((i for i in range(compared) if draft[i] != ids[i]), compared)
                self._acceptance.add(matched, right, min(right + 1, compared))
        self._whole, self._of_model = None, []
        self._text.add(ids)
        if self._model is not None:
            self._ids += ids


@dataclass
class Speculation:
    """How a run speculates: `longest` is how many tokens it drafts at most, 0 for none; `always`: whatever that costs."""

    longest: int = 0
    always: bool = False
    times: PassTimes = field(default_factory=PassTimes)
    model: ModelDrafts | None = None

    def drafter(self, ids: Sequence[int], context: int = 0) -> Drafter | None:
        """For a sequence that begins with `ids`; None where nothing is drafted. The model, if there is one, is for one
        sequence at a time, of at most `context` positions."""
        if not self.longest:
            return None
        if self.model is not None:
            self.model.begin(context)
        return Drafter(ids, self.times, self.longest, always=self.always, model=self.model)


def checked(logits: F32, draft: Sequence[int], sample: Sampler, history: list[int]) -> Iterator[int]:
    """The tokens that a pass over the last token and a draft gives, one at least: each is appended to `history` when it is
    drawn.

    logits [1 + len(draft), vocab]. All but the last are the draft's; it is drawn from the target's distribution in any case.
    """
    for row, drafted in zip(logits, (*draft, None), strict=True):
        token = sample(row, history)
        history.append(token)
        yield token
        if token != drafted:
            return
