"""What stands between the marks of a call, as it comes: JSON with a name and arguments, or tags with values.

A reader is given text until it says that the call is over. Arguments are told as they come. What turns out to be no call is
told as text, whole, with the mark before it; once the name of a call was told it stays one, whatever its arguments are.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from tpimpi.serving.server.exchange import CallBegan, CallMore, Event, TextMore

_ALPHABET = string.ascii_letters + string.digits
_FIELDS = frozenset({"name", "arguments", "parameters", "id", "type", "function"})
_SIDE = r'(?:"(?:id|type)"\s*:\s*"[^"\\]*"\s*,\s*)*'
_HEAD = re.compile(
    rf'\s*\{{\s*{_SIDE}"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*{_SIDE}"(?:arguments|parameters)"\s*:\s*(?=\{{)'
)
_FIRST_FIELD = re.compile(r'\s*\{\s*"([^"\\]*)"')


class Calls:
    """The calls of one answer so far, and the events that are to be told."""

    def __init__(self, *, short_ids: bool, parallel: bool) -> None:
        """`short_ids`: nine letters and digits, as Mistral's templates insist on; not `parallel`: only the first call is
        told."""
        self._short, self._parallel = short_ids, parallel
        self.count = 0
        self._muted = False
        self.events: list[Event] = []

    def begin(self, name: str) -> None:
        self._muted = self.count > 0 and not self._parallel
        if self._muted:
            return
        number = "".join(secrets.choice(_ALPHABET) for _ in range(9 if self._short else 24))
        self.events.append(CallBegan(self.count, number if self._short else f"call_{number}", name))
        self.count += 1

    def more(self, arguments: str) -> None:
        """Of the arguments of the call that began last."""
        if arguments and not self._muted:
            self.events.append(CallMore(self.count - 1, arguments))

    def text(self, text: str) -> None:
        if text:
            self.events.append(TextMore(text))

    def take(self) -> list[Event]:
        """What is to be told now."""
        events, self.events = self.events, []
        return events


class Reader(Protocol):
    """Of one call, or several that belong together."""

    def feed(self, text: str) -> str | None: ...  # what is behind it; None while it goes on

    def mark(self, mark: str) -> str | None: ...  # a control token, as `feed`

    def finish(self) -> None: ...  # nothing follows


class Extent:
    """Follows the text of a JSON object to its end."""

    def __init__(self) -> None:
        self.done = False
        self._depth, self._in_string, self._escaped = 0, False, False

    def feed(self, text: str) -> int:
        """How many characters of it belong to the object."""
        for place, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self.done = True
                    return place + 1
        return len(text)


class JsonCall:
    """`{"name": …, "arguments": {…}}`, or with "parameters". `names`: others are no calls; None: any may be one."""

    def __init__(self, calls: Calls, names: Collection[str] | None = None) -> None:
        self._calls, self._names = calls, names
        self.raw = ""
        self.is_call: bool | None = None  # None: not known yet
        self._object, self._arguments = Extent(), Extent()

    def feed(self, text: str) -> str | None:
        taken = self._object.feed(text)
        part, rest = text[:taken], text[taken:]
        self.raw += part
        if self.is_call is None:
            self._look()
        elif self.is_call:
            self._tell(part)
        if self._object.done and self.is_call is None:
            self._take_whole()
        return rest if self._object.done or self.is_call is False else None

    def finish(self) -> None:
        """It stays as it is: where there is no name yet it is no call."""
        self.is_call = bool(self.is_call)

    def _look(self) -> None:
        """Whether it is a call, as far as that can be said."""
        if head := _HEAD.match(self.raw):
            self._begin(_name_of(head[1]))
            if self.is_call:
                self._tell(self.raw[head.end() :])
            return
        first = _FIRST_FIELD.match(self.raw)
        blank = self.raw.lstrip()
        if (blank and not blank.startswith("{")) or (first is not None and first[1] not in _FIELDS):
            self.is_call = False

    def _begin(self, name: object) -> None:
        self.is_call = isinstance(name, str) and bool(name) and (self._names is None or name in self._names)
        if self.is_call:
            self._calls.begin(str(name))

    def _tell(self, text: str) -> None:
        if not self._arguments.done:
            self._calls.more(text[: self._arguments.feed(text)])

    def _take_whole(self) -> None:
        """Of a call whose fields come in another order, or whose arguments are no object."""
        try:
            found = json.loads(self.raw)
        except (ValueError, RecursionError):
            found = {}
        found = found.get("function", found) if isinstance(found.get("function"), dict) else found
        arguments = found.get("arguments", found.get("parameters", {}))
        self._begin(found.get("name", found.get("function")))
        if self.is_call:
            self._calls.more(
                arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
            )


def _name_of(spelled: str) -> object:
    try:
        return json.loads(spelled)
    except ValueError:
        return None


class JsonSequence:
    """JSON calls one after another, `between` them what is skipped, up to `closing` where there is one."""

    def __init__(
        self, calls: Calls, opening: str, *, closing: str = "", between: str = "", names: Collection[str] | None = None
    ) -> None:
        self._calls, self._opening, self._closing, self._between, self._names = calls, opening, closing, between, names
        self._call: JsonCall | None = JsonCall(calls, names)
        self._behind = ""  # of a call, until it is known what that is

    def feed(self, text: str) -> str | None:
        while True:
            if self._call is not None:
                rest = self._call.feed(text)
                if rest is None:
                    return None
                if not self._call.is_call:
                    self._calls.text(self._opening + self._call.raw)
                    return rest
                self._call, self._opening, text = None, "", rest
            self._behind += text
            behind = self._behind.lstrip(f" \t\r\n{self._between}")
            if self._closing and behind.startswith(self._closing):
                return behind.removeprefix(self._closing)
            if not behind or (self._closing and self._closing.startswith(behind)):
                return None
            if not behind.startswith("{"):
                return behind
            self._call, self._behind, text = JsonCall(self._calls, self._names), "", behind

    def mark(self, mark: str) -> str | None:
        return self.feed(mark)

    def finish(self) -> None:
        if self._call is not None:
            self._call.finish()
            if not self._call.is_call:
                self._calls.text(self._opening + self._call.raw)


class NamedCall:
    """Mistral's: a list of JSON calls, or `NAME[ARGS]{…}`, with `[CALL_ID]` and an id between."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._list: JsonSequence | None = None
        self._name, self._is_named = "", False
        self._arguments: Extent | None = None

    def feed(self, text: str) -> str | None:
        if self._list is not None:
            return self._list.feed(text)
        if self._arguments is None:
            if not self._name.strip() and not self._is_named and text.lstrip().startswith("["):
                self._list = JsonSequence(self._calls, "[", closing="]", between=",")
                return self._list.feed(text.lstrip().removeprefix("["))
            before, brace, behind = text.partition("{")
            self._name += "" if self._is_named else before
            if not brace:
                return None
            self._calls.begin(self._name.strip())
            self._arguments, text = Extent(), f"{{{behind}"
        taken = self._arguments.feed(text)
        self._calls.more(text[:taken])
        return text[taken:] if self._arguments.done else None

    def mark(self, mark: str) -> str | None:
        self._is_named = True
        return None

    def finish(self) -> None:
        if self._list is not None:
            self._list.finish()
        elif self._arguments is None:
            self._calls.text(self._name)


