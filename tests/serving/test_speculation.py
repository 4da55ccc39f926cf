"""Drafts from the text: what they are, how long, and that checking them changes no token."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.drawn import examples
from tpimpi.compute.arrays import F32
from tpimpi.engine.model import Model
from tpimpi.serving.draft_choice import Drafting, ModelDrafts
from tpimpi.serving.generate import GenerationFigures, HeldIds, generate
from tpimpi.serving.sampling import Sampler, distribution, make_sampler
from tpimpi.serving.speculation import (
    SHORTEST_SUFFIX,
    Drafter,
    PassTimes,
    Speculation,
    TextDrafts,
    best_length,
    checked,
    expected_tokens,
)
from tpimpi.star import Star

# What is drafted


def _before(text: Sequence[int], place: int) -> int:
    """How many tokens up to `place` are the last ones of the text."""
    return next((i for i in range(place + 1) if text[place - i] != text[len(text) - 1 - i]), place + 1)


def _going_on(text: list[int], place: int, most: int) -> list[int]:
    """What followed `place`, and what follows where that is added to the text."""
    grown = list(text)
    for i in range(most):
        grown.append(grown[place + 1 + i])
    return grown[len(text) :]


@examples(150)
@given(
    text=st.lists(st.integers(0, 2), max_size=30),
    most=st.integers(0, 12),
    ask=st.lists(st.booleans(), min_size=30, max_size=30),
)
def test_a_draft_is_what_followed_the_longest_suffix(text: list[int], most: int, ask: list[bool]) -> None:
    drafts = TextDrafts()
    for n, (token, asked) in enumerate(zip(text, ask, strict=False), start=1):
        drafts.add([token])
        if not asked and n < len(text):
            continue
        so_far, found = text[:n], drafts.propose(most)
        lengths = [_before(so_far, place) for place in range(n - 1)]
        longest = max(lengths, default=0)
        if longest < SHORTEST_SUFFIX:
            assert found == []
            continue
        assert drafts.matched == longest
        assert found in [_going_on(so_far, place, most) for place, length in enumerate(lengths) if length == longest]


def test_a_long_prompt_takes_little_memory_and_is_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.random.default_rng(1).integers(0, 49000, 30_000).tolist()
    ids[20_000:20_010] = ids[100:110]
    tracemalloc.start()
    drafts = TextDrafts(ids)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 900_000
    looked_at = 0
    common = drafts._common

    def counted(place: int) -> int:
        nonlocal looked_at
        looked_at += 1
        return common(place)

    monkeypatch.setattr(drafts, "_common", counted)
    drafts.add(ids[20_000:20_010])
    assert drafts.propose(3) == ids[20_010:20_013]
    drafts.add([5])
    assert drafts.propose(3) == []
    assert looked_at <= 2 * 2 * 32


# How long a draft is


def test_a_draft_is_as_long_as_pays() -> None:
    def flat(rows: int) -> float:  # bound by a disk or a link
        return 1.0

    def dear(rows: int) -> float:  # bound by a processor
        return float(rows)

    def stepped(rows: int) -> float:  # nothing more up to 5 rows, then three times as much
        return 1.0 if rows <= 5 else 3.0

    for rate in (0.1, 0.6, 0.95):
        assert best_length(rate, flat, 15) == 15
        assert best_length(rate, dear, 15) == 0
    assert best_length(0.0, flat, 15) == 0
    assert best_length(0.8, flat, 0) == 0
    assert best_length(0.8, stepped, 15) == 4
    # Half a pass more for each row, at 0.8: (1 + 0.8) / 1.5 = 1.2; (1.8 + 0.64) / 2 = 1.22; 2.952 / 2.5 = 1.18.
    assert best_length(0.8, lambda rows: 0.5 + 0.5 * rows, 15) == 2
    # A gain that is less than what times vary by is none: 1.1 / 1.09.
    assert best_length(0.1, lambda rows: 1.0 if rows == 1 else 1.09, 1) == 0
    assert expected_tokens(0.6, 3) == pytest.approx(1 + 0.6 + 0.36 + 0.216)
    assert expected_tokens(1.0, 3) == pytest.approx(4, abs=0.15)


class OtherModel:
    """A draft model that says 7 always, each in a tenth of a second."""

    leaves, seconds = False, staticmethod(lambda sequences: 0.1)

    def room(self, length: int) -> int:
        return 100 - length

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        self.ids = list(ids)
        return [7] * most


def test_a_draft_model_is_asked_where_the_text_says_little_and_its_time_counts() -> None:
    model, times = OtherModel(), _times(lambda rows: 1.0)
    drafter = Drafter([1, 2, 3, 4, 5, 6], times, 4, model=ModelDrafts(cast("Drafting", model), times))
    # At 0.6 a draft of 2 gives 1.96 tokens in 1.2 s, of 3 2.176 in 1.3 s, of 4 2.306 in 1.4 s.
    assert drafter.propose(9) == [7] * 3
    drafter.add([7, 7, 1])
    assert model.ids == [1, 2, 3, 4, 5, 6]
    drafter.propose(2)
    assert model.ids == [1, 2, 3, 4, 5, 6, 7, 7, 1]
    drafter.add([2, 3, 4, 5])
    drafter.add([6])
    assert drafter.propose(9) == [7, 7, 1, 2]  # after six tokens that were there before
    drafter = Drafter(list(range(8, 107)), times, 4, model=ModelDrafts(cast("Drafting", model), times))
    assert drafter.propose(9) == [7], "it has room for one more token"
    drafter.add([7])
    assert drafter.propose(9) == []
    model.seconds = lambda sequences: 2.0
    drafter = Drafter([1, 2, 3, 4, 5, 6], times, 4, model=ModelDrafts(cast("Drafting", model), times))
    assert drafter.propose(9) == []
    drafter.add([8])
    assert drafter.propose(0) == []
    drafter.add([1, 2])
    assert drafter.propose(9) == [3, 4, 5, 6], "where the model is off, the text is what there is"


def test_of_text_and_model_that_drafts_which_gives_more() -> None:
    """After a suffix of two tokens what followed is right at 0.25; a model at 0.6, unless it takes too long."""
    text = [1, 2, 3, 4, 5, 6, 1, 2]
    for each, found in ((0.1, [7] * 3), (0.45, [3, 4, 5, 6])):
        model, times = OtherModel(), _times(lambda rows: 1.0)
        model.seconds = lambda sequences, each=each: each
        drafter = Drafter(text, times, 4, model=ModelDrafts(cast("Drafting", model), times))
        # Four of the text: 1.332 tokens in 1 s. Of the model 3: 2.176 in 1.3 s, 1: 1.6 in 1.45 s = 1.103.
        assert drafter.propose(9) == found


def _times(seconds: Callable[[int], float]) -> PassTimes:
    times = PassTimes()
    for rows in (1, 2, 4, 8, 16):
        for _ in range(9):
            times.add(rows, seconds(rows))
    return times


def test_a_draft_beside_rows_of_others_counts_their_passes() -> None:
    """As in a batch: no pass of a single row was timed."""
    text, times = [1, 2, 3, 4, 5, 6] * 4, PassTimes()
    for _ in range(9):
        times.add(8, 1.0)
        times.add(16, 1.1)
    assert Drafter(text, times, 4).propose(9) == []
    assert Drafter(text, times, 4).propose(9, others=7) == [1, 2, 3, 4]
    for _ in range(9):
        times.add(16, 9.0)
        times.add(9, 3.0)
    assert Drafter(text, times, 4).propose(9, others=7) == []


def test_it_is_off_where_it_does_not_pay_and_tries_again_rarely() -> None:
    times = _times(float)
    drafter = Drafter([1, 2, 3, 4] * 8, times, 15)
    lengths = []
    for token in itertools.islice(itertools.cycle([1, 2, 3, 4]), 400):
        lengths.append(len(drafter.propose(50)))
        drafter.add([token])
    tried = [place for place, length in enumerate(lengths) if length]
    gaps = [later - before for before, later in itertools.pairwise([-1, *tried])]
    assert 4 <= len(tried) <= 8 and gaps[0] == 4 and all(b >= 2 * a for a, b in itertools.pairwise(gaps)), tried
    for rows in range(2, 17):  # it has become cheap, which the next trial finds
        for _ in range(9):
            times.add(rows, 1.0)
    assert len(drafter.propose(50)) == 15


def test_it_waits_for_times_and_keeps_to_what_is_left() -> None:
    times = PassTimes()
    drafter = Drafter([1, 2, 3, 4] * 8, times, 6)
    assert drafter.propose(50) == []
    times.add(1, 1.0)
    assert drafter.propose(50) == []
    times.add(1, 1.0)
    assert drafter.propose(50) == [1, 2, 3]  # what longer drafts cost nobody knows
    times.add(4, 1.0)
    assert drafter.propose(50) == [1, 2, 3, 4, 1, 2]
    assert drafter.propose(2) == [1, 2]
    assert drafter.propose(0) == []
    assert drafter.propose(-1) == []
    assert len(Drafter([1, 2, 3, 4] * 8, PassTimes(), 6, always=True).propose(50)) == 6


def test_what_is_not_checked_is_compared_too() -> None:
    """So a text that never goes on as it did is not drafted, however cheap a pass is, and one that does is, soon."""

    def dear(rows: int) -> float:  # worth it from two tokens a pass on
        return 1.0 if rows == 1 else 2.0

    text = [1, 2, 3, 4, 5, 6, 7, 8]
    right, wrong = Drafter(text * 2, _times(dear), 4), Drafter([1, 2, 3], _times(dear), 4)
    for i in range(160):
        right.propose(8)
        wrong.propose(8)
        right.add([text[i % 8]])
        wrong.add([(1, 2, 3, 100 + i)[i % 4]])
    assert len(right.propose(8)) == 4
    wrong.add([1, 2, 3])
    assert wrong.propose(8) == []


# Checking


class Twin:
    """A model whose logits are a function of the last `order` ids in its cache, which it reads there; and its star."""

    def __init__(self, vocab: int, order: int, seed: int, chunk: int) -> None:
        self.vocab, self.order, self.seed, self.chunk = vocab, order, seed, chunk
        self.config, self.routing_hash, self.recorder = SimpleNamespace(hidden=1), 0, None
        self.auditor = None
        self.cache: list[int] = []
        self.rows: list[int] = []  # of each step

    def begin(self, context: int, keep: int) -> None:
        assert keep <= len(self.cache)
        self.context = context
        del self.cache[keep:]

    def max_kept(self, context: int) -> int:
        return min(len(self.cache), context)

    def can_keep(self, positions: int, context: int) -> bool:
        return positions <= self.max_kept(context)

    def forward(self, x: F32, start: int, *, head: bool, watch: None = None) -> F32:
        assert start <= len(self.cache) and start + len(x) <= self.context
        self.cache[start:] = [int(number) for number in x[:, 0]]
        self.rows.append(len(x))
        return np.array([[self.key(self.cache[: start + i + 1])] for i in range(len(x))], np.float32)

    def key(self, ids: Sequence[int]) -> int:
        """A number for the last ids, which a float32 holds exactly."""
        key = self.seed
        for token in ids[-self.order :]:
            key = key * (self.vocab + 1) + token + 1
        return key % (1 << 24)

    def logits(self, hidden: F32) -> F32:
        drawn = [np.random.default_rng(int(key)).standard_normal(self.vocab) * 3 for key in hidden[:, 0]]
        return np.array(drawn, np.float32)

    def send_words(self, words: object) -> None: ...

    def pad_rows(self, pad: bool) -> None: ...

    def broadcast(self, x: F32) -> None: ...

    def answer(self, prompt: Sequence[int], sample: Sampler, most: int, end_ids: Sequence[int]) -> list[int]:
        """What it answers, a token at a time, without a cache."""
        ids = list(prompt)
        for _ in range(most):
            token = sample(self.logits(np.array([[self.key(ids)]], np.float32))[0], ids)
            if token in end_ids:
                break
            ids.append(token)
        return ids[len(prompt) :]

    def generate(self, prompt: Sequence[int], sample: Sampler, **options: object) -> list[int]:
        def embed(ids: Sequence[int]) -> F32:
            return np.array([[token] for token in ids], np.float32)

        most = cast("int", options["max_tokens"])
        model, star = cast("Model", self), cast("Star", self)
        tokens = generate(model, star, embed, prompt, sample, context=len(prompt) + most - 1, **options)  # type: ignore[arg-type]
        made = []
        for token in tokens:
            made.append(token)
            held = cast("HeldIds", options["held"]).ids
            assert held == self.cache[: len(held)] == [*prompt, *made][: len(held)], "held, and not there"
            assert len(held) >= len(prompt) + len(made) - 1
        return made


@examples(200)
@given(data=st.data())
def test_with_and_without_drafts_the_tokens_are_the_same(data: st.DataObject) -> None:
    draw = data.draw
    vocab = draw(st.integers(2, 6))
    twin = Twin(vocab, draw(st.integers(1, 3)), draw(st.integers(0, 1000)), draw(st.integers(1, 9)))
    longest = draw(st.integers(1, 8))
    speculation = Speculation(longest, always=draw(st.booleans()))
    if not speculation.always and draw(st.booleans()):
        speculation.times = _times(lambda rows: 1.0)
    options = {
        "temperature": draw(st.sampled_from([0.0, 0.7, 2.0])),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3])),
        "top_k": draw(st.sampled_from([0, 2])),
        "seed": draw(st.integers(0, 99)),
    }
    held, said = HeldIds(), list[int]()
    for _ in range(draw(st.integers(1, 2))):  # turns of a conversation
        words = st.lists(st.integers(0, vocab - 1), min_size=1, max_size=12)
        prompt = [*said, *draw(words) * draw(st.integers(1, 3))]
        most, end_ids = draw(st.integers(1, 40)), draw(st.lists(st.integers(0, vocab - 1), max_size=1))
        cancelled_at = draw(st.one_of(st.none(), st.integers(1, 40)))
        expected = twin.answer(prompt, make_sampler(**options), most, end_ids)  # type: ignore[arg-type]
        asked = 0

        def going_on(rows: int, start: int = len(prompt), stop: int | None = cancelled_at) -> bool:
            nonlocal asked
            asked += rows == start  # before each token but the first
            return asked != stop

        figures = GenerationFigures()
        made = twin.generate(
            prompt,
            make_sampler(**options),  # type: ignore[arg-type]
            max_tokens=most,
            end_ids=end_ids,
            held=held,
            going_on=going_on,
            speculation=speculation,
            figures=figures,
        )
        assert made == expected[: most if cancelled_at is None else cancelled_at]
        ended = len(made) < most and cancelled_at != len(made)
        assert figures.sampled == len(made) + ended
        assert figures.sampled - figures.passes in (figures.accepted, figures.accepted - 1)  # cancelled behind one
        assert figures.rows == sum(twin.rows)
        twin.rows.clear()
        said = [*prompt, *made]


def test_a_text_that_repeats_takes_fewer_passes() -> None:
    twin = Twin(5, 1, 3, 16)  # of each token the next one is always the same: it runs in a circle
    for speculation, passes in ((None, 60), (Speculation(7, always=True), 20)):
        figures = GenerationFigures()
        made = twin.generate(
            [1, 2],
            make_sampler(),
            max_tokens=60,
            end_ids=(),
            held=HeldIds(),
            speculation=speculation,
            figures=figures,
        )
        assert len(made) == figures.sampled == figures.passes + figures.accepted == 60
        assert figures.passes <= passes and figures.accepted <= figures.drafted
        assert figures.rows == 2 + (figures.passes - 1) + figures.drafted


def test_frequencies_are_those_of_the_target() -> None:
    """20,000 times a draft of two: each token that comes of it, of the distribution of its row."""
    random, vocab, draft, times = np.random.default_rng(5), 8, (2, 6), 20_000
    logits: F32 = random.standard_normal((3, vocab)).astype(np.float32)
    logits[0, 2] += 1.5
    logits[1, 6] += 2.0
    sample, counts = make_sampler(temperature=0.8, seed=11), np.zeros((3, vocab))
    for _ in range(times):
        for row, token in enumerate(checked(logits, draft, sample, [1])):
            counts[row, token] += 1
    # Without a draft: of three tokens the second is of row 1 where the first is the draft's.
    assert counts[1].sum() == counts[0, 2] and counts[2].sum() == counts[1, 6] > 2000
    for row in range(3):
        expected = distribution(logits[row], [1], temperature=0.8) * counts[row].sum()
        statistic = float(((counts[row] - expected) ** 2 / expected).sum())
        assert statistic < 29.9, "chi-square of 7 degrees of freedom: more once in 10,000 times"
