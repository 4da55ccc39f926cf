"""Requests with an Idempotency-Key (draft-ietf-httpapi-idempotency-key-header): asked again, they get what there is.

Kept are those under way, and for a while those that have their answers, or whose clients have gone: in memory, and in the
journal where there is one. Another server that begins with that journal goes on with those that were under way.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator

import msgspec
from starlette.datastructures import Headers

from tpimpi.serving.server import wire
from tpimpi.serving.server.completions import MAX_PROMPTS
from tpimpi.serving.server.journal import Begun, Forgotten, Held, Journal, Record, Replied, Reply
from tpimpi.serving.server.link import Heard, RankLink
from tpimpi.serving.server.openai_fields import MAX_CHOICES
from tpimpi.serving.server.problems import ApiError, unavailable
from tpimpi.serving.server.replies import Replies

KEPT_S = 24 * 3600.0  # since a request came
MAX_KEPT = 256  # requests that nobody waits for
MAX_KEPT_BYTES = 1 << 24  # of these, prompts and answers, as messages
TIDY_S = 60.0
HEADER = "Idempotency-Key"
# A string of RFC 8941, as the draft has it; or without quotation marks, as most clients send it.
_KEY = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\]){1,255})"|([!#-~]{1,255})')


def key_of(headers: Headers) -> str | None:
    """The Idempotency-Key of a request, None where it has none. Raises ApiError for what is no key."""
    given = headers.getlist(HEADER)
    if not given:
        return None
    match = _KEY.fullmatch(given[0].strip()) if len(given) == 1 else None
    if match is None:
        raise ApiError(
            400,
            f"{HEADER} has to be one string of 1 to 255 ASCII characters; with a blank or a quotation mark in it between "
            'quotation marks, as "a key"',
            param=HEADER,
        )
    return re.sub(r"\\(.)", r"\1", match[1]) if match[1] is not None else match[2]


def _together(asks: list[wire.Ask]) -> tuple[list[wire.Ask], list[int]]:
    """The first ask of each prompt, and how many follow each other from it that differ in their seeds alone, by one each."""
    firsts: list[wire.Ask] = []
    choices: list[int] = []
    for ask in asks:
        if firsts and ask == _choice(firsts[-1], choices[-1]):
            choices[-1] += 1
        else:
            firsts.append(ask)
            choices.append(1)
    return firsts, choices


def _choice(ask: wire.Ask, number: int) -> wire.Ask:
    """The ask of another choice for the same prompt."""
    sampling = ask.sampling
    if sampling.seed is None:
        return ask
    return msgspec.structs.replace(ask, sampling=msgspec.structs.replace(sampling, seed=sampling.seed + number))


class KeptReplies(Replies):
    """Those of a request that may be asked again."""

    def __init__(self, link: RankLink, kept: Kept, about: Begun) -> None:
        """`about` has no asks, or those of a request that was under way in another server. Raises ValueError for choices
        that are not those of its asks, or more answers than a request can have."""
        super().__init__(link)
        self._kept, self.about = kept, about
        choices = about.choices or [1] * len(about.asks)
        of_asks = sum(choices) if about.asks else about.answers
        if not 0 <= of_asks == about.answers <= MAX_PROMPTS * MAX_CHOICES or min(choices, default=1) < 1:
            raise ValueError(about.number)
        self._asks = [
            _choice(ask, number) for ask, count in zip(about.asks, choices, strict=True) for number in range(count)
        ]
        self._log: list[tuple[int, Reply]] = []
        self._ended: set[int] = set()
        self.held = False  # nobody waits for it
        self.bytes = len(msgspec.msgpack.encode(about))

    @property
    def is_done(self) -> bool:
        return 0 < self.about.answers == len(self._ended)

    @property
    def goes_on(self) -> bool:
        """Whether it is to be answered though no client is there yet."""
        return bool(self._asks) and not self.held and not self.is_done

    def records(self) -> Iterator[Record]:
        """What the journal has of it."""
        if self.about.answers:
            yield self.about
            yield Replied([(self.about.number, index, reply) for index, reply in self._log])
            yield Held(self.about.number, self.held)

    def take(self, index: int, reply: Reply) -> None:
        """A reply comes, or stands in the journal. Raises ValueError for one that none of its answers can have."""
        if not 0 <= index < self.about.answers or index in self._ended:
            raise ValueError(index)
        self._log.append((index, reply))
        self.bytes += len(wire.frame(reply))
        if not isinstance(reply, wire.Done):
            return
        self._ended.add(index)
        if self.is_done:
            self._asks = []
            self.bytes -= len(msgspec.msgpack.encode(self.about.asks))
            self.about = msgspec.structs.replace(self.about, asks=[], choices=[])

    def hear(self, index: int, reply: Heard) -> None:
        super().hear(index, reply)
        if isinstance(reply, ApiError):
            if not self._link.is_over:  # else another server goes on with it
                self._kept.forget(self)
            if not self._joined:
                self._stop()
            return
        self.take(index, reply)
        self._note(Replied([(self.about.number, index, reply)]))
        if self.is_done:
            self._stop()
            self._kept.tidy()

    def answer_alone(self, time_limit: float) -> None:
        """Go on without a client, for so many seconds at most."""
        self._take_place(self.about.answers, beyond=True)
        self._go_on()
        asyncio.get_running_loop().call_later(time_limit, self._end_alone)

    def _end_alone(self) -> None:
        if not self._joined and self._asked:
            self._leave()

    def begin_again(self, model: str) -> None:
        """What there is of its answers came from another model: none of it counts, and clients that heard it have to ask
        again. Rank 0 has yet to be asked."""
        was_asked = bool(self._asked)
        if self._log:  # else they would get the words of both
            for client in self._clients:
                client.put_nowait((0, unavailable("another model answers now; ask again", "model_changed")))
            self._clients = []
        self._forget_asked()
        self._log, self._ended = [], set()
        self.about = msgspec.structs.replace(self.about, model=model)
        self.bytes = len(msgspec.msgpack.encode(self.about))
        self._note(self.about)
        if self.held:  # which a reader of the journal takes back with each beginning
            self._note(Held(self.about.number, held=True))
        if was_asked:
            self._go_on()

    def _note(self, record: Record, *, now: bool = False) -> None:
        """For the journal, unless this is forgotten there."""
        if self._kept.has(self):
            self._kept.note(record, now=now)

    def _heard(self) -> list[tuple[int, Heard]]:
        return list(self._log)

    def _note_asked(self, *, begins: bool) -> None:
        self.held = False
        if not begins:
            self._note(Held(self.about.number, held=False))
            return
        ready = self._link.ready
        model = "" if ready is None else ready.fingerprint
        asks, choices = _together(self._asks)
        self.about = msgspec.structs.replace(
            self.about, model=model, answers=len(self._asks), asks=asks, choices=choices
        )
        self.bytes = len(msgspec.msgpack.encode(self.about))
        self._note(self.about, now=True)

    def _leave(self) -> None:
        under_way = bool(self._asked)
        self._stop()
        if not self.about.answers:
            self._kept.forget(self)
        elif under_way and not self._link.is_over:
            self.held = True
            self._note(Held(self.about.number, held=True), now=True)
        self._kept.tidy()


class Kept:
    """All of them, by owner and key."""

    def __init__(self, link: RankLink) -> None:
        self._link = link
        self._by_key: dict[tuple[str, str], KeptReplies] = {}
        self._by_number: dict[int, KeptReplies] = {}
        self._numbers = itertools.count(1)
        self._journal: Journal | None = None
        link.on_ready = self._check_model

    def replies(self, owner: str, key: str, fingerprint: str) -> KeptReplies:
        """Those of the request that this owner gave this key. Raises ApiError where that was another request."""
        self.tidy()
        found = self._by_key.get((owner, key))
        if found is None:
            found = self._add(Begun(next(self._numbers), owner, key, fingerprint, time.time()))
        elif found.about.fingerprint != fingerprint:
            raise ApiError(
                422,
                f"this {HEADER} was given with another request; give each request a key of its own",
                param=HEADER,
                code="idempotency_key_reused",
            )
        return found

    # The journal

    def take(self, record: Record) -> None:
        """A record of the journal, in its order. Raises KeyError or ValueError for one that cannot follow."""
        match record:
            case Begun():
                if (before := self._by_number.get(record.number)) is not None:
                    self._remove(before)
                if not record.answers or (record.owner, record.key) in self._by_key:
                    raise ValueError(record.number)
                self._add(record)
            case Replied():
                for number, index, reply in record.replies:
                    self._by_number[number].take(index, reply)
            case Held():
                self._by_number[record.number].held = record.held
            case Forgotten():
                self._remove(self._by_number[record.number])

    def use(self, journal: Journal, time_limit: float) -> None:
        """Keep them there too; what stands in it was taken. What was under way goes on, for so many seconds at most."""
        self._numbers = itertools.count(max(self._by_number, default=0) + 1)
        self._journal = journal
        going_on = [one for one in self._by_key.values() if one.goes_on]
        for one in going_on:
            one.answer_alone(time_limit)
        self.tidy()  # not before: those that go on would count as idle, and could be forgotten
        if going_on:
            journal.say(f": {len(going_on)} of the requests in it were under way, and go on")

    async def tidy_now_and_then(self) -> None:
        """What is kept is kept no longer than it should be."""
        while True:
            await asyncio.sleep(TIDY_S)
            self.tidy()

    def note(self, record: Record, *, now: bool = False) -> None:
        """A record for the journal."""
        if self._journal is not None:
            self._journal.add(record, now=now)

    def end(self) -> None:
        """What becomes of requests from now on, as this process ends, is not for the journal; it stays ours until then."""
        if self._journal is not None:
            self._journal.flush()
            self._journal = None

    def records(self) -> Iterator[Record]:
        """What stands in a journal that is written anew."""
        for one in self._by_key.values():
            yield from one.records()

    # What is kept

    def tidy(self) -> None:
        """Forget what is too old, or too much, of what nobody waits for; where nothing is under way the journal is small."""
        idle = [one for one in self._by_key.values() if one.is_idle]
        total, oldest = sum(one.bytes for one in idle), time.time() - KEPT_S
        for left, one in zip(range(len(idle), 0, -1), idle, strict=True):  # the first ones came first
            if left > MAX_KEPT or total > MAX_KEPT_BYTES or one.about.at < oldest:
                total -= one.bytes
                self.forget(one)
        if self._journal is not None:
            self._journal.try_again()  # though nothing new may come
            if all(one.is_idle for one in self._by_key.values()):
                self._journal.tidy(empty=not self._by_key)

    def has(self, one: KeptReplies) -> bool:
        """Whether it is kept."""
        return self._by_number.get(one.about.number) is one

    def forget(self, one: KeptReplies) -> None:
        """It is not kept any more."""
        if self.has(one):
            self._remove(one)
            if one.about.answers:
                self.note(Forgotten(one.about.number))

    def _add(self, about: Begun) -> KeptReplies:
        added = KeptReplies(self._link, self, about)
        self._by_key[about.owner, about.key] = self._by_number[about.number] = added
        return added

    def _remove(self, one: KeptReplies) -> None:
        del self._by_key[one.about.owner, one.about.key], self._by_number[one.about.number]

    def _check_model(self, ready: wire.Ready) -> None:
        """Another model answers from now on than did before: what has no end yet begins again."""
        for one in self._by_key.values():
            if one.about.answers and not one.is_done and one.about.model != ready.fingerprint:
                one.begin_again(ready.fingerprint)
