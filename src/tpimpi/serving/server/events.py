"""From what rank 0 says of an answer to events: text, reasoning, calls of tools, the end."""

from __future__ import annotations

from typing import Protocol

from tpimpi.serving.server.exchange import Ended, Event, ReasoningMore, TextMore
from tpimpi.serving.server.wire import Done, Part

ENDS = {"end": "end", "stop": "stop", "max_tokens": "length", "context": "length", "cancelled": "stop"}


class EventStream(Protocol):
    """Of one answer, as its parts come."""

    def part(self, part: Part) -> list[Event]: ...

    def done(self, done: Done) -> list[Event]: ...  # what is left, and the end


class PlainEvents:
    """An answer without calls of tools."""

    def __init__(self) -> None:
        self._reasoning_tokens = 0

    def part(self, part: Part) -> list[Event]:
        events: list[Event] = []
        if part.reasoning:
            events.append(ReasoningMore(part.reasoning))
            self._reasoning_tokens += 0 if part.text else len(part.tokens)
        if part.text or part.logprobs:
            events.append(TextMore(part.text, part.logprobs))
        return events

    def done(self, done: Done) -> list[Event]:
        why = ENDS[done.why]
        return [Ended(why, done.completion_tokens, done.cached_tokens, self._reasoning_tokens, done.stop)]  # type: ignore[arg-type]
