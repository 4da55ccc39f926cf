"""Strings that know which of their characters a message brought, whatever a chat template does with them.

A private-use character stands for each character of content that a control token could be written with, so a token
that is found in what a template made of it is the template's own. To the template such a string is what it stands for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex

from tpimpi.errors import InputError

_ESCAPED = re.compile(r"\\ud[89ab][0-9a-f]{2}\\ud[c-f][0-9a-f]{2}")  # a character beyond 0xFFFF
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # planes 15 and 16


class Alphabet:
    """A private-use character for each of `characters`, none of which stands in `texts`.

    Raises InputError where the texts leave too few.
    """

    def __init__(self, characters: Iterable[str], texts: Iterable[str]) -> None:
        characters = set(characters)
        used = characters.union(*texts)
        free = (chr(code) for plane in _PRIVATE_USE for code in plane if chr(code) not in used)
        try:
            self._marks = {ord(char): next(free) for char in sorted(characters)}
        except StopIteration:
            raise InputError("the prompt holds all private-use characters of Unicode; leave some out") from None
        self._originals = {ord(mark): chr(char) for char, mark in self._marks.items()}
        self._escaped = {json.dumps(mark)[1:-1]: chr(char) for char, mark in self._marks.items()}

    def mark(self, text: str) -> str:
        """Text of the same length, in which private-use characters stand for some."""
        return text.translate(self._marks)

    def original(self, text: str) -> str:
        """What `mark` was given, also where a template has written it as JSON in ASCII."""
        if str.__contains__(text, "\\ud"):
            text = _ESCAPED.sub(lambda found: self._escaped.get(found[0], found[0]), text)
        return text.translate(self._originals)

    def is_mark(self, char: str) -> bool:
        return ord(char) in self._originals


class Content(str):
    """A string of marked characters that looks to a template like the text that it stands for.

    Methods compare and search that text; what they return is again Content. C code that takes the characters as they
    are (`"".join`, `json.dumps`) gets marks, so none is ever lost.
    """

    _alphabet: Alphabet

    def __new__(cls, marked: str, alphabet: Alphabet) -> Content:
        content = super().__new__(cls, marked)
        content._alphabet = alphabet
        return content

    @property
    def _text(self) -> str:
        return self._alphabet.original(self)

    def _of(self, marked: str) -> Content:
        return Content(marked, self._alphabet)

    # What it is compared with

    def __eq__(self, other: object) -> bool:
        return self._text == _plain(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __lt__(self, other: str) -> bool:
        return self._text < _plain(other)

    def __le__(self, other: str) -> bool:
        return self._text <= _plain(other)

    def __gt__(self, other: str) -> bool:
        return self._text > _plain(other)

    def __ge__(self, other: str) -> bool:
        return self._text >= _plain(other)

    def __hash__(self) -> int:
        return hash(self._text)

    def __contains__(self, part: object) -> bool:
        return _plain(part) in self._text

    # What it becomes part of

    def __str__(self) -> str:
        return self

    def __format__(self, spec: str) -> str:
        return self._of(str.__format__(self, spec))

    def __add__(self, other: str) -> Content:
        return self._of(str.__add__(self, other))

    def __radd__(self, other: str) -> Content:
        return self._of(str.__add__(other, self))

    def __mul__(self, times: SupportsIndex) -> Content:
        return self._of(str.__mul__(self, times))

    def __rmul__(self, times: SupportsIndex) -> Content:
        return self * times

    def __getitem__(self, key: SupportsIndex | slice[Any, Any, Any]) -> Content:
        return self._of(str.__getitem__(self, key))

    def __iter__(self) -> Iterator[str]:
        return map(self._of, str.__iter__(self))

    def join(self, parts: Iterable[str]) -> Content:
        return self._of(str.join(self, parts))

    # What it is cut to

    def lstrip(self, chars: str | None = None) -> Content:
        return self[len(self) - len(self._text.lstrip(_plain(chars))) :]

    def rstrip(self, chars: str | None = None) -> Content:
        return self[: len(self._text.rstrip(_plain(chars)))]

    def strip(self, chars: str | None = None) -> Content:
        return self.lstrip(chars).rstrip(chars)

    def removeprefix(self, prefix: str) -> Content:
        return self[len(prefix) :] if self.startswith(prefix) else self

    def removesuffix(self, suffix: str) -> Content:
        return self[: len(self) - len(suffix)] if suffix and self.endswith(suffix) else self

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(self._text.split(_plain(sep), maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._pieces(self._text.rsplit(_plain(sep), maxsplit), sep)

    def _pieces(self, texts: list[str], sep: str | None) -> list[str]:
        pieces: list[str] = []
        whole, at = self._text, 0
        for text in texts:
            start = whole.find(text, at) if sep is None else at
            at = start + len(text)
            pieces.append(self[start:at])
            at += len(sep or "")
        return pieces

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines: list[str] = []
        at = 0
        for whole, bare in zip(self._text.splitlines(True), self._text.splitlines(), strict=True):
            lines.append(self[at : at + len(whole if keepends else bare)])
            at += len(whole)
        return lines

    def partition(self, sep: str) -> tuple[str, str, str]:
        at = self.find(sep)
        return (self, self[:0], self[:0]) if at < 0 else (self[:at], self[at : at + len(sep)], self[at + len(sep) :])

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        at = self.rfind(sep)
        return (self[:0], self[:0], self) if at < 0 else (self[:at], self[at : at + len(sep)], self[at + len(sep) :])

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> Content:
        if not old:
            return self._of(str.replace(self, old, new, count))
        return self._of(str.join(new, self.split(old, count)))


def _plain(value: Any) -> Any:
    """What a string stands for, or a tuple of them; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return value._text if isinstance(value, Content) else value


def _asking(name: str) -> Any:
    def method(self: Content, *arguments: Any) -> Any:
        return getattr(self._text, name)(*map(_plain, arguments))

    return method


def _recasing(name: str) -> Any:
    def method(self: Content) -> Content:
        text: str = getattr(self._text, name)()
        if len(text) != len(self):
            return self._of(self._alphabet.mark(text))  # all of it counts as content
        pairs = zip(text, str.__iter__(self), strict=True)
        return self._of("".join(self._alphabet.mark(new) if self._alphabet.is_mark(old) else new for new, old in pairs))

    return method


for _name in ("startswith", "endswith", "find", "rfind", "index", "rindex", "count", "encode"):
    setattr(Content, _name, _asking(_name))
for _name in [name for name in dir(str) if name.startswith("is")]:
    setattr(Content, _name, _asking(_name))
for _name in ("upper", "lower", "casefold", "title", "capitalize", "swapcase"):
    setattr(Content, _name, _recasing(_name))
