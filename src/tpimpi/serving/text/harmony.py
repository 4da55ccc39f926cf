"""OpenAI's harmony response format, which gpt-oss speaks: an answer is messages, each on a channel.

    <|start|>assistant<|channel|>analysis<|message|>…<|end|><|start|>assistant<|channel|>final<|message|>…<|return|>

Each `<|…|>` is one token. The prompt ends behind `<|start|>assistant`. What stands on the channel "final" is the answer,
all else is reasoning: "analysis", and "commentary", where calls of tools stand too: their header has the name of the tool
(`to=functions.f`), and `<|call|>` ends them. Source: the format's description by OpenAI, and the package openai-harmony.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from tpimpi.serving.text.answer import Allowed, Piece, pieces
from tpimpi.serving.text.stream import TextStream
from tpimpi.serving.text.tool_forms import CALLED_MARK, RECIPIENT_MARK

START, CHANNEL, MESSAGE, END, RETURN = "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"
CONSTRAIN, CALL, END_OF_TEXT = "<|constrain|>", "<|call|>", "<|endoftext|>"
_NEEDED = (START, CHANNEL, MESSAGE, END, RETURN)
_ENDS_OF_GENERATION = (RETURN, CALL, END_OF_TEXT)
_ANSWERING_ROLE, _ANSWERING_CHANNEL = "assistant", "final"
_RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")


@dataclass(frozen=True)
class Harmony:
    """The control tokens of harmony in a vocabulary, by id."""

    names: dict[int, str]

    @classmethod
    def of(cls, find: Callable[[str], int | None], control_ids: Collection[int]) -> Harmony | None:
        """`find` gives the id of a token, or None. None where one that an answer cannot do without is no control token."""
        names = (*_NEEDED, CONSTRAIN, CALL, END_OF_TEXT)
        ids = {token_id: name for name in names if (token_id := find(name)) in control_ids and token_id is not None}
        return cls(ids) if set(_NEEDED) <= set(ids.values()) else None

    def ends(self, ends: frozenset[int]) -> frozenset[int]:
        """The ids that end an answer, where a model's files name these: "<|end|>" only ends a message of several."""
        ours = {token_id for token_id, name in self.names.items() if name in _ENDS_OF_GENERATION}
        return frozenset(token_id for token_id in ends | ours if self.names.get(token_id) != END)

    def stream(self, text: TextStream, prompt: Sequence[int]) -> HarmonyStream:
        """For the answer to `prompt`, which goes on where that ends: usually within the header of a message."""
        stream = HarmonyStream(self, text)
        starts = [place for place, token_id in enumerate(prompt) if self.names.get(token_id) == START]
        stream.enter(prompt[starts[-1] :] if starts else ())
        return stream


class HarmonyStream:
    """Tells reasoning from answer. Messages of the same part are lines of their own.

    A model that leaves the format loses no text of its messages: one that begins where another is not ended ends it, and
    text that comes in place of a header is the answer.
    """

    def __init__(self, harmony: Harmony, text: TextStream) -> None:
        self.tools: list[str] = []
        self._names, self._text = harmony.names, text
        self._header: str | None = None  # of the message, before its channel; None: in the message
        self._channel: str | None = None  # the header's rest
        self._instead: str | None = None  # behind the prompt's header: text that may be no header; None: it is none
        self._reasoning = False  # the message
        self._calling = False  # does the message call a tool?
        self._said = {False: False, True: False}  # has this part text in an earlier message?
        self._spoken = False  # has the message?

    def enter(self, prompt: Sequence[int]) -> None:
        """Go to where the prompt's last message, `prompt` from its first token on, ends; none is a message on no channel."""
        for token_id in prompt:
            self.push(token_id)
        self._text.flush()
        if self._header is not None and self._channel is None:
            self._instead = ""
        self.tools, self._said, self._spoken = [], {False: False, True: False}, False

    def push(self, token_id: int) -> list[Piece]:
        name = self._names.get(token_id)
        if name is None:
            return self._take(self._text.push(token_id))
        done = self._take(self._text.flush())
        if name == START:
            done += [*self._give_up_header(), *self._end_message()]
            self._header, self._channel = "", None
        elif name == CHANNEL:
            if self._header is None:  # not ended
                done += self._end_message()
                self._header = _ANSWERING_ROLE
            self._header += f" {self._instead or ''}"
            self._channel, self._instead = "", None
        elif name == CONSTRAIN:
            done += self._take(" ")
        elif name == MESSAGE:
            done += self._begin_message()
        else:
            done += self._end_message()
        return done

    def flush(self) -> list[Piece]:
        return self._take(self._text.flush()) + self._give_up_header()

    def allowed(self) -> Allowed:
        if self._instead is not None and not self._instead.strip():  # text here would be an answer without a channel
            return Allowed(answer=False, others=self._ids_of(CHANNEL))
        if self._header is None and not self._reasoning:
            return Allowed()
        return Allowed(answer=False, others=None, ends=self._ids_of(CALL) if self._calling else frozenset())

    def _ids_of(self, name: str) -> frozenset[int]:
        return frozenset(token_id for token_id, known in self._names.items() if known == name)

    def _take(self, text: str) -> list[Piece]:
        """Text where it stands: in a header, in place of one, or in a message."""
        if self._header is None:
            return self._say(text)
        if self._channel is not None:
            self._channel += text
        elif self._instead is None:
            self._header += text
        else:
            self._instead += text
            begun = self._instead.lstrip()
            if not "to=".startswith(begun[:3]):
                return self._give_up_header()
        return []

    def _give_up_header(self) -> list[Piece]:
        """What stands in its place is the answer."""
        instead, self._instead = self._instead, None
        if not instead or not instead.strip():
            return []
        self._header, self._reasoning = None, False
        return self._say(instead)

    def _begin_message(self) -> list[Piece]:
        if self._header is None:
            return []
        header = f"{self._header} {self._instead or ''} {self._channel or ''}"
        channel = (self._channel or "").split()[:1]
        role = self._header.split()[:1]
        tool = _RECIPIENT.search(header)
        self._header = self._channel = self._instead = None
        answering = role in ([], [_ANSWERING_ROLE]) and tool is None and not channel
        self._reasoning = not (answering or channel == [_ANSWERING_CHANNEL])
        self._calling = self._reasoning and tool is not None
        if tool is None or not self._reasoning:
            return []
        self.tools.append(tool[1])
        return [replace(piece, mark=f"{RECIPIENT_MARK}{tool[1]}") for piece in self._say(f"call of {tool[1]}: ")]

    def _end_message(self) -> list[Piece]:
        self._said[self._reasoning] |= self._spoken
        called, self._calling, self._spoken = self._calling, False, False
        return [Piece("", reasoning=True, mark=CALLED_MARK)] if called else []

    def _say(self, text: str) -> list[Piece]:
        if not text:
            return []
        if not self._spoken and self._said[self._reasoning]:
            text = f"\n{text}"
        self._spoken = True
        return pieces(text, reasoning=self._reasoning)
