"""Many prompts answered at once, on rank 0: each step runs rows of several of them through the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.engine.allotment import MemoryAllotment, agreed_page_units
from tpimpi.engine.engine import OpenedEngine
from tpimpi.engine.protocol import open_pages, release_pages, step
from tpimpi.engine.rank_memory import RankMemory
from tpimpi.engine.startup import allot_memory, finish
from tpimpi.engine.trace import PassSpan, RankTrace
from tpimpi.errors import InputError
from tpimpi.models.kv.cache import KINDS, PAGE, pages_of
from tpimpi.models.kv.pages import PageAllocator, rows_of
from tpimpi.serving.generate import GenerationFigures
from tpimpi.serving.logprobs import Logprob, logprob_of
from tpimpi.serving.report import Answer, BatchFigures, Report
from tpimpi.serving.sampling import Sampler, SamplingError
from tpimpi.serving.scheduler import MAX_LOOKED_AT, Request, Run, Scheduler
from tpimpi.serving.speculation import Drafter, Speculation, checked
from tpimpi.serving.stops import StopFilter
from tpimpi.serving.text.answer import AnswerStream, Piece
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # most runs have none
    from tpimpi.serving.draft_choice import BatchDrafts

MAX_DELAY = 2.0  # a step with rows of prompts takes so many times as long as one without, at most
MIN_PROMPT_ROWS = 16  # rows of prompts beside answers, however much they delay these
RELEASED_PART = 4  # of the pages' memory: if so much (1 / so many) is of pages that nobody uses, it is given back
DRAFTED_EACH = 2  # drafted tokens in a step, for each of those that may be answered together


@dataclass(frozen=True)
class Query:
    """A prompt, as ids, and how it is to be answered. `max_tokens` counts those of `so_far` too."""

    ids: Sequence[int]
    max_tokens: int
    sample: Sampler
    stops: Sequence[str] = ()
    raw: bool = False
    ignore_eos: bool = False
    owner: str = ""  # what was computed is kept for prompts of the same owner
    logprobs: int | None = None  # how many of the likeliest tokens are told with each
    so_far: Sequence[int] = ()  # what there is of the answer already, from another run


@dataclass(eq=False)
class Answering:
    """An answer that is being made. `new` tokens, their `logprobs` where they are wanted, and the `pieces` of text that are
    certain with them are those of the last step, `accepted` how many of its draft; `ended` is one of END_REASONS (see
    transcript), or "failed" where it cannot go on for the reason in `problem`."""

    query: Query
    request: Request
    stream: AnswerStream
    stop: StopFilter
    ready: float  # time.monotonic()
    drafter: Drafter | None = None  # once there is a token
    figures: GenerationFigures = field(default_factory=GenerationFigures)
    # Of each token the number of its pass, and when it was there.
    times: list[tuple[int, float]] = field(default_factory=list)
    said: dict[bool, str] = field(default_factory=lambda: {False: "", True: ""})  # the answer, and its reasoning
    new: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    accepted: int = 0
    ended: str | None = None
    problem: str = ""

    @property
    def most(self) -> int:
        """Tokens that it can have."""
        return self.request.most - self.request.prompt

    @property
    def tokens(self) -> list[int]:
        return self.request.ids[self.request.prompt :]

    def answer(self) -> Answer:
        """What the report has of it, once it has ended."""
        assert self.ended is not None
        request = self.request
        self.figures.rows = request.rows
        figures = (self.tokens, request.prompt, self.ready, self.times, request.cached or 0, self.figures)
        return Answer.timed(self.said[False], *figures, ended=self.ended, reasoning=self.said[True])


def load_batched(
    opened: OpenedEngine,
    tokenizer: Tokenizer | TokenIds,
    report: Report,
    speculation: Speculation,
    *,
    context: int,
    together: int,
    tokenizer_bytes: int = 0,
    draft: OpenedEngine | None = None,
) -> tuple[BatchedLLM, list[MemoryAllotment]]:
    """Have every rank take memory to answer so many prompts together, each of `context` positions with its answer; rank 0
    also for `draft`, a model that drafts (--draft).

    Returns what answers, and what each rank has, in rank order. There are pages for at least one prompt and its answer;
    where memory has no room for all, the others wait. Raises InputError where a rank's promise is too small.
    """
    try:
        memory, allotments = allot_memory(opened.star, [opened], context, tokenizer_bytes, draft)
    except InputError as error:
        without = "" if draft is None else ", or leave --draft out"
        raise InputError(f"{error}, or a smaller --parallel (it is {together}){without}") from error
    kinds = memory.engines[0].model.kv_shape.kinds
    units, agreed = together * pages_of(context) * len(kinds), agreed_page_units(allotments)
    allocator = PageAllocator.of_layers(kinds, units if agreed is None else min(units, agreed))
    llm = BatchedLLM(memory, allocator, tokenizer, report, speculation, context=context, together=together)
    if draft is not None:
        llm.use_draft(draft)
    return llm, allotments


class BatchedLLM:
    """Answers several queries at once, `together` at most; every rank has its memory (see load_batched)."""

    def __init__(
        self,
        memory: RankMemory,
        allocator: PageAllocator,
        tokenizer: Tokenizer | TokenIds,
        report: Report,
        speculation: Speculation,
        *,
        context: int,
        together: int,
    ) -> None:
        """`allocator` is of the pages that there may be, `context` how many positions a prompt and its answer may have."""
        self.memory, self.report, self.context = memory, report, context
        self.engine = memory.engines[0]
        self.figures = report.batch = BatchFigures(together=together)
        self._model, self._tokenizer = self.engine.model, tokenizer
        max_rows = max(self._model.chunk, together + 1)
        window = max(self._model.config.attention_windows)
        self._scheduler = Scheduler(allocator, window=window, max_running=together, max_rows=max_rows)
        self._allocator, self._speculation, self._times = allocator, speculation, speculation.times
        self._together, self._max_rows = together, max_rows
        self._answering: dict[Request, Answering] = {}
        self._drafts: BatchDrafts | None = None
        open_pages(self._model, self._model.star, context, allocator)

    def use_draft(self, draft: OpenedEngine) -> None:
        """Have a small model draft."""
        from tpimpi.serving.draft_choice import BatchDrafts  # which most runs do without
        from tpimpi.serving.draft_model import BatchedDraftModel

        model = BatchedDraftModel(draft, self._tokenizer.sampled_ids, self.context, self.memory.draft_sequences)
        speculation = self._speculation
        self._drafts = BatchDrafts(model, self._times, speculation.longest, always=speculation.always)

    def submit(self, query: Query) -> Answering:
        """A query comes: it is answered by `step`, unless what there is of its answer is all. Its prompt has fewer ids than
        `context`."""
        most = min(query.max_tokens, self.context - len(query.ids))
        request = Request([*query.ids, *query.so_far], len(query.ids) + most, query.owner, prompt=len(query.ids))
        stream = self._tokenizer.answer_stream(query.ids, raw=query.raw)
        answering = Answering(query, request, stream, StopFilter(query.stops), time.monotonic())
        self._answering[request] = answering
        for token in query.so_far:
            self._push(answering, token)
        self._scheduler.add(request)
        if answering.stop.stopped:
            self._end(answering, "stop")
        elif len(request.ids) >= request.most:
            self._end(answering, self._why_no_more(answering))
        return answering

    def fits(self, positions: int) -> bool:
        """Whether there are pages for a prompt and its answer of so many positions, if it is alone."""
        return self._scheduler.fits(positions)

    def cancel(self, answering: Answering) -> None:
        """Nobody wants this answer any more; what there is of it stands."""
        if answering.ended is None:
            self._end(answering, "cancelled")

    def forget_prefixes(self) -> None:
        """Nothing is kept of prompts and answers that are done."""
        self._scheduler.prefixes.clear()
        self._give_memory_back()

    @property
    def room(self) -> int:
        """Positions that there are pages for, of all sequences together."""
        return self._allocator.units // len(self._model.kv_shape.kinds) * PAGE

    @property
    def pages(self) -> tuple[int, int]:
        """Pages of all layers that are used, kept prefixes included, and that there may be."""
        layers = len(self._model.kv_shape.kinds)
        return -(-self._allocator.used // layers), self._allocator.units // layers

    @property
    def wanted(self) -> int:
        """How many more prompts there should be, so that one that has room is among them."""
        return max(0, self._together + MAX_LOOKED_AT - len(self._answering))

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to answer."""
        return not self._answering

    def step(self) -> list[Answering]:
        """One step of what is to be done; returns the answers that have more tokens, or have ended."""
        scheduler, model = self._scheduler, self._model
        began = time.monotonic()
        answers = self._draft()
        drafted_at = time.monotonic()
        room = self._times.rows_within(answers, MAX_DELAY, self._max_rows) - answers if answers else self._max_rows
        runs = scheduler.next_step(max(MIN_PROMPT_ROWS, room))
        if not runs:
            return []
        pages = [run.request.pages for run in runs if run.request.pages is not None]
        rows = rows_of(pages, [(run.start, run.n) for run in runs])
        ids = [id_ for run in runs for id_ in run.ids]
        ends = np.cumsum([run.n for run in runs])
        wanted = [row for run, end in zip(runs, ends.tolist(), strict=True) if run.ends for row in _wanted(run, end)]
        prompt = any(run.n - len(run.draft) > 1 or not run.ends for run in runs)
        hidden = step(model, model.star, self.engine.embed(ids), rows, head=bool(wanted), prompt=prompt)
        logits = model.logits(hidden[wanted]) if wanted else None
        ended = time.monotonic()
        self._times.add(len(ids), ended - drafted_at)
        chosen: list[Answering] = []
        done = 0
        for run in runs:
            if not run.ends or logits is None:
                scheduler.computed(run)
                continue
            of_run = logits[done : done + 1 + len(run.draft), : self._tokenizer.sampled_ids]
            done += len(of_run)
            chosen.append(self._take_tokens(run, of_run))
        tokens = sum(len(answering.new) for answering in chosen)
        drafted = sum(len(run.draft) for run in runs)
        accepted = sum(answering.accepted for answering in chosen)
        self.figures.add_step(len(ids), len(runs), tokens, ended - began, drafted=drafted, accepted=accepted)
        if model.recorder is not None:
            model.recorder.add_pass(
                PassSpan(drafted_at, ended, len(ids), len(runs), drafted=drafted, accepted=accepted, tokens=tokens)
            )
        self.figures.preempted = scheduler.preempted
        self._give_memory_back()
        return chosen

    def _give_memory_back(self) -> None:
        """Have every rank give back the memory of pages that nobody uses, so that tiles have it: of all of them once there
        is nothing to answer, else where they are many, as others will be written soon."""
        cache = self._model.cache
        assert cache is not None
        free = [cache.filled_of(kind, self._allocator.free_pages(kind)) for kind in KINDS]
        units = self._allocator.units_of([len(pages) for pages in free])
        if units > (0 if self.is_idle else self._allocator.units // RELEASED_PART):
            release_pages(self._model, self._model.star, free)

    def _draft(self) -> int:
        """Draft for the answers of the next step, where that pays beside a row of each; returns how many rows they have."""
        answering = self._scheduler.answering
        rows = len(answering)
        most = min(rows + DRAFTED_EACH * self._together, self._max_rows - 1)
        drafters: dict[Request, Drafter] = {}
        for request in answering:
            one = self._answering[request]
            one.drafter = one.drafter or self._speculation.drafter(request.ids)
            if one.drafter is not None:
                drafters[request] = one.drafter
        of_model = {} if self._drafts is None else self._drafts.propose(drafters, most - rows)
        for request, drafter in drafters.items():
            room = min(most - rows, request.most - len(request.ids) - 1)
            request.draft = drafter.propose(room, others=rows - 1, of_model=of_model.get(request, ()))
            rows += len(request.draft)
        return rows

    def _take_tokens(self, run: Run, logits: F32) -> Answering:
        """The next tokens of a request, from the logits [n, vocab] of its last row and those of its draft."""
        answering, request = self._answering[run.request], run.request
        query, before = answering.query, len(request.ids)
        answering.new, answering.logprobs, answering.pieces = [], [], []
        figures, ended = answering.figures, None
        figures.passes += 1
        figures.drafted += len(run.draft)
        answering.accepted = 0
        tokens = _until_failing(checked(logits, run.draft, query.sample, request.ids), answering)
        for place, token in enumerate(tokens):
            figures.sampled += 1
            answering.accepted += run.draft[place : place + 1] == (token,)
            if token in self._tokenizer.end_ids and not query.ignore_eos:
                request.ids.pop()
                ended = "end"
                break
            answering.new.append(token)
            answering.times.append((figures.passes, time.monotonic()))
            if query.logprobs is not None:
                answering.logprobs.append(logprob_of(logits[place], token, query.logprobs))
            self._push(answering, token)
            if answering.stop.stopped:
                ended = "stop"
                break
            if len(request.ids) == request.most:
                ended = self._why_no_more(answering)
                break
        figures.accepted += answering.accepted
        if answering.problem:
            self._end(answering, "failed")
            return answering
        self._scheduler.computed(run)
        if answering.drafter is not None:
            answering.drafter.add(request.ids[before:])
        if ended is not None:
            self._end(answering, ended)
        return answering

    def _push(self, answering: Answering, token: int) -> None:
        """The text that is certain with a token more."""
        for piece in answering.stream.push(token):
            self._say(answering, answering.stop.push(piece))
            if answering.stop.stopped:
                break

    def _why_no_more(self, answering: Answering) -> str:
        return "max_tokens" if answering.most == answering.query.max_tokens else "context"

    def _end(self, answering: Answering, why: str) -> None:
        if not answering.stop.stopped:
            for piece in answering.stream.flush():
                self._say(answering, answering.stop.push(piece))
            self._say(answering, answering.stop.flush())
        answering.ended = why
        self._scheduler.remove(answering.request)
        if self._drafts is not None:
            self._drafts.forget(answering.request)
        del self._answering[answering.request]

    def _say(self, answering: Answering, pieces: Sequence[Piece]) -> None:
        answering.pieces += pieces
        for piece in pieces:
            answering.said[piece.reasoning] += piece.text

    def finish(self) -> list[RankTrace]:
        """End the run on every rank and gather the figures; the traces, if they were wanted, are returned."""
        figures, traces = finish(self.memory.star, self.memory)
        self.report.ranks += figures[0]
        if (auditor := self.engine.model.auditor) is not None:
            self.report.audit = auditor.figures
        return traces

    def close(self) -> None:
        """Stop reading, however the run ends."""
        self.memory.close()
        if self._drafts is not None:
            self._drafts.close()


def _wanted(run: Run, end: int) -> range:
    """The rows of a step of which the logits are wanted for a run, which ends before row `end`."""
    return range(end - 1 - len(run.draft), end)


def _until_failing(tokens: Iterator[int], answering: Answering) -> Iterator[int]:
    """`tokens`, up to where the answer's sampler fails, which ends this answer alone."""
    try:
        yield from tokens
    except SamplingError as error:
        answering.problem = str(error)
