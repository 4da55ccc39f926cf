"""Whether a draft model drafts, and how many tokens, in a run whose times are arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tpimpi.serving.draft_choice import BatchDrafts, ModelDrafts
from tpimpi.serving.draft_model import BatchedDraftModel
from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.scheduler import Request
from tpimpi.serving.speculation import Drafter

LONGEST = 15


@dataclass
class Machine:
    """A pass takes `one` seconds, and `more` for each row beyond the first; `streamed` more while a draft model is loaded
    that `leaves`, which takes `each` seconds for a token of which a part `rate` is right, `loading` to load, and `reading`
    to read the text then. `loads` are the passes before which it was loaded; `now` is its clock."""

    one: float
    more: float
    streamed: float
    each: float
    rate: float
    leaves: bool = True
    loading: float = 0.0
    reading: float = 0.0
    context: int = 1 << 20
    now: float = 0.0
    fresh: bool = False  # loaded, and has read nothing
    loaded: bool = False
    passes: int = 0
    loads: list[int] = field(default_factory=list)

    def seconds(self, sequences: int) -> float:
        return self.each

    def begin(self, context: int) -> None: ...

    def close(self) -> None: ...

    def room(self, length: int) -> int:
        return max(0, self.context - length)

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        assert self.loaded or not self.leaves
        self.now += self.each * most + self.reading * self.fresh
        self.fresh = False
        return [7] * most

    def load(self) -> None:
        assert not self.loaded
        self.loaded = self.fresh = True
        self.now += self.loading
        self.loads.append(self.passes)

    def unload(self) -> None:
        assert self.loaded
        self.loaded = False

    def round(self, drafted: int) -> tuple[float, float]:
        """With so many drafted tokens: seconds of the pass, and tokens."""
        tokens = sum(self.rate**n for n in range(drafted + 1))
        return self.one + self.more * drafted + self.streamed * self.loaded, tokens

    def choice(self, times: PassTimes) -> ModelDrafts:
        return ModelDrafts(self, times, lambda: self.now)

    def best(self) -> float:
        """Tokens a second of the best that there is: without the model, or with it and always the same number of tokens."""
        found = [1 / self.one]
        for drafted in range(1, LONGEST + 1):
            seconds = self.one + self.more * drafted + self.streamed * self.leaves + self.each * drafted
            found.append(sum(self.rate**n for n in range(drafted + 1)) / seconds)
        return max(found)

    def run(self, choice: ModelDrafts, times: PassTimes, passes: int) -> tuple[float, list[int]]:
        """Tokens a second of so many passes, and how many tokens were drafted for each."""
        began, made = self.now, 0.0
        lengths = []
        for _ in range(passes):
            self.passes += 1
            drafted = choice.length(self.rate, LONGEST)
            assert 0 <= drafted <= LONGEST
            if drafted:
                choice.propose([1], drafted)
            seconds, tokens = self.round(drafted)
            times.add(1 + drafted, seconds)
            self.now, made = self.now + seconds, made + tokens
            lengths.append(drafted)
        return made / (self.now - began), lengths


MACHINES = st.builds(
    Machine,
    one=st.floats(0.5, 2),
    more=st.sampled_from([0.0, 0.01, 0.2, 0.9]),
    streamed=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    each=st.sampled_from([0.001, 0.05, 0.2, 1.0]),
    rate=st.sampled_from([0.0, 0.2, 0.6, 0.9]),
    leaves=st.booleans(),
    loading=st.sampled_from([0.0, 2.0]),
    reading=st.sampled_from([0.0, 2.0]),
)


@example(machine=Machine(one=1.9375, more=0.9, streamed=0.0, each=0.001, rate=0.6))  # one token pays, two do not
@examples(200)
@given(machine=MACHINES)
def test_a_run_is_about_as_fast_as_the_best_choice_would_make_it(machine: Machine) -> None:
    times = PassTimes()
    choice = machine.choice(times)
    speed, _ = machine.run(choice, times, 3000)
    assert speed > 0.9 * machine.best(), (speed, machine.best())
    # Once it has been tried, what is left are trials that are ever rarer.
    later, _ = machine.run(choice, times, 1000)
    assert later > 0.92 * machine.best(), (later, machine.best())
    assert later > 0.94 / machine.one, "slower than without"
    assert len(machine.loads) <= 8


def test_what_it_takes_from_the_tiles_counts() -> None:
    """A draft that would pay if its memory were nobody's, and does not as each pass reads more for it."""
    machine = Machine(one=1.0, more=0.0, streamed=2.0, each=0.05, rate=0.5)
    times = PassTimes()
    choice = machine.choice(times)
    _, lengths = machine.run(choice, times, 60)
    assert machine.loads == [6] and not machine.loaded
    tried = [place for place, drafted in enumerate(lengths) if drafted]
    assert tried and tried == list(range(tried[0], tried[0] + len(tried))) and len(tried) <= 7
    # The same with memory for all: it pays.
    beside = Machine(one=1.0, more=0.0, streamed=0.0, each=0.05, rate=0.5, leaves=False)
    times = PassTimes()
    _, lengths = beside.run(beside.choice(times), times, 60)
    assert sum(map(bool, lengths)) > 50 and not beside.loads


