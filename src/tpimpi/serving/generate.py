"""Generation, on rank 0: generators that nest. Tokens, and their text in pieces."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from tpimpi.compute.arrays import F32
from tpimpi.engine.model import Model
from tpimpi.engine.protocol import begin, forward
from tpimpi.engine.trace import PassSpan
from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.sampling import Sampler
from tpimpi.serving.speculation import Speculation, checked
from tpimpi.serving.text.answer import AnswerStream, Piece
from tpimpi.star import Star


@dataclass
class HeldIds:
    """The ids whose keys and values every rank holds, from position 0 on; `kept` is how many of them the last sequence
    found there."""

    ids: list[int] = field(default_factory=list)
    kept: int = 0

    def keep(self, ids: Sequence[int]) -> int:
        """Forget what `ids` do not begin with; returns how many are left."""
        pairs = zip(self.ids, ids, strict=False)
        self.kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        del self.ids[self.kept :]
        return self.kept


@dataclass
class GenerationFigures:
    """What it took to make tokens: `rows` positions that went through the layers, in `passes` that gave `sampled` tokens
    (with the one that ends an answer); of `drafted` ones so many were `accepted`."""

    rows: int = 0
    passes: int = 0
    sampled: int = 0
    drafted: int = 0
    accepted: int = 0


def generate(
    model: Model,
    star: Star,
    embed: Callable[[Iterable[int]], F32],
    prompt: Sequence[int],
    sample: Sampler,
    *,
    max_tokens: int,
    context: int,
    end_ids: Collection[int],
    sampled_ids: int | None = None,
    held: HeldIds | None = None,
    going_on: Callable[[int], bool] = lambda rows: True,
    speculation: Speculation | None = None,
    figures: GenerationFigures | None = None,
) -> Iterator[int]:
    """Rank 0: the tokens that follow `prompt`, as they are made, at most `max_tokens`; one of `end_ids` is not yielded.
    With `sampled_ids` all are below it: what follows in the head has no token.
    `embed` gives the embedding rows of ids, [n, hidden]. `context` is the number of positions that every rank keeps room
    for; len(prompt) + max_tokens - 1 are used. What `prompt` begins with of the `held` ids is not computed again.
    `going_on` is asked before each step of the prompt, with the number of its positions that are done, and before each
    token; where it says no, the answer ends there. `figures` are added to as tokens are made. With `speculation` a pass
    may give several tokens: see speculation.py.
    """
    held, figures = held or HeldIds(), figures or GenerationFigures()
    speculation = speculation or Speculation()
    passes, history, made = _Passes(model, star, embed, speculation.times, figures), list(prompt), 0
    kept = held.keep(prompt[: min(model.max_kept(context), len(prompt) - 1)])  # the last one's logits are wanted
    begin(model, star, context, kept := kept if model.can_keep(kept, context) else held.keep(()))
    for start in range(kept, len(prompt), model.chunk):
        if not going_on(start):
            return
        chunk = prompt[start : start + model.chunk]
        hidden = passes.read(chunk, start, last=start + len(chunk) == len(prompt))
        held.ids += chunk
    draft, drafter = list[int](), speculation.drafter(prompt, context)
    while made < max_tokens:
        if made and not going_on(len(prompt)):
            return
        if not made:
            logits = passes.begin(hidden[-1:])
        else:
            draft = [] if drafter is None else _up_to(end_ids, drafter.propose(max_tokens - made - 1))
            logits = passes.check(history[-1:], draft, len(history) - 1)
            held.ids += history[-1:]
        tokens, before = checked(logits[:, :sampled_ids], draft, sample, history), len(history)
        del logits  # which the next ones are not to stand beside
        for place, token in enumerate(tokens):
            if accepted := draft[place : place + 1] == [token]:
                held.ids.append(token)
            passes.gave(accepted=accepted)
            if token in end_ids:
                return
            made += 1
            yield token
            if accepted and not going_on(len(prompt)):  # this pass gives another one
                return
        if drafter is not None:
            drafter.add(history[before:])


@dataclass
class _Passes:
    """The passes of one sequence, counted and timed. Logits are [rows, vocab]."""

    model: Model
    star: Star
    embed: Callable[[Iterable[int]], F32]
    times: PassTimes
    figures: GenerationFigures
    span: PassSpan | None = None  # the last one's, where there is a trace

    def read(self, chunk: Sequence[int], start: int, *, last: bool) -> F32:
        """A part of the prompt, of which it may be the `last`: hidden vectors [n, hidden]."""
        began = time.monotonic()
        hidden = forward(self.model, self.star, self.embed(chunk), start, head=last, prompt=True)
        self._done(len(chunk), began, timed=len(chunk) > 1)
        return hidden

    def begin(self, hidden: F32) -> F32:
        """The logits behind the prompt, whose last hidden vector this is, [1, hidden]."""
        self.figures.passes += 1
        return self.model.logits(hidden)

    def check(self, last: Sequence[int], draft: Sequence[int], start: int) -> F32:
        """Those of the last token, which is at `start`, and of a draft."""
        began, rows = time.monotonic(), [*last, *draft]
        logits = self.model.logits(forward(self.model, self.star, self.embed(rows), start))
        self._done(len(rows), began, drafted=len(draft))
        self.figures.passes += 1
        return logits

    def gave(self, *, accepted: bool) -> None:
        """The last pass gave one more token, which was the draft's."""
        self.figures.sampled += 1
        self.figures.accepted += accepted
        if self.span is not None:
            self.span.tokens += 1
            self.span.accepted += accepted

    def _done(self, rows: int, began: float, *, drafted: int = 0, timed: bool = True) -> None:
        ended = time.monotonic()
        if timed:
            self.times.add(rows, ended - began)
        self.figures.rows += rows
        self.figures.drafted += drafted
        if self.model.recorder is not None:
            self.span = self.model.recorder.add_pass(PassSpan(began, ended, rows, drafted=drafted))


def _up_to(end_ids: Collection[int], draft: Sequence[int]) -> list[int]:
    """A draft without the end of an answer, and what is behind it: the row before says whether it ends."""
    return list(itertools.takewhile(lambda token: token not in end_ids, draft))


def to_pieces(tokens: Iterable[int], stream: AnswerStream) -> Iterator[Piece]:
    """Text of `tokens` as it becomes certain."""
    for token in tokens:
        yield from stream.push(token)
    yield from stream.flush()