class TaggedCall:
    """A name, then keys and values between tags, up to `closing`. The arguments are told value by value.

    `name` is a pattern of what the call begins with, with the name as its group, `value` one of a key and its value;
    `end` is one of what ends the values. `hopeless`: whether what has come is no beginning of a name.
    """

    def __init__(
        self,
        calls: Calls,
        opening: str,
        tools: Sequence[Mapping[str, Any]],
        *,
        name: str,
        value: str,
        end: str,
        hopeless: Callable[[str], bool],
    ) -> None:
        self._calls, self._opening, self._tools = calls, opening, tools
        self._patterns = tuple(re.compile(pattern, re.DOTALL) for pattern in (name, value, end))
        self._hopeless = hopeless
        self._buffer, self._values = "", -1  # -1: no name yet
        self._types: Mapping[str, Any] = {}

    def feed(self, text: str) -> str | None:
        self._buffer += text
        name, value, end = self._patterns
        if self._values < 0:
            if (found := name.match(self._buffer)) is None:
                if not self._hopeless(self._buffer):
                    return None
                return self._give_up()
            self._begin(found[1].strip())
            self._buffer = self._buffer[found.end() :]
        while True:
            if found := end.match(self._buffer):
                self._close()
                return self._buffer[found.end() :]
            if (found := value.match(self._buffer)) is None:
                return None
            self._tell(found[1].strip(), found[2])
            self._buffer = self._buffer[found.end() :]

    def mark(self, mark: str) -> str | None:
        return self.feed(mark)

    def finish(self) -> None:
        if self._values < 0:
            self._give_up()
        else:
            self._close()

    def _give_up(self) -> str:
        self._calls.text(self._opening + self._buffer)
        return ""

    def _begin(self, name: str) -> None:
        self._values = 0
        self._calls.begin(name)
        for tool in self._tools:
            function = tool.get("function", {})
            if function.get("name") == name:
                self._types = (function.get("parameters") or {}).get("properties") or {}

    def _tell(self, key: str, text: str) -> None:
        before = ", " if self._values else "{"
        value = _typed(text, self._types.get(key))
        self._calls.more(f"{before}{json.dumps(key, ensure_ascii=False)}: {json.dumps(value, ensure_ascii=False)}")
        self._values += 1

    def _close(self) -> None:
        self._calls.more("}" if self._values else "{}")


def _typed(text: str, schema: object) -> Any:
    """A value that a model wrote as text: JSON, unless its schema says that it is a string."""
    kind = schema.get("type") if isinstance(schema, dict) else None
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