def test_trials_that_come_to_nothing_take_a_small_part_of_the_time() -> None:
    """With what it takes to load the model, and to have it read the text."""
    machine = Machine(one=1.0, more=0.0, streamed=2.0, each=0.05, rate=0.1, loading=40.0, reading=60.0)
    times = PassTimes()
    choice = machine.choice(times)
    machine.run(choice, times, 20)  # the first
    speed, _ = machine.run(choice, times, 20_000)
    assert len(machine.loads) > 2 and speed > 0.98 / machine.one, (machine.loads, speed)


def test_it_is_tried_again_and_stays_when_it_has_become_worth_it() -> None:
    machine = Machine(one=1.0, more=0.0, streamed=0.1, each=2.0, rate=0.6)
    times = PassTimes()
    choice = machine.choice(times)
    machine.run(choice, times, 50)
    assert len(machine.loads) == 1 and not machine.loaded
    machine.each = 0.01
    _, lengths = machine.run(choice, times, 2000)
    assert len(machine.loads) == 2 and machine.loaded
    assert max(lengths[-2:]) > 5  # tokens, of which 1.1 s a pass and 0.01 s each are worth
    machine.rate = 0.0  # another text
    machine.run(choice, times, 100)
    assert not machine.loaded


def test_a_slow_beginning_is_not_believed_for_ever() -> None:
    """Passes of one row were slow when they were timed; drafts that follow no longer pay, which one now and then shows."""
    machine = Machine(one=3.0, more=0.3, streamed=0.0, each=0.3, rate=0.6, leaves=False)
    times = PassTimes()
    choice = machine.choice(times)
    machine.run(choice, times, 6)
    machine.one, machine.more = 1.0, 0.9
    _, lengths = machine.run(choice, times, 300)
    assert sum(map(bool, lengths[-100:])) <= 10, lengths


def test_the_last_tokens_of_an_answer_are_no_trial() -> None:
    machine = Machine(one=1.0, more=0.0, streamed=0.1, each=0.01, rate=0.6)
    times = PassTimes()
    choice = machine.choice(times)
    for _ in range(5):
        times.add(1, 1.0)
    assert choice.length(0.6, 0) == 0 and not machine.loads
    assert choice.length(0.6, 1) == 1 and machine.loads
    assert choice.length(0.6, 9, otherwise=99.0) <= 2, "a trial is for its own sake"
    times.add(3, 1.1)
    times.add(3, 1.1)
    assert choice.length(0.6, 9) == 2
    assert choice.length(0.6, 9) > 2
    assert choice.length(0.6, 9, otherwise=99.0) == 0 and machine.loaded


def test_a_text_that_it_cannot_read_is_no_reason_to_load_it() -> None:
    """Nor to keep it: its memory is that of tiles."""
    machine = Machine(one=1.0, more=0.0, streamed=0.1, each=0.01, rate=0.9, context=100)
    times = PassTimes()
    choice = machine.choice(times)
    for _ in range(9):
        times.add(1, 1.0)
        assert choice.length(0.9, 9, behind=100) == 0
    assert not machine.loads
    assert choice.length(0.9, 9, behind=99) == 1 and machine.loaded
    assert choice.length(0.9, 0, behind=99) == 0 and machine.loaded, "the end of an answer"
    assert choice.length(0.9, 9, behind=100) == 0 and not machine.loaded
    for _ in range(9):
        times.add(1, 1.0)
        assert choice.length(0.9, 9, behind=10) == 0, "it was loaded but now"


