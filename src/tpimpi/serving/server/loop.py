"""Rank 0 of a server: between two steps of the model it hears what the front asks, and says what answers have become."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from tpimpi.engine.figures import LiveFigures
from tpimpi.engine.protocol import live_figures
from tpimpi.errors import InputError, LostError, TpimpiError, as_ours
from tpimpi.serving.batched import Answering, BatchedLLM, Query
from tpimpi.serving.grammar import Grammars
from tpimpi.serving.logprobs import Logprob
from tpimpi.serving.server import wire
from tpimpi.serving.server.connection import Connection
from tpimpi.serving.server.fair_queue import FairQueue
from tpimpi.serving.server.prompts import RefusedError, grammar_field, ids_of, query_of
from tpimpi.serving.text.answer import Piece
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer

HEARING_S = 0.02  # between two steps, at most: long prompts that come together are not to hold answers up
FIGURES_INTERVAL_S = 1.0
ENDING = "server_ending"  # the code of what is refused as the run ends


@dataclass(eq=False)
class _Open:
    """What was asked and has no end yet; `answering` once it is under way."""

    ask: wire.Ask
    query: Query
    answering: Answering | None = None


@dataclass
class _Interval:
    """What was done since figures were told."""

    began: float
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class ServerLoop:
    """Answers what the front asks until it is told to end."""

    def __init__(
        self,
        llm: BatchedLLM,
        tokenizer: Tokenizer | TokenIds,
        connection: Connection,
        *,
        fingerprint: str,
        hosts: Sequence[str],
        promises: Sequence[int | None],
        together: int,
        grace: float,
    ) -> None:
        """`hosts` and `promises` (bytes of memory, None where it is not bounded) are those of the ranks; `grace` is for how
        many seconds answers that are under way go on at the end."""
        self._llm, self._tokenizer, self._connection = llm, tokenizer, connection
        self._grammars = Grammars(tokenizer)
        self._fingerprint = fingerprint
        self._hosts, self._promises, self._together, self._grace = hosts, promises, together, grace
        self._heard: deque[wire.Question] = deque()
        self._open: dict[int, _Open] = {}
        self._queue: FairQueue[_Open] = FairQueue()
        self._by_answering: dict[Answering, _Open] = {}
        self._interval = _Interval(time.monotonic())
        self._before: list[LiveFigures] | None = None
        self._audits_told = 0
        self._told_idle = True  # the front knows that nothing is under way
        self._ends_by: float | None = None  # time.monotonic(), once the run is to end
        self._ending = False
        self.lost: LostError | None = None  # what a signal's handler found, and `run` raises at the latest

    def end(self) -> None:
        """Take no more, finish what is under way within the grace, at once where this is said again; from a signal's handler
        or another thread."""
        self._ends_by = time.monotonic() + (0.0 if self._ending else self._grace)
        self._ending = True
        self._connection.wake()

    def run(self) -> None:
        """Until the end. Raises FrontGoneError where the front has ended, and `lost`."""
        self._connection.say(self._ready())
        told_ending = False
        while True:
            self._hear()
            if self.lost is not None:
                raise self.lost
            if self._ending and not told_ending:
                told_ending = True
                self._connection.say(wire.Ending())
            if self._is_over():
                return self._finish()
            self._admit()
            if self._by_answering:
                self._step()
            self._tell_figures()
            self._connection.flush()

    def _step(self) -> None:
        figures, interval = self._llm.figures, self._interval
        drafted, accepted = figures.drafted_tokens, figures.accepted_tokens
        for answering in self._llm.step():
            self._tell(answering)
        interval.drafted_tokens += figures.drafted_tokens - drafted
        interval.accepted_tokens += figures.accepted_tokens - accepted

    def _is_over(self) -> bool:
        return self._ends_by is not None and (not self._open or time.monotonic() >= self._ends_by)

    def _finish(self) -> None:
        """Give up what is open, and let the front know that the run ends."""
        for answering in list(self._by_answering):
            self._llm.cancel(answering)
        self._connection.say_last(wire.Failed("the server is ending", 0))

    def _ready(self) -> wire.Ready:
        return wire.Ready(
            model=self._llm.report.model,
            context=self._llm.context,
            together=self._together,
            vocab=self._tokenizer.sampled_ids,
            family=self._tokenizer.family,
            fingerprint=self._fingerprint,
        )

    # What the front asks

    def _hear(self) -> None:
        """Take what has come, and do it; where there is nothing to be done, wait for something."""
        connection = self._connection
        if not self._open and not self._heard and not self._ending:
            connection.flush()
            connection.wait(None)
        self._heard += connection.take()
        until = time.monotonic() + HEARING_S
        while self._heard and time.monotonic() < until:
            self._do(self._heard.popleft())

    def _do(self, question: wire.Question) -> None:
        try:
            match question:
                case wire.Ask():
                    self._take(question)
                case wire.Cancel():
                    self._cancel(question.id)
                case wire.Count():
                    ids = ids_of(self._tokenizer, question.prompt, self._llm.context)
                    self._connection.say(wire.Counted(question.id, ids))
                case wire.Spell():
                    ids = ids_of(self._tokenizer, wire.Ids(question.ids), self._llm.context)
                    self._connection.say(wire.Spelled(question.id, self._spell(ids)))
                case wire.End():
                    self.end()
        except Exception as error:
            if isinstance(question, wire.End) or (isinstance(error, TpimpiError) and not isinstance(error, InputError)):
                raise
            # Whatever else a body makes a template or tokenizer raise ends this request alone: no rank was asked yet.
            refused = error if isinstance(error, RefusedError) else RefusedError(str(as_ours(error)))
            self._connection.say(wire.Refused(question.id, str(refused), refused.what, refused.code))

    def _take(self, ask: wire.Ask) -> None:
        """A prompt comes: from now on it waits for its turn."""
        if self._ending:
            raise RefusedError("the server is ending", code=ENDING)
        query = query_of(self._tokenizer, ask, self._llm.context, self._grammars)
        if self._told_idle:  # so that a short answer is told of too, once it is done
            self._told_idle, self._interval = False, _Interval(time.monotonic())
        one = self._open[ask.id] = _Open(ask, query)
        self._queue.add(ask.owner, one)
        self._connection.say(wire.Began(ask.id, len(query.ids)))

    def _cancel(self, ask_id: int) -> None:
        one = self._open.get(ask_id)
        if one is None:  # it has ended meanwhile
            return
        if one.answering is not None:
            self._llm.cancel(one.answering)
        self._forget(one)

    def _spell(self, ids: Sequence[int]) -> str:
        stream = self._tokenizer.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    # Answers

    def _admit(self) -> None:
        """Those whose turn it is: no more than can be answered together, so that who comes later gets a share soon."""
        while len(self._queue) and len(self._by_answering) < self._together:
            one = self._queue.take()
            answering = one.answering = self._llm.submit(one.query)
            answering.pieces = []  # it was said before
            self._by_answering[answering] = one
            if answering.ended is not None:
                self._tell(answering)

    def _tell(self, answering: Answering) -> None:
        """What there is more of an answer, and whether it has ended."""
        one = self._by_answering[answering]
        logprobs = [self._named(logprob) for logprob in answering.logprobs]
        for part in parts_of(one.ask.id, answering.pieces, answering.new, logprobs):
            self._connection.say(part)
        if len(answering.times) == len(answering.new):  # the first
            cached = answering.request.cached or 0
            self._interval.cached_tokens += cached
            self._interval.prompt_tokens += answering.request.prompt - cached
        self._interval.tokens += len(answering.new)
        if answering.ended is None:
            return
        if answering.problem:
            what = "" if one.ask.grammar is None else grammar_field(one.ask)
            self._connection.say(wire.Refused(one.ask.id, answering.problem, what))
            self._forget(one)
            return
        tools = list(answering.stream.tools)
        cached = answering.request.cached or 0
        stop = answering.stop.found or ""
        self._connection.say(wire.Done(one.ask.id, answering.ended, len(answering.tokens), cached, tools, stop))
        self._forget(one)

    def _named(self, logprob: Logprob) -> wire.TokenLogprob:
        piece = self._tokenizer.piece
        likeliest = [(piece(token), value) for token, value in logprob.likeliest]
        return wire.TokenLogprob(piece(logprob.token), logprob.logprob, likeliest)

    def _forget(self, one: _Open) -> None:
        del self._open[one.ask.id]
        self._queue.remove(one.ask.owner, one)
        if one.answering is not None:
            del self._by_answering[one.answering]

    # Figures

    def _tell_figures(self) -> None:
        """About once a second while there is something to do, and once when all is done."""
        now, interval = time.monotonic(), self._interval
        idle = not self._open
        if now - interval.began < FIGURES_INTERVAL_S and not (idle and not self._told_idle):
            return
        if idle and self._told_idle:
            interval.began = now
            return
        self._told_idle = idle
        llm = self._llm
        model = llm.engine.model
        found = live_figures(model, model.star, llm.memory.live())
        seconds = max(now - interval.began, 1e-6)
        before = self._before or found
        ranks = [
            wire.RankFigures(
                rank=rank,
                host=self._hosts[rank],
                memory_bytes=one.resident_bytes,
                promised_bytes=self._promises[rank],
                disk_bytes=one.bytes_read,
                disk_s=one.read_wait_s - last.read_wait_s,
                star_s=one.star_s - last.star_s,
                compute_s=one.compute_s - last.compute_s,
            )
            for rank, (one, last) in enumerate(zip(found, before, strict=True))
        ]
        self._before = found
        audits = 0 if model.auditor is None else model.auditor.figures.audits
        self._connection.say(
            wire.Figures(
                interval_s=seconds,
                tokens=interval.tokens,
                prompt_tokens=interval.prompt_tokens,
                cached_tokens=interval.cached_tokens,
                running=len(self._by_answering),
                waiting=len(self._queue),
                pages_used=llm.pages[0],
                pages=llm.pages[1],
                ranks=ranks,
                drafted_tokens=interval.drafted_tokens,
                accepted_tokens=interval.accepted_tokens,
                audits=audits - self._audits_told,
            )
        )
        self._audits_told = audits
        self._interval = _Interval(time.monotonic())


def parts_of(
    ask_id: int, pieces: Sequence[Piece], tokens: list[int], logprobs: list[wire.TokenLogprob]
) -> list[wire.Part]:
    """What the front is told of pieces, in their order: a part more where a call is marked, or reasoning follows text. The
    first has the tokens."""
    said: list[tuple[str, str, str]] = []  # mark, text, reasoning
    for piece in pieces:
        mark, text, reasoning = said[-1] if said else ("", "", "")
        if piece.mark or not said or (piece.reasoning and text):
            said.append((piece.mark, "", ""))
            mark, text, reasoning = said[-1]
        if piece.mark:
            continue
        said[-1] = (mark, text, reasoning + piece.text) if piece.reasoning else (mark, text + piece.text, reasoning)
    if not said and tokens:
        said = [("", "", "")]
    return [
        wire.Part(ask_id, text, reasoning, [] if place else tokens, [] if place else logprobs, mark)
        for place, (mark, text, reasoning) in enumerate(said)
    ]
