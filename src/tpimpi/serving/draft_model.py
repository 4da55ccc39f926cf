"""A small model that drafts, on rank 0 alone: its slices are made by the same code, for a star of one rank.

It has the vocabulary of the model that it drafts for, and writes on greedily; what it proposes is checked as any draft is
(see speculation.py), so that it changes no token. All of it stays in memory, within what rank 0 may take (see
MemoryPlanner).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

from tpimpi.compute.arrays import F32
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.rank_memory import MemoryPlanner
from tpimpi.errors import InputError
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.system.memory import release_freed_memory

_TIMES_KEPT = 9  # drafts


def check_vocabulary(draft: OpenedEngine, tokenizer: Tokenizer | TokenIds, model: str) -> None:
    """Raise InputError where ids do not mean the same for the draft model as for `model`, whose `tokenizer` this is."""
    theirs, _ = load_tokenizer_of_slices(draft.file)
    problem = tokenizer.difference(theirs)
    del theirs
    release_freed_memory()
    if problem is not None:
        raise InputError(
            f"--draft: the vocabulary of {draft.header.model} is not that of {model}: {problem}; give a model of the same "
            "family, or leave --draft out"
        )


class DraftModel:
    """Greedy drafts of one sequence after the other, with keys and values of its own."""

    def __init__(self, opened: OpenedEngine, sampled_ids: int, context: int) -> None:
        """Takes memory for `context` positions. Drafted ids are below `sampled_ids`."""
        self._memory = MemoryPlanner([opened]).plan(context, None, 0).take()
        self._engine, self._sampled_ids = self._memory.engines[0], sampled_ids
        self._held: list[int] = []  # ids whose keys and values are there
        self._same = 0  # so many of them are the sequence's for sure
        self._times: deque[float] = deque(maxlen=_TIMES_KEPT)

    def begin(self, context: int) -> None:
        """Another sequence, of at most so many positions: what it has in common with the one before is kept."""
        model = self._engine.model
        context = min(context, model.config.context)
        del self._held[model.most_kept(context) :]
        if not model.can_keep(len(self._held), context):
            self._held.clear()
        model.begin(context, len(self._held))
        self._same = 0

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that follow `ids`, which are those of the call before and some more."""
        model, held = self._engine.model, self._held
        if len(ids) + most > model.context or most < 1:
            return []
        same = next(
            (i for i in range(self._same, min(len(held), len(ids))) if held[i] != ids[i]), min(len(held), len(ids))
        )
        same = min(same, len(ids) - 1)  # the last one's logits are wanted
        if not model.can_keep(same, model.context):
            same = 0
        if not same:
            model.begin(model.context)
        del held[same:]
        began, new = time.monotonic(), len(ids) - same
        for start in range(same, len(ids), model.chunk):
            chunk = ids[start : start + model.chunk]
            hidden = self._step(chunk, last=start + len(chunk) == len(ids))
        self._same = len(ids)
        draft = [self._best(hidden)]
        while len(draft) < most:
            draft.append(self._best(self._step(draft[-1:], last=True)))
        if new <= most + 1:  # not a prompt
            self._times.append((time.monotonic() - began) / most)
        return draft

    def _step(self, ids: Sequence[int], *, last: bool) -> F32:
        hidden = self._engine.model.forward(self._engine.embed(ids), len(self._held), head=last)
        self._held += ids
        return hidden[-1:]

    def _best(self, hidden: F32) -> int:
        return int(self._engine.model.logits(hidden)[0, : self._sampled_ids].argmax())

    @property
    def seconds(self) -> float:
        """What a token takes to draft; 0 where that is not known yet."""
        return statistics.median(self._times) if self._times else 0.0

    def close(self) -> None:
        self._memory.close()
