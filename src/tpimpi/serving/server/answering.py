"""How a request that wants answers is done: it gets a place, waits for the model, asks, and is told what comes, whole or as
a stream; a client that goes away is noticed, and what it wanted is cancelled.

Each API gives a `Form`, which makes its objects of events.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from tpimpi.serving.server import wire
from tpimpi.serving.server.events import EventStream, PlainEvents
from tpimpi.serving.server.exchange import Event, Wanted
from tpimpi.serving.server.link import Heard, RankLink
from tpimpi.serving.server.metrics import Metrics
from tpimpi.serving.server.problems import ApiError, unavailable
from tpimpi.serving.server.replies import Hearing, Replies
from tpimpi.serving.server.tool_calls import tool_events
from tpimpi.serving.server.tool_grammars import with_tools

KEEP_ALIVE_S = 15.0  # a stream that has nothing to say says so, for what is between
SEED_BITS = 62
EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Usage(msgspec.Struct):
    """Tokens of a request's prompts and answers."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def as_openai(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


class Form(Protocol):
    """How one API writes an answer. `index` is the number of the choice."""

    streams: bool

    def use_model(self, ready: wire.Ready) -> None: ...  # what answers

    def begin(self, usage: Usage) -> Iterator[bytes]: ...  # of a stream, once the prompts were taken, which `usage` has

    def event(self, index: int, event: Event) -> Iterator[bytes]: ...  # of a stream, or nothing where it is whole

    def end(self, usage: Usage) -> Iterator[bytes]: ...  # of a stream

    def error(self, error: ApiError) -> Iterator[bytes]: ...  # of a stream that cannot go on

    def whole(self, usage: Usage) -> Any: ...  # the object, after all events