@pytest.mark.parametrize("most", [1, 15])
def test_it_waits_for_passes_of_one_row(most: int) -> None:
    machine = Machine(one=1.0, more=0.0, streamed=0.0, each=0.01, rate=0.6, leaves=False)
    times = PassTimes()
    choice = machine.choice(times)
    assert [choice.length(0.6, most) for _ in range(3)] == [0, 0, 0]


@dataclass
class Together:
    """Several sequences: a pass takes a second, and `more` for each row beyond one of each; the draft model takes `each`
    seconds for a token of all of them, of which every `right[i]`th of sequence i is wrong, and reads the text for `reading`
    steps without a draft."""

    more: float
    each: float
    right: Sequence[int]
    reading: int = 0
    context: int = 1 << 20
    now: float = 0.0
    asked: list[list[int]] = field(default_factory=list)
    kept: Collection[Request] = ()

    def seconds(self, sequences: int) -> float:
        return 0.0 if self.reading else self.each

    def room(self, length: int) -> int:
        return max(0, self.context - length)

    def keep(self, keys: Collection[Request]) -> None:
        self.kept = list(keys)

    def propose(self, asked: Mapping[Request, tuple[Sequence[int], int]]) -> dict[Request, list[int]]:
        self.asked.append([most for _, most in asked.values()])
        if self.reading:
            self.reading -= 1
            return {}
        self.now += self.each * max(self.asked[-1])
        return {one: [len(ids) + n for n in range(most)] for one, (ids, most) in asked.items()}

    def run(self, passes: int, room: int, *, always: bool = False) -> tuple[float, int]:
        """Tokens a second of so many passes, and tokens that were drafted; the text says nothing."""
        times = PassTimes()
        drafts = BatchDrafts(cast("BatchedDraftModel", self), times, LONGEST, always=always)
        requests = [Request([0, 1, 2, 3], 1 << 30) for _ in self.right]
        drafters = {one: Drafter(one.ids, times, LONGEST, always=always) for one in requests}
        made, drafted, began = 0, 0, self.now
        for _ in range(passes):
            found = drafts.propose(drafters, room)
            rows = 0
            for one, every in zip(requests, self.right, strict=True):
                draft = drafters[one].propose(room - rows, others=len(requests) - 1 + rows, of_model=found.get(one, ()))
                rows += len(draft)
                ids = list(itertools.takewhile(lambda token, every=every: token % every, draft))
                ids.append(len(one.ids) + len(ids) if len(ids) == len(draft) else -len(one.ids))
                drafters[one].add(ids)
                one.ids += ids
                made, drafted = made + len(ids), drafted + len(draft)
            times.add(len(requests) + rows, 1 + self.more * rows)
            self.now += 1 + self.more * rows
        return made / (self.now - began), drafted


def test_many_sequences_are_drafted_for_as_long_as_all_together_gain() -> None:
    """Each in a pass of 1 s for 4 sequences: a draft is worth what it gives to all of them."""
    good, bad = 50, 2  # of one every 50th token is wrong, of the other every second
    speed, _ = Together(more=0.0, each=0.1, right=[good] * 4, reading=3).run(200, 40)
    assert speed > 0.8 * 4 * 10.5 / 2  # 10 tokens each, of which as many as 9 in 10 are right, in 1 s and 10 tenths
    for machine in (
        Together(more=0.4, each=0.01, right=[good] * 4),  # four rows more take longer than what they give
        Together(more=0.01, each=2.0, right=[good] * 4),  # the model is slow
        Together(more=0.01, each=0.8, right=[bad] * 4),  # or wrong
    ):
        speed, _ = machine.run(300, 40)
        assert speed > 0.93 * 4, machine
    # What one sequence gains is not worth what three others lose, nor the other way round.
    assert Together(more=0.0, each=0.3, right=[good, bad, bad, bad]).run(200, 40)[0] > 4
    assert Together(more=0.0, each=0.3, right=[good, good, good, bad]).run(200, 40)[0] > 1.3 * 4


def test_so_many_tokens_for_each_as_there_is_room_and_none_beyond_what_it_reads() -> None:
    machine = Together(more=0.0, each=0.1, right=[50] * 3, context=40)
    _, drafted = machine.run(60, 7, always=True)
    assert all(most <= 2 for asked in machine.asked for most in asked)  # 7 for three
    assert 30 < len(machine.asked) * 3 <= drafted <= 3 * 40
    assert machine.kept == [], "it goes on holding what it cannot read on"
