"""Calls of tools in an answer, as it comes, by the form of the model's family (serving/text/tool_forms.py has them).

Text before a call is told at once; what may be the beginning of a mark is held back until it is known, as are the blanks
before one, which belong to no text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from tpimpi.serving.server.call_text import Calls, JsonSequence, NamedCall, Reader, TaggedCall
from tpimpi.serving.server.events import ENDS
from tpimpi.serving.server.exchange import Ended, Event, ReasoningMore, TextMore, Wanted
from tpimpi.serving.server.wire import Chat, Done, Part, Ready

Tools = Sequence[Mapping[str, Any]]
_FUNCTION = "<function="
_TO_FUNCTION = "to=functions."  # of harmony


@dataclass(frozen=True)
class _Form:
    """How a family marks a call: `opening`, and what reads on from there, given what of the mark was text. Only a control
    token is one where it is `only_mark`. `bare`: an answer that begins as JSON may be a call too."""

    opening: str
    reader: Callable[[Calls, str, Tools], Reader]
    only_mark: bool = False
    bare: bool = False


def _hermes(calls: Calls, opening: str, tools: Tools) -> Reader:
    return JsonSequence(calls, opening, closing="</tool_call>")


def _llama(calls: Calls, opening: str, tools: Tools) -> Reader:
    return JsonSequence(calls, opening, between=";")


def _qwen_coder(calls: Calls, opening: str, tools: Tools) -> Reader:
    return TaggedCall(
        calls,
        opening,
        tools,
        name=r"\s*<function=([^>\n]+)>",
        value=r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>",
        end=r"\s*</function>\s*</tool_call>",
        hopeless=lambda text: not _FUNCTION.startswith(text.lstrip()[: len(_FUNCTION)]) or "\n" in text.strip(),
    )


def _glm(calls: Calls, opening: str, tools: Tools) -> Reader:
    return TaggedCall(
        calls,
        opening,
        tools,
        name=r"\s*([\w.:-]+)\s*(?=<arg_key>|</tool_call>)",
        value=r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>",
        end=r"\s*</tool_call>",
        hopeless=lambda text: any(not (char.isalnum() or char in "_.:-<>/\n \t") for char in text),
    )


_FORMS = {
    "hermes": _Form("<tool_call>", _hermes),
    "qwen3-coder": _Form("<tool_call>", _qwen_coder),
    "glm": _Form("<tool_call>", _glm),
    "llama3": _Form("<|python_tag|>", _llama, only_mark=True, bare=True),
    "mistral": _Form("[TOOL_CALLS]", lambda calls, opening, tools: NamedCall(calls), only_mark=True),
    "mistral-args": _Form("[TOOL_CALLS]", lambda calls, opening, tools: NamedCall(calls), only_mark=True),
}


class ToolEvents:
    """The events of one answer of a model that was given tools."""

    def __init__(self, family: str, tools: Tools, *, parallel: bool = True) -> None:
        self._family, self._tools = family, tools
        self._form = _FORMS.get(family, _FORMS["hermes"])
        self._calls = Calls(short_ids=family.startswith("mistral"), parallel=parallel)
        self._reader: Reader | None = None
        self._held = ""  # text that is not told yet
        self._is_calling = False  # within a call of harmony
        self._has_arguments = False
        self._seen = 0  # calls, when text was told last
        self._is_first = True  # no text that is more than blanks so far
        self._reasoning_tokens = 0

    def part(self, part: Part) -> list[Event]:
        """What is certain with it."""
        if part.mark:
            self._mark(part.mark)
        if part.reasoning:
            self._reason(part.reasoning)
            self._reasoning_tokens += 0 if part.text else len(part.tokens)
        if part.text:
            self._text(part.text)
        return _with_logprobs(self._calls.take(), part)

    def done(self, done: Done) -> list[Event]:
        """What is left, and the end."""
        if self._reader is not None:
            self._reader.finish()
        self._end_call()
        if self._held.strip() or not self._calls.count:
            self._tell(self._held)
        why = ENDS[done.why]
        if self._calls.count and why == "end":
            why = "tool_calls"
        ended = Ended(why, done.completion_tokens, done.cached_tokens, self._reasoning_tokens, done.stop)  # type: ignore[arg-type]
        return [*self._calls.take(), ended]

    def _mark(self, mark: str) -> None:
        if self._family == "harmony":
            self._end_call()
            if mark.startswith(_TO_FUNCTION):  # not a tool that is built in
                self._is_calling, self._has_arguments = True, False
                self._calls.begin(mark.removeprefix(_TO_FUNCTION))
        elif self._reader is not None:
            self._go_on(self._reader.mark(mark))
        elif mark == self._form.opening:
            self._open("")

    def _reason(self, text: str) -> None:
        if self._is_calling:
            self._has_arguments = True
            self._calls.more(text)
        else:
            self._calls.events.append(ReasoningMore(text))

    def _end_call(self) -> None:
        if self._is_calling and not self._has_arguments:
            self._calls.more("{}")
        self._is_calling = False

    def _text(self, text: str) -> None:
        if self._family == "harmony":
            self._calls.text(text)
        elif self._reader is not None:
            self._go_on(self._reader.feed(text))
        else:
            self._held += text
            self._look()

    def _look(self) -> None:
        """For a call in the text that is held; what is none is told."""
        form, held = self._form, self._held
        if form.bare and self._is_first and (text := held.lstrip()).startswith("{"):
            self._held, self._is_first = "", False
            names = {tool.get("function", {}).get("name") for tool in self._tools}
            self._reader = JsonSequence(self._calls, held[: -len(text)], between=";", names=names)
            return self._go_on(self._reader.feed(text))
        place = -1 if form.only_mark else held.find(form.opening)
        if place >= 0:
            self._held = held[:place]
            self._open(form.opening)
            return self._go_on(self._reader.feed(held[place + len(form.opening) :]) if self._reader else None)
        keep = 0
        if not form.only_mark:
            lengths = range(min(len(held), len(form.opening) - 1), 0, -1)
            keep = next((length for length in lengths if held.endswith(form.opening[:length])), 0)
        certain = held[: len(held) - keep].rstrip()
        if not certain:
            return None
        self._tell(certain)
        self._held = held[len(certain) :]
        return None

    def _open(self, opening: str) -> None:
        """A call begins; the blanks before it are of no text."""
        before = self._held
        self._tell(before.rstrip())
        self._held = ""
        self._reader = self._form.reader(self._calls, before[len(before.rstrip()) :] + opening, self._tools)

    def _tell(self, text: str) -> None:
        """Text, without the blanks before it where it is the first behind a call."""
        calls = self._calls
        self._is_first = False
        calls.text(text if calls.count == self._seen else text.lstrip())
        self._seen = calls.count

    def _go_on(self, rest: str | None) -> None:
        """Behind a call, where it is over."""
        if rest is None:
            return
        self._reader, self._held = None, rest
        self._look()


def _with_logprobs(events: list[Event], part: Part) -> list[Event]:
    """The part's log-probabilities go with its first text, or with none."""
    if not part.logprobs:
        return events
    for place, event in enumerate(events):
        if isinstance(event, TextMore):
            return [*events[:place], replace(event, logprobs=part.logprobs), *events[place + 1 :]]
    return [*events, TextMore("", part.logprobs)]


def tool_events(wanted: Wanted, ready: Ready) -> ToolEvents | None:
    """What finds the calls in an answer; None where no tools are given."""
    if not isinstance(wanted.prompt, Chat) or not wanted.prompt.tools:
        return None
    return ToolEvents(ready.family, wanted.prompt.tools, parallel=wanted.tool_choice.parallel)
