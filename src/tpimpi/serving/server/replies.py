"""What rank 0 replies to one request: for its client, and where that gives an Idempotency-Key for one that asks again.

A client that joins hears all replies from the first. When the last one has gone, nothing more is computed until one joins
again. What was under way in another server that was killed, and stands in its journal, goes on by itself (see kept.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from tpimpi.serving.server import wire
from tpimpi.serving.server.link import Asked, Heard, RankLink
from tpimpi.serving.server.problems import ApiError

Hearing = asyncio.Queue[tuple[int, Heard]]  # of one client: replies, each with the number of its answer


class Replies:
    """To all that one request asks."""

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._asks: list[wire.Ask] = []
        self._asked: list[Asked] = []  # of rank 0, while they are under way
        self._clients: list[Hearing] = []
        self._joined = 0  # clients, also those that do not hear yet
        self._place: contextlib.ExitStack | None = None  # in the queue

    @property
    def is_done(self) -> bool:
        """Whether all answers have their end, so that nothing is left to be computed."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether there is neither a client nor anything under way."""
        return not self._joined and not self._asked

    @contextlib.contextmanager
    def joined(self, answers: int) -> Iterator[Hearing]:
        """Inside, a client has a place for so many answers, and what it is to hear after `ask` comes to what this gives.
        Raises ApiError where there is no place."""
        hearing: Hearing = asyncio.Queue()
        self._joined += 1
        try:
            if not self.is_done:
                self._take_place(answers)
            yield hearing
        finally:
            self._joined -= 1
            if hearing in self._clients:
                self._clients.remove(hearing)
            if not self._joined:
                self._leave()

    def ask(self, hearing: Hearing, make: Callable[[], list[wire.Ask]]) -> bool:
        """A client that has joined hears the replies; what it asks is made and asked for, unless it was. Returns whether
        it was made now, so that nothing was computed of it before."""
        begins = not self._asks and not self.is_done
        if begins:
            self._asks = make()
        for one in self._heard():
            hearing.put_nowait(one)
        self._clients.append(hearing)
        if not self._asked and not self.is_done:
            try:
                self._go_on()
            except ApiError:
                self._forget_asked()  # some may have been asked for before
                self._asks = [] if begins else self._asks
                raise
            self._note_asked(begins=begins)
        return begins

    def hear(self, index: int, reply: Heard) -> None:
        """Rank 0 says something of an answer, or the link that there will be none: no other is wanted then, and a client
        that asks later begins anew."""
        if isinstance(reply, ApiError):
            self._forget_asked()
        for one in self._clients:
            one.put_nowait((index, reply))

    def _go_on(self) -> None:
        """Ask rank 0 for what has no end yet, from where it is. Raises ApiError for what cannot be asked."""
        so_far: dict[int, list[int]] = {}
        began, ended = set(), set()
        for index, reply in self._heard():
            if isinstance(reply, wire.Began):
                began.add(index)
            elif isinstance(reply, wire.Part):
                so_far.setdefault(index, []).extend(reply.tokens)
            else:
                ended.add(index)
        for index, ask in enumerate(self._asks):
            if index not in ended:
                again = msgspec.structs.replace(ask, so_far=so_far.get(index, []))
                self._asked.append(self._link.ask(again, self, index, began=index in began))

    def _take_place(self, answers: int, *, beyond: bool = False) -> None:
        if self._place is None:
            place = contextlib.ExitStack()
            place.enter_context(self._link.place(answers, beyond=beyond))
            self._place = place

    def _stop(self) -> None:
        """Nothing of it is computed any more."""
        self._forget_asked()
        if self._place is not None:
            self._place.close()
            self._place = None

    def _forget_asked(self) -> None:
        for one in self._asked:
            self._link.forget(one)
        self._asked = []

    def _leave(self) -> None:
        """The last client has gone."""
        self._stop()

    # What is kept of it: nothing here

    def _heard(self) -> list[tuple[int, Heard]]:
        return []

    def _note_asked(self, *, begins: bool) -> None:
        pass