def server_sent(value: Any) -> bytes:
    """One event of a stream, as OpenAI writes it."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


class Answers:
    """A response that is made while it is sent."""

    def __init__(
        self,
        link: RankLink,
        replies: Replies,
        metrics: Metrics,
        wanted: list[Wanted],
        form: Form,
        *,
        owner: str,
        model: str | None,
        time_limit: float,
        names: tuple[str, ...] = (),
    ) -> None:
        """`wanted` are the prompts, each with its choices; `model` is the name that the client gives."""
        self._link, self._replies, self._metrics, self._wanted, self._form = link, replies, metrics, wanted, form
        self._owner, self._model, self._time_limit, self._names = owner, model, time_limit, names
        self._usage = Usage()
        self._began = time.monotonic()
        self._has_token = self._has_begun = False
        self._is_new = True  # else it was asked before, and the time that it takes tells nothing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._within_limit(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                await work
            else:
                self._metrics.cancelled.inc()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _within_limit(self, send: Send) -> None:
        try:
            try:
                async with asyncio.timeout(self._time_limit):
                    await self._work(send)
            except TimeoutError as error:
                raise unavailable(
                    f"the answer was not done within {self._time_limit:g} s", "request_timeout", 504
                ) from error
        except Exception as error:
            if not self._has_begun:
                raise
            known = (
                error if isinstance(error, ApiError) else ApiError(500, "the server has a fault", code="internal_error")
            )
            for data in self._form.error(known):
                await _send(send, data)
            await _send(send, b"", more=False)
            if known is not error:
                raise

    async def _work(self, send: Send) -> None:
        count = sum(one.choices for one in self._wanted)
        with self._replies.joined(count) as hearing:
            ready = await self._link.until_ready()
            check_model(self._model, ready, self._names)
            self._form.use_model(ready)
            self._wanted = [_with_tools(wanted, ready) for wanted in self._wanted]
            self._is_new = self._replies.ask(hearing, self._asks)
            streams: list[EventStream] = [
                tool_events(wanted, ready) or PlainEvents() for wanted in self._wanted for _ in range(wanted.choices)
            ]
            events = self._events_of(hearing, streams, await self._all_began(hearing, count))
            if self._form.streams:
                await self._stream(send, events)
            else:
                await self._whole(send, events)

    def _asks(self) -> list[wire.Ask]:
        """All that is wanted."""
        asks = []
        for wanted in self._wanted:
            seed = wanted.sampling.seed if wanted.sampling.seed is not None else secrets.randbits(SEED_BITS)
            for choice in range(wanted.choices):
                sampling = msgspec.structs.replace(wanted.sampling, seed=seed + choice)
                asks.append(_ask(wanted, sampling, self._owner))
        return asks

    async def _all_began(self, hearing: Hearing, count: int) -> list[tuple[int, Heard]]:
        """Until all prompts were taken; what came meanwhile. Raises ApiError where one was not."""
        early: list[tuple[int, Heard]] = []
        prompts: set[int] = set()
        ends, first = 0, 0
        choices: dict[int, int] = {}
        for number, wanted in enumerate(self._wanted):
            choices |= {first + choice: number for choice in range(wanted.choices)}
            first += wanted.choices
        while ends < count:
            index, reply = await hearing.get()
            if isinstance(reply, ApiError):
                raise reply
            if not isinstance(reply, wire.Began):
                early.append((index, reply))
                continue
            ends += 1
            if choices[index] not in prompts:  # of choices the prompt counts once
                prompts.add(choices[index])
                self._usage.prompt_tokens += reply.prompt_tokens
        return early

    async def _events_of(
        self, hearing: Hearing, streams: list[EventStream], early: list[tuple[int, Heard]]
    ) -> AsyncIterator[tuple[int, Event] | None]:
        """The events of all answers; None where nothing came for a while."""
        left = len(streams)
        while left:
            if early:
                index, reply = early.pop(0)
            else:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):
                        index, reply = await hearing.get()
                except TimeoutError:
                    yield None
                    continue
            if isinstance(reply, ApiError):
                raise reply
            if isinstance(reply, wire.Part):
                self._note_token()
                for event in streams[index].part(reply):
                    yield index, event
            elif isinstance(reply, wire.Done):
                left -= 1
                for event in streams[index].done(reply):
                    yield index, event
                self._usage.completion_tokens += reply.completion_tokens
                self._usage.cached_tokens = max(self._usage.cached_tokens, reply.cached_tokens)

    def _note_token(self) -> None:
        if not self._has_token:
            self._has_token = True
            if self._is_new:
                self._metrics.first_token.observe(time.monotonic() - self._began)

    def _note_end(self) -> None:
        if self._is_new:
            self._metrics.duration.observe(time.monotonic() - self._began)

    async def _stream(self, send: Send, events: AsyncIterator[tuple[int, Event] | None]) -> None:
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": list(EVENT_STREAM)})
        for data in self._form.begin(self._usage):
            await _send(send, data)
        async for found in events:
            if found is None:
                await _send(send, b": still here\n\n")
                continue
            self._note_event(found[1])
            if data := b"".join(self._form.event(*found)):
                await _send(send, data)
        for data in self._form.end(self._usage):
            await _send(send, data)
        await _send(send, b"", more=False)
        self._note_end()

    async def _whole(self, send: Send, events: AsyncIterator[tuple[int, Event] | None]) -> None:
        async for found in events:
            if found is not None:
                self._note_event(found[1])
                for _ in self._form.event(*found):
                    pass
        body = msgspec.json.encode(self._form.whole(self._usage))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        self._has_begun = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await _send(send, body, more=False)
        self._note_end()

    def _note_event(self, event: Event) -> None:
        self._usage.reasoning_tokens += getattr(event, "reasoning_tokens", 0)


def _with_tools(wanted: Wanted, ready: wire.Ready) -> Wanted:
    try:
        return with_tools(wanted, ready)
    except ValueError as error:
        raise ApiError(400, f"{error}; name one that is there", param="tool_choice") from error


def _ask(wanted: Wanted, sampling: wire.Sampling, owner: str) -> wire.Ask:
    return wire.Ask(
        id=0,  # which the link chooses
        owner=owner,
        prompt=wanted.prompt,
        sampling=sampling,
        max_tokens=wanted.max_tokens,
        stops=wanted.stops,
        logprobs=wanted.logprobs,
        echo=wanted.echo,
        grammar=wanted.grammar,
    )


def check_model(name: str | None, ready: wire.Ready, names: tuple[str, ...]) -> None:
    """Raise ApiError where a request names a model that is not the one that is here. A name that is left out, or empty, is
    this one's; letters may be large or small, and what stands before a / may be missing."""
    if not name:
        return
    known = {model_name(ready), *names}
    if name.lower() not in {part for one in known for part in (one.lower(), one.lower().rpartition("/")[2])}:
        raise ApiError(
            404,
            f"The model `{name[:100]}` does not exist; here is `{model_name(ready)}` (serve --name gives it other names)",
            param="model",
            code="model_not_found",
        )


def model_name(ready: wire.Ready) -> str:
    return ready.model


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
