"""What every API of the server is turned into and made from: a wanted answer, and the events of one as it comes.

OpenAI's chat completions, its responses and Anthropic's messages differ in words only: each has a module that turns its
request into a `Wanted`, and events into its objects, whole or streamed.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tpimpi.serving.server.wire import Chat, Grammar, Ids, Sampling, Text, TokenLogprob


class ToolChoice(msgspec.Struct, frozen=True):
    """Whether the answer calls a tool: as it likes, never, one at least, or the one that is named."""

    mode: Literal["auto", "none", "required", "named"] = "auto"
    name: str = ""
    parallel: bool = True  # more than one call in an answer


class Wanted(msgspec.Struct, frozen=True):
    """One request, whichever API it came by. Of `prompt` a Chat has messages and tools as OpenAI's chat completions do."""

    prompt: Chat | Text | Ids
    sampling: Sampling
    max_tokens: int | None = None
    stops: list[str] = []
    choices: int = 1  # answers to the same prompt
    logprobs: int | None = None
    echo: bool = False
    tool_choice: ToolChoice = ToolChoice()
    grammar: Grammar | None = None  # of what the answer has to be, where no tool is forced


class TextMore(msgspec.Struct, frozen=True):
    """More of the answer's text, with the log-probabilities of its tokens where they are wanted."""

    text: str
    logprobs: list[TokenLogprob] = []


class ReasoningMore(msgspec.Struct, frozen=True):
    """More of what comes before the answer."""

    text: str


class CallBegan(msgspec.Struct, frozen=True):
    """The answer calls a tool; its arguments follow."""

    index: int  # of the calls of this answer
    id: str
    name: str


class CallMore(msgspec.Struct, frozen=True):
    """More of the arguments, a JSON object, of a call that began."""

    index: int
    arguments: str


class Ended(msgspec.Struct, frozen=True):
    """The answer is whole."""

    why: Literal["end", "stop", "length", "tool_calls"]
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    stop: str = ""  # the stop string that ended it, if one did


Event = TextMore | ReasoningMore | CallBegan | CallMore | Ended
