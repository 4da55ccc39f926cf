"""The front's end of the socket to rank 0, which may be loading, ready, gone, or another one than before.

What is asked is kept until its end, with the tokens that came, so that it can be asked again of a rank 0 that comes later.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions, State, died
from tpimpi.serving.server.problems import ApiError, bad_field, queue_full, unavailable
from tpimpi.serving.server.watch import ProcessWatch

READ_BYTES = 1 << 18
MAX_DEATHS = 3  # of runs, until what they were to answer is given up
ENDED = "the run has ended: rank 0 is gone"

Heard = wire.Began | wire.Part | wire.Done | ApiError


class Hears(Protocol):
    """What replies go to, each with the number of its answer among those of a request."""

    def hear(self, index: int, reply: Heard) -> None: ...


class Asked:
    """An answer that was asked for: replies go to `replies`, with `index`. `began`: it was told already that it has."""

    def __init__(self, ask: wire.Ask, replies: Hears, index: int, *, began: bool = False) -> None:
        self.ask, self.replies, self.index = ask, replies, index
        self.so_far = list(ask.so_far)
        self.began = began
        self.deaths = 0  # of runs that were to answer it

    def hear(self, reply: Heard) -> None:
        if isinstance(reply, wire.Began):
            if self.began:  # it was asked again
                return
            self.began = True
        if isinstance(reply, wire.Part):
            self.so_far += reply.tokens
        self.replies.hear(self.index, reply)


@dataclass(eq=False)
class _Question:
    """A short question, and where its answer goes; `deaths` as of Asked."""

    question: wire.Count | wire.Spell
    answer: asyncio.Future[wire.Counted | wire.Spelled]
    deaths: int = 0

    def hear(self, error: ApiError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class RankLink:
    """Rank 0, as the front knows it."""

    def __init__(self, options: FrontOptions) -> None:
        self._options = options
        self.progress = wire.Progress("rank 0 starts", 0.0)
        self.ready: wire.Ready | None = None
        self.figures: wire.Figures | None = None
        self.disk_rates: dict[int, float] = {}  # by rank, bytes a second
        self.failed: wire.Failed | None = None  # why it ended
        self.is_ending = False
        self.ended = asyncio.Event()  # rank 0 has, and none is to come
        self._told_to_end = False
        self.on_figures: Callable[[wire.Figures], None] = lambda figures: None
        self.on_state: Callable[[State], None] = lambda state: None
        self.on_ready: Callable[[wire.Ready], None] = lambda ready: None  # before it is asked anything
        self._watch = ProcessWatch()
        self._is_ready = asyncio.Event()  # or will never be
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, Asked] = {}
        self._questions: dict[int, _Question] = {}
        self._ids = itertools.count(1)
        self._taken = 0  # answers that requests have a place for

    async def listen(self) -> asyncio.Server:
        """Take connections of rank 0; only this user may connect."""
        path = Path(self._options.socket)
        server = await asyncio.start_unix_server(self._serve, path)
        path.chmod(0o600)
        return server

    # Requests

    @property
    def most(self) -> int:
        """Answers that may be under way, or wait."""
        together = self._options.parallel if self.ready is None else self.ready.together
        return together + self._options.queue

    @contextlib.contextmanager
    def place(self, answers: int, *, beyond: bool = False) -> Iterator[None]:
        """Inside, a request has a place for so many answers. Raises ApiError where there is none, unless `beyond`."""
        if answers > self.most and not beyond:
            raise bad_field("n", f"{answers} answers are wanted, at most {self.most} may wait")
        if self._taken + answers > self.most and not beyond:
            raise queue_full(f"{self._taken} requests are answered or wait already")
        self._taken += answers
        try:
            yield
        finally:
            self._taken -= answers

    async def until_ready(self) -> wire.Ready:
        """What rank 0 is, once it is ready. Raises ApiError where it ends."""
        while self.ready is None and not self.is_ending:  # it may be gone again at once
            await self._is_ready.wait()
        if self.is_ending or self.ready is None:
            raise self._over()
        return self.ready

    def ask(self, ask: wire.Ask, replies: Hears, index: int, *, began: bool = False) -> Asked:
        """Ask rank 0; the ask's id is chosen here. See Asked."""
        _check_numbers(ask)
        asked = Asked(msgspec.structs.replace(ask, id=next(self._ids)), replies, index, began=began)
        self._asked[asked.ask.id] = asked
        self._send(asked.ask)
        return asked

    def forget(self, asked: Asked) -> None:
        """Nobody wants it any more, or it has ended."""
        if self._asked.pop(asked.ask.id, None) is not None:
            self._send(wire.Cancel(asked.ask.id))

    async def count(self, prompt: wire.Chat | wire.Text) -> list[int]:
        """The token ids of a prompt."""
        reply = await self._question(wire.Count(next(self._ids), prompt))
        assert isinstance(reply, wire.Counted)
        return reply.ids

    async def spell(self, ids: list[int]) -> str:
        """The text of token ids."""
        reply = await self._question(wire.Spell(next(self._ids), ids))
        assert isinstance(reply, wire.Spelled)
        return reply.text

    async def _question(self, question: wire.Count | wire.Spell) -> wire.Counted | wire.Spelled:
        _check_numbers(question)
        await self.until_ready()
        answer: asyncio.Future[wire.Counted | wire.Spelled] = asyncio.get_running_loop().create_future()
        self._questions[question.id] = _Question(question, answer)
        try:
            self._send(question)
            return await answer
        finally:
            self._questions.pop(question.id, None)

    # Rank 0

    def _send(self, message: wire.Question) -> None:
        """At once, if rank 0 is ready; else it is asked when it comes."""
        if self._writer is not None and self.ready is not None:
            self._writer.write(wire.frame(message))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._writer is not None:  # there is a rank 0
            writer.close()
            return
        self._writer, self.failed, frames = writer, None, wire.Frames()
        try:
            while data := await reader.read(READ_BYTES):
                for one in frames.feed(data):
                    self._hear(wire.decode_reply(one))
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            self.failed = self.failed or wire.Failed(f"rank 0 sent what makes no sense: {error}", 1)
        finally:
            writer.close()
            self._gone()

    def _hear(self, reply: wire.Reply) -> None:
        match reply:
            case wire.Part() | wire.Began():
                if (asked := self._asked.get(reply.id)) is not None:
                    asked.hear(reply)
            case wire.Done():
                if (asked := self._asked.pop(reply.id, None)) is not None:
                    asked.hear(reply)
            case wire.Refused():
                self._refused(reply)
            case wire.Counted() | wire.Spelled():
                self._answered(reply)
            case wire.Figures():
                self._take_figures(reply)
            case wire.Processes():
                self._watch.begin(reply.pids)
            case wire.Progress():
                self.progress = reply
            case wire.Ready():
                self.on_ready(reply)
                self.ready = reply
                for asked in self._asked.values():
                    self._send(msgspec.structs.replace(asked.ask, so_far=asked.so_far))
                for one in self._questions.values():
                    self._send(one.question)
                self._is_ready.set()
                self.on_state(State(ready=True))
            case wire.Ending():  # by a launcher that ends all, where nobody has told us to: another run comes
                self.is_ending = not self._is_to_come
            case wire.Failed():
                self.failed = reply

    def _take_figures(self, figures: wire.Figures) -> None:
        before = {} if self.figures is None else {rank.rank: rank.disk_bytes for rank in self.figures.ranks}
        self.disk_rates = {
            rank.rank: (rank.disk_bytes - before.get(rank.rank, rank.disk_bytes)) / figures.interval_s
            for rank in figures.ranks
        }
        self.figures = figures
        self.on_figures(figures)

    def _refused(self, reply: wire.Refused) -> None:
        if reply.code == "server_ending":
            if self._is_to_come:
                return  # it is asked again
            error = self._over()
        else:
            error = ApiError(400, reply.problem, param=reply.what or None, code=reply.code or None)
        if (asked := self._asked.pop(reply.id, None)) is not None:
            asked.hear(error)
        elif (question := self._questions.get(reply.id)) is not None:
            question.hear(error)

    def _answered(self, reply: wire.Counted | wire.Spelled) -> None:
        if (question := self._questions.get(reply.id)) is not None and not question.answer.done():
            question.answer.set_result(reply)

    def _gone(self) -> None:
        """Rank 0 has ended. What is open waits for another, or is told so."""
        if self.failed is None and self._watch.ended and not self._watch.ended[0].startswith("r0 "):
            self.failed = wire.Failed(died(self._watch.ended[0]), 1)
        self._watch.end()
        if self.ready is not None and self._is_to_come:
            self._give_up_deadly()
        self._writer, self.figures = None, None
        self.ready = None
        if self._is_to_come:
            self._is_ready.clear()
            self.is_ending = False
            self.progress = wire.Progress("a machine or rank 0 has gone; the run is started again", 0.0)
            self.on_state(State(ready=False))
            return
        error = self._over()
        self.is_ending = True
        for asked in list(self._asked.values()):  # where it is heard, others may be forgotten
            asked.hear(error)
        self._asked.clear()
        for question in self._questions.values():
            question.hear(error)
        self._is_ready.set()
        self.ended.set()

    @property
    def _is_to_come(self) -> bool:
        """Whether another rank 0 comes after this one."""
        return self._options.outlives and not self._told_to_end

    @property
    def is_over(self) -> bool:
        """Whether this server is ending, so that what is asked again is for another."""
        return self.is_ending or self._told_to_end

    def _give_up_deadly(self) -> None:
        """A run has died that was to answer what is open: one of these may be why, so none is asked for ever."""
        said = "the run died each time that it was to answer this"
        error = unavailable(said if self.failed is None else f"{said}: {self.failed.line}", "run_failed")
        open_: list[Asked | _Question] = [*self._asked.values(), *self._questions.values()]
        for one in open_:
            one.deaths += 1
            if one.deaths == MAX_DEATHS:
                one.hear(error)
        self._asked = {number: asked for number, asked in self._asked.items() if asked.deaths < MAX_DEATHS}

    def end(self) -> None:
        """Have rank 0 end the run: it finishes what is under way within its grace, and at once if this is said again."""
        self._told_to_end = True
        self._send(wire.End())
        if self._writer is None:
            self._gone()

    def parent_gone(self) -> None:
        """Whoever started the front has ended; rank 0 will not come, if it is not there, and none after it."""
        if self._options.outlives:
            self.end()
        elif self._writer is None:
            self._gone()

    def _over(self) -> ApiError:
        """What is said where there is nobody to answer."""
        if self.failed is not None and self.failed.exit_code:
            return unavailable(self.failed.line, "run_failed")
        if self._writer is None and self.failed is None and not self.is_ending:
            return unavailable(ENDED, "run_failed")
        return unavailable("the server is ending", "server_ending")


def _check_numbers(question: wire.Question) -> None:
    """Raise ApiError for what cannot be sent, before it is kept to be sent again."""
    try:
        wire.frame(question)
    except OverflowError as error:
        raise ApiError(400, "a whole number in the body has more than 64 bits", code="invalid_json") from error
