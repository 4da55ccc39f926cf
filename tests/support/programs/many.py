"""Run on every rank: many prompts answered at once, of several models in one launch.

Arguments: a JSON file of jobs ([folder, window, tokens to draft, slices of a model that drafts or null]), and where to
write. Prompts come at any step, some begin
as others do, some have a part of their answer from before, some are cancelled, of one the sampler fails; they are of two
owners; there are pages for some of them alone. Rank 0 writes NAME.json for each: "answers", a list with "ids", those
generated "alone", and how it "ended"; "cached", "preempted", "drafted" and "accepted" in all, and how many were
"continued"; "units" that are used, and bytes that are "filled", at the end; and "calls" of the backend for a step of one
row, and of rows of five sequences; of a model that drafts the "passes" ([how many, tokens that were drafted of a
sequence at most] for each time), how many sequences it drafted for at "once", and of those "long" whose answers it cannot
read, and the units that it has "left" at the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.engine import Engine, EngineConfig
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.models.kv.pages import PageAllocator
from tpimpi.star import Star, connect

CONTEXT, PROMPTS, TOGETHER, MAX_TOKENS = 256, 18, 5, 40
FAILING = 7  # the number of the prompt whose sampler fails


class Counted:
    """A backend whose calls are counted."""

    def __init__(self, backend: Any) -> None:
        self._backend, self.calls = backend, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        if not callable(found):
            return found

        def call(*arguments: Any, **more: Any) -> Any:
            self.calls += 1
            return found(*arguments, **more)

        return call


def greedy(logits: Any, history: Any) -> int:
    return int(np.argmax(logits))


def failing(after: int) -> Any:
    """As `greedy`, for so many tokens."""
    from tpimpi.serving.grammar import GrammarError

    def sample(logits: Any, history: Any) -> int:
        nonlocal after
        after -= 1
        if after < 0:
            raise GrammarError("it fails")
        return greedy(logits, history)

    return sample


class Prophet:
    """In place of a drafter: knows the answer, and drafts it, now and then with a wrong token."""

    def __init__(self, answer: list[int], most: int, random: np.random.Generator) -> None:
        self._answer, self._most, self._random = answer, most, random

    def propose(self, most: int, others: int, of_model: Any) -> list[int]:
        found = self._answer[: max(0, min(most, self._most))]
        if found and self._random.random() < 0.4:
            place = self._random.integers(len(found))
            found[place] = found[place] - 1 if found[place] else 1
        return found

    def add(self, ids: list[int]) -> None:
        self._answer = self._answer[len(ids) :]


class Watched:
    """A model that drafts what it is asked for, and what that took."""

    def __init__(self, folder: str) -> None:
        from tpimpi.serving.draft_model import BatchedDraftModel

        settings = EngineConfig(
            *(folder, None, "", "", "", "native", 1, "star", 60.0), cores_shared_by=[1], window="all", parallel=TOGETHER
        )
        opened = open_engine(Star(None), settings)
        model = self.model = BatchedDraftModel(opened, opened.header.config.vocab, CONTEXT, TOGETHER - 2)
        self.passes: list[list[int]] = []
        self.once, self.context = 0, opened.header.config.context
        step, propose = model._step, model.propose

        def counted(*arguments: Any) -> Any:
            self.passes[-1][0] += 1
            return step(*arguments)

        def watched(asked: Any) -> Any:
            self.passes.append([0, max(most for _, most in asked.values())])
            found = propose(asked)
            assert all(
                len(found[key]) <= most and len(ids) + most <= self.context
                for key, (ids, most) in asked.items()
                if key in found
            )
            self.once = max(self.once, len(found))
            return found

        model._step, model.propose = counted, watched  # type: ignore[method-assign]

    def end(self, queries: list[Any]) -> dict[str, Any]:
        """What it did, of these."""
        self.model.close()
        long = sum(len(query.ids) + query.max_tokens > self.context for query in queries)
        return {"passes": self.passes, "once": self.once, "long": long}


def what_is_asked(engine: Engine, random: np.random.Generator) -> tuple[list[Any], list[list[int]]]:
    """Queries, and the answer of each alone."""
    from tpimpi.serving.batched import Query
    from tpimpi.serving.generate import generate

    model = engine.model
    texts = [random.integers(3, 90, 180).tolist() for _ in range(3)]
    queries, alone = [], []
    for _ in range(PROMPTS):
        text = texts[random.integers(len(texts))][: random.integers(0, 181)]
        ids = [*text, *random.integers(3, 90, random.integers(1, 20)).tolist()]
        most = int(random.integers(1, MAX_TOKENS))
        options = {"max_tokens": most, "context": CONTEXT, "end_ids": ()}
        alone.append(list(generate(model, model.star, engine.embed, ids, greedy, **options)))
        so_far = alone[-1][: random.integers(1, most + 1)] if random.random() < 0.3 else []
        sample = failing(most // 2) if len(queries) == FAILING else greedy
        queries.append(Query(ids, most, sample, owner="ab"[random.integers(2)], so_far=so_far))
        texts.append([*ids, *alone[-1]])
    return queries, alone


def answer_many(memory: RankMemory, seed: int, draft: int, of_model: str | None) -> dict[str, Any]:
    from tpimpi.serving.batched import Answering, BatchedLLM
    from tpimpi.serving.report import Report
    from tpimpi.serving.speculation import Speculation
    from tpimpi.serving.text.token_ids import TokenIds

    engine = memory.engines[0]
    model, random = engine.model, np.random.default_rng(seed)
    queries, alone = what_is_asked(engine, random)

    class Told(Speculation):
        def drafter(self, ids: Any) -> Any:
            """For a sequence that has its first tokens."""
            found = [
                [*query.ids, *answer]
                for query, answer in zip(queries, alone, strict=True)
                if ids[: len(query.ids)] == query.ids
            ]
            whole = next((text for text in found if text[: len(ids)] == ids), None)
            return Prophet(whole[len(ids) :], draft, random) if draft and whole else None

    allocator = PageAllocator.of_layers(model.kv_shape.kinds, 9 * len(model.kv_shape.kinds))
    report, vocab = Report("", "", "", ""), model.config.vocab
    told = Speculation(draft, always=True) if of_model else Told()
    llm = BatchedLLM(memory, allocator, TokenIds(vocab), report, told, context=CONTEXT, together=TOGETHER)
    watched = None
    if of_model:
        from tpimpi.serving.draft_choice import BatchDrafts

        watched = Watched(of_model)
        llm._drafts = BatchDrafts(watched.model, told.times, draft, always=True)
    answering: list[Answering] = []
    while len(answering) < PROMPTS or not llm.is_idle:
        while len(answering) < PROMPTS and random.random() < 0.4:
            answering.append(llm.submit(queries[len(answering)]))
        if random.random() < 0.04 and answering:
            llm.cancel(answering[random.integers(len(answering))])
        llm.step()
    left = None if watched is None else watched.model.used
    draft, llm._drafts, told.longest = 0, None, 0
    calls = count_calls(llm, random)
    llm.forget_prefixes()
    filled = model.cache.filled_bytes
    answers = [
        {"ids": one.tokens, "alone": tokens, "ended": one.ended} for one, tokens in zip(answering, alone, strict=True)
    ]
    assert report.batch is not None
    did = {name: sum(getattr(one.figures, name) for one in answering) for name in ("drafted", "accepted")}
    did |= {
        "continued": sum(bool(query.so_far) for query in queries),
        "filled": filled,
        "cached": sum(one.request.cached or 0 for one in answering),
    }
    if watched is not None:
        did |= {**watched.end(queries), "left": left}
    return {"answers": answers, **did, "preempted": report.batch.preempted, "units": allocator.used, "calls": calls}


def count_calls(llm: Any, random: np.random.Generator) -> list[int]:
    """Of a step of one row, and of a step of a row of each of five sequences."""
    from tpimpi.serving.batched import Query

    model, calls = llm.engine.model, []
    for sequences in (1, 5):
        asked = [llm.submit(Query(random.integers(3, 90, 5).tolist(), 3, greedy)) for _ in range(sequences)]
        while any(not one.tokens for one in asked):
            llm.step()
        counted = model.backend = Counted(model.backend)
        assert len(llm.step()) == sequences
        calls.append(counted.calls)
        model.backend = counted._backend
        for one in asked:
            llm.cancel(one)
    return calls


def main() -> None:
    star, out = connect(), Path(sys.argv[2])
    for seed, (folder, window, draft, of_model) in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        settings = EngineConfig(
            *(folder, None, "", "", "", "native", 1, "star", 60.0),
            cores_shared_by=[star.rank.size] * star.rank.size,
            window=window,
            kv_format="f32",
            chunk=48,
            parallel=TOGETHER,
        )
        memory = MemoryPlanner([open_engine(star, settings)]).plan(CONTEXT, None, 0).take()
        model = memory.engines[0].model
        if star.rank.is_hub:
            did = answer_many(memory, seed, draft, of_model)
            protocol.finish(model, star)
            (out / f"{Path(folder).name}.json").write_text(json.dumps(did))
        else:
            protocol.follow([model], star)
        memory.close()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(1)
