"""A small model that drafts, on rank 0 alone: its slices are made by the same code, for a star of one rank.

It has the vocabulary of the model that it drafts for, and writes on greedily; what it proposes is checked as any draft is
(see speculation.py), so that it changes no token. While it is loaded all of it stays in memory, within what rank 0 may take
(see MemoryPlanner); where tiles are streamed, that is lent to it (see draft_choice.py). Of several sequences at once each
has pages of its own, and a pass of the draft model has rows of all; there it stays in memory.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections import deque
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import KINDS, PAGE, WINDOWED, pages_of
from tpimpi.models.kv.pages import PageAllocator, SequencePages, rows_of
from tpimpi.serving.llm import load_tokenizer_of_slices
from tpimpi.serving.pass_times import PassTimes
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.system.memory import release_freed_memory

Key = TypeVar("Key", bound=Hashable)

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
        same = _in_common(held, ids, self._same)
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

    def seconds(self, sequences: int = 1) -> float:
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


def _in_common(held: Sequence[int], ids: Sequence[int], known: int) -> int:
    """How many ids are held, of which so many are `known`: not the last one, whose logits are wanted."""
    most = min(len(held), len(ids) - 1)
    return next((i for i in range(min(known, most), most) if held[i] != ids[i]), most)


@dataclass
class _Sequence:
    """What is there of one: pages, and the ids whose keys and values they hold, of which `same` are its own for sure."""

    pages: SequencePages
    held: list[int] = field(default_factory=list)
    same: int = 0

    def go_back(self, ids: Sequence[int]) -> None:
        """To what it has in common with `ids`."""
        self.same = _in_common(self.held, ids, self.same)
        del self.held[self.same :]
        self.pages.truncate(self.same)
        self.pages.trim()


class BatchedDraftModel:
    """Greedy drafts of several sequences, each named by a key: a pass has rows of all of them."""

    def __init__(self, opened: OpenedEngine, sampled_ids: int, context: int, sequences: int) -> None:
        """Takes memory for all of the model, and as they fill for pages of so many sequences of `context` positions, or as
        many as it knows. Drafted ids are below `sampled_ids`."""
        self._sampled_ids, self._context = sampled_ids, min(context, opened.header.config.context)
        self._memory = MemoryPlanner([opened]).plan(self._context, None, 0).take()
        self._engine = self._memory.engines[0]
        model = self._engine.model
        shape, self._window = model.kv_shape, max(model.config.attention_windows)
        of_one = zip(KINDS, shape.pages_of_sequence(self._context), strict=True)
        units = sequences * sum(count * shape.kinds.count(kind) for kind, count in of_one)
        self._allocator = PageAllocator.of_layers(shape.kinds, units)
        model.open_pages(self._context, self._allocator.places, units)
        self._max_rows = max(model.chunk, opened.settings.parallel + 1)
        self._sequences: dict[Hashable, _Sequence] = {}
        self._times = PassTimes()  # of passes that draft a token for each sequence that they have rows of

    def room(self, length: int) -> int:
        """How many tokens it can draft behind so many of a sequence: its context may be shorter than theirs."""
        return max(0, self._context - length)

    def seconds(self, sequences: int) -> float:
        """What it takes to draft a token for each of so many; 0 where that is not known yet."""
        return self._times.seconds(sequences) if self._times.max_rows else 0.0

    def propose(self, asked: Mapping[Key, tuple[Sequence[int], int]]) -> dict[Key, list[int]]:
        """For each key its ids, and how many tokens are to follow them at most, which is 1 at least: what follows.

        The first pass reads what was not read yet; where that is more than a chunk, some have no draft this time, nor have
        those for which there are too few pages."""
        found: dict[Key, list[int]] = {}
        runs = self._to_read(asked)
        while runs:
            ended = [
                key for key, ids in runs.items() if len(self._sequences[key].held) + len(ids) >= len(asked[key][0])
            ]
            for key, token in zip(ended, self._step(runs, ended), strict=True):
                found.setdefault(key, []).append(token)
            going_on = [key for key, draft in found.items() if len(draft) < asked[key][1]]
            runs = {key: found[key][-1:] for key in going_on if key in ended and self._grow(key, 1)}
        return found

    def _to_read(self, asked: Mapping[Key, tuple[Sequence[int], int]]) -> dict[Key, Sequence[int]]:
        """The rows of the next pass: what is missing of each, first of those that miss least."""
        missing: dict[Key, Sequence[int]] = {}
        for key, (ids, _) in asked.items():
            sequence = self._sequences.get(key)
            if sequence is None and self._has_pages_for(len(ids)):
                sequence = self._sequences[key] = _Sequence(SequencePages(self._allocator, self._window))
            if sequence is not None:
                sequence.go_back(ids)
                missing[key] = ids[len(sequence.held) :]
        runs, room = dict[Key, Sequence[int]](), self._max_rows
        for key, ids in sorted(missing.items(), key=lambda one: len(one[1])):
            n = min(len(ids), room)
            if n and self._grow(key, n):
                runs[key] = ids[:n]
                room -= n
        return runs

    def _has_pages_for(self, positions: int) -> bool:
        """Whether there are pages to read so many, and some more."""
        pages = [pages_of(positions + PAGE) for _ in KINDS]
        pages[WINDOWED] = min(pages[WINDOWED], pages_of(self._window) + pages_of(self._max_rows) + 2)
        return self._allocator.can_take(pages)

    def _grow(self, key: Hashable, n: int) -> bool:
        """Have pages for `n` positions more of a sequence; where there are none it gives up all that it has."""
        sequence = self._sequences[key]
        if sequence.pages.grow(len(sequence.held) + n):
            return True
        self.forget(key)
        return False

    def _step(self, runs: Mapping[Key, Sequence[int]], ended: Collection[Key]) -> list[int]:
        """A pass over these ids of each sequence; returns the tokens that follow those of the `ended` ones, in order."""
        began, model = time.monotonic(), self._engine.model
        sequences = [self._sequences[key] for key in runs]
        counts = [len(ids) for ids in runs.values()]
        rows = rows_of(
            [sequence.pages for sequence in sequences],
            [(len(sequence.held), n) for sequence, n in zip(sequences, counts, strict=True)],
        )
        hidden = model.step(self._engine.embed([id_ for ids in runs.values() for id_ in ids]), rows, head=bool(ended))
        for sequence, ids in zip(sequences, runs.values(), strict=True):
            sequence.held += ids
        if not ended:
            return []
        last = [row for key, row in zip(runs, np.cumsum(counts) - 1, strict=True) if key in ended]
        tokens: list[int] = model.logits(hidden[last])[:, : self._sampled_ids].argmax(axis=1).tolist()
        if sum(counts) <= _FEW_ROWS * len(ended):
            self._times.add(sum(counts), time.monotonic() - began)
        return tokens

    def keep(self, keys: Collection[Hashable]) -> None:
        """Give up what is there of other sequences."""
        for key in [key for key in self._sequences if key not in keys]:
            self.forget(key)

    def forget(self, key: Hashable) -> None:
        """Give up what is there of this sequence, if anything is."""
        if (sequence := self._sequences.pop(key, None)) is not None:
            sequence.pages.close()

    @property
    def used(self) -> int:
        """Units of pages that sequences have (see PageAllocator)."""
        return self._allocator.used

    def close(self) -> None:
        """Give all memory back."""
        self._memory.close()
