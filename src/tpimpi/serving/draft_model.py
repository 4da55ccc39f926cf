"""A small model that drafts, on rank 0 alone: its slices are made by the same code, for a star of one rank.

It has the vocabulary of the model that it drafts for, and writes on greedily; what it proposes is checked as any draft is
(see speculation.py), so that it changes no token. While it is loaded all of it stays in memory, within what rank 0 may take
(see MemoryPlanner); where tiles are streamed, that is lent to it (see draft_choice.py).
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Sequence

from tpimpi.compute.arrays import F32
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.errors import InputError
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.system.memory import release_freed_memory

_TIMES_KEPT = 9  # tokens
_FEW_ROWS = (
    2  # the last drafted token, where all were right, and the one after it: they are a step that a draft begins with
)


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

    def __init__(self, opened: OpenedEngine, sampled_ids: int, context: int, lender: RankMemory | None = None) -> None:
        """Takes memory for `context` positions, or as many as it knows: now, or where there is a `lender` when it is loaded,
        from that one. Drafted ids are below `sampled_ids`."""
        self._star, self._settings, self._max_context = opened.star, opened.settings, opened.header.config.context
        self._lender, self._sampled_ids, self._context = lender, sampled_ids, min(context, self._max_context)
        self._held: list[int] = []  # ids whose keys and values are there
        self._same = 0  # so many of them are the sequence's for sure
        self._times: deque[float] = deque(maxlen=_TIMES_KEPT)
        self._memory: RankMemory | None = None
        if lender is None:
            self._take(opened)
        else:
            opened.close()

    def _take(self, opened: OpenedEngine) -> None:
        self._memory = MemoryPlanner([opened]).plan(self._context, None, 0).take()
        self._engine = self._memory.engines[0]

    @property
    def leaves(self) -> bool:
        """Whether its memory is lent, from when it is loaded until it is unloaded."""
        return self._lender is not None

    def load(self) -> None:
        """Have the memory that is lent. What it takes to draft is not known any more."""
        assert self._lender is not None and self._memory is None
        self._lender.lend_to_draft()
        self._take(open_engine(self._star, self._settings))
        self._engine.model.begin(self._context)
        self._times.clear()

    def unload(self) -> None:
        """Give it back."""
        assert self._lender is not None and self._memory is not None
        self.close()
        self._lender.take_back_from_draft()

    def begin(self, context: int) -> None:
        """Another sequence, of at most so many positions: what it has in common with the one before is kept."""
        context = self._context = min(context, self._max_context)
        if self._memory is None:
            return
        model = self._engine.model
        del self._held[model.max_kept(context) :]
        if not model.can_keep(len(self._held), context):
            self._held.clear()
        model.begin(context, len(self._held))
        self._same = 0

    def room(self, length: int) -> int:
        """How many tokens it can draft behind so many of the sequence: its context may be shorter than theirs."""
        return max(0, self._context - length)

    def propose(self, ids: Sequence[int], most: int) -> list[int]:
        """At most so many tokens that follow `ids`, which are those of the call before and some more."""
        model, held = self._engine.model, self._held
        most = min(most, self.room(len(ids)))
        if most < 1:
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
        for start in range(same, len(ids), model.chunk):
            chunk = ids[start : start + model.chunk]
            if start + len(chunk) < len(ids):
                self._step(chunk, last=False)
        self._same = len(ids)
        draft = [self._next(chunk)]
        while len(draft) < most:
            draft.append(self._next(draft[-1:]))
        return draft

    def _next(self, ids: Sequence[int]) -> int:
        """The token that follows `ids`, and with them what is held."""
        began = time.monotonic()
        token = int(self._engine.model.logits(self._step(ids, last=True))[0, : self._sampled_ids].argmax())
        if len(ids) <= _FEW_ROWS:
            self._times.append(time.monotonic() - began)
        return token

    def _step(self, ids: Sequence[int], *, last: bool) -> F32:
        hidden = self._engine.model.forward(self._engine.embed(ids), len(self._held), head=last)
        self._held += ids
        return hidden[-1:]

    @property
    def seconds(self) -> float:
        """What a token takes to draft; 0 where that is not known yet."""
        return statistics.median(self._times) if self._times else 0.0

    def close(self) -> None:
        """Give all memory back."""
        if self._memory is not None:
            self._memory.close()
            self._held.clear()
            self._same = 0
            del self._engine
            self._memory = None
            gc.collect()  # the model and its memory know each other
            release_freed_memory()
