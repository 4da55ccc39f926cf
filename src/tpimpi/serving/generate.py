"""Generation, on rank 0: generators that nest. Tokens, their text in pieces, the pieces up to a stop string."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.engine.model import Model
from tpimpi.engine.protocol import begin, step
from tpimpi.serving.sampling import Sampler
from tpimpi.serving.text.answer import AnswerStream, Piece, pieces
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
) -> Iterator[int]:
    """Rank 0: the tokens that follow `prompt`, as they are made, at most `max_tokens`; one of `end_ids` is not yielded.
    With `sampled_ids` all are below it: what follows in the head has no token.

    `embed` gives the embedding rows of ids, [n, hidden]. `context` is the number of positions that every rank keeps room
    for; len(prompt) + max_tokens - 1 are used. What `prompt` begins with of the `held` ids is not computed again.
    `going_on` is asked before each step of the prompt, with the number of its positions that are done, and before each
    token; where it says no, the answer ends there.
    """
    held = HeldIds() if held is None else held
    kept = held.keep(prompt[: min(model.most_kept(context), len(prompt) - 1)])  # the last one's logits are wanted
    begin(model, star, context, kept)
    history = list(prompt)
    hidden = np.empty((0, model.config.hidden), np.float32)
    for start in range(kept, len(prompt), model.chunk):
        if not going_on(start):
            return
        chunk = prompt[start : start + model.chunk]
        hidden = step(model, star, embed(chunk), start, head=start + len(chunk) == len(prompt))
        held.ids += chunk
    for made in range(max_tokens):
        if made:
            if not going_on(len(prompt)):
                return
            hidden = step(model, star, embed(history[-1:]), len(history) - 1)
            held.ids.append(history[-1])
        token = sample(model.logits(hidden[-1:])[0, :sampled_ids], history)
        if token in end_ids:
            return
        history.append(token)
        yield token


def to_pieces(tokens: Iterable[int], stream: AnswerStream) -> Iterator[Piece]:
    """Text of `tokens` as it becomes certain."""
    for token in tokens:
        yield from stream.push(token)
    yield from stream.flush()


def until_stop(parts: Iterable[Piece], stops: Sequence[str]) -> Iterator[Piece]:
    """`parts` up to the string of `stops` that is complete first, which is left out; what may begin one is held back.

    Reasoning goes through: it is looked for in the answer alone."""
    held = ""
    for part in parts:
        if part.reasoning:
            yield part
            continue
        held += part.text
        found = [(place + len(stop), place) for stop in stops if (place := held.find(stop)) >= 0]
        if found:  # the one that is complete first, so that it does not matter how the text came in pieces
            yield from pieces(held[: min(found)[1]])
            return
        keep = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield from pieces(held[: len(held) - keep])
        held = held[len(held) - keep :]
    yield from pieces(held)
