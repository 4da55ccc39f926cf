"""Tokens that stand beside a vocabulary, and where a text holds them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary, cut out of the text before anything else; flags as in `tokenizers`."""

    content: str
    token_id: int
    special: bool  # not part of the text that a user sees
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


Part = str | AddedToken  # of a text


class TokenFinder:
    """Finds tokens in a text as `tokenizers` does: leftmost, of several there the longest.

    Looks at each character of the text at most once for each character of the longest token.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        # Nodes by character; "" leads to the token that ends there.
        self.root: dict[str, Any] = {}
        for token in tokens:
            node = self.root
            for char in token.content:
                node = node.setdefault(char, {})
            node[""] = token
        firsts = "".join(map(re.escape, self.root))
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def cut(self, text: str) -> list[Part]:
        """The text as tokens and what stands between them; blanks that a token swallows are left out."""
        parts: list[Part] = []
        done = at = 0
        while (found := self._first.search(text, at) if self._first else None) is not None:
            token = self._longest(text, found.start())
            at = found.start() + 1
            if token is None:
                continue
            before = text[done : found.start()]
            done = at = found.start() + len(token.content)
            parts += [before.rstrip() if token.lstrip else before, token]
            while token.rstrip and text[done : done + 1].isspace():
                done = at = done + 1
        return [part for part in (*parts, text[done:]) if part]

    def _longest(self, text: str, start: int) -> AddedToken | None:
        node, longest = self.root, None
        for end in range(start, len(text)):
            following = node.get(text[end])
            if following is None:
                break
            node = following
            token: AddedToken | None = node.get("")
            if token is not None and not (token.single_word and _in_word(text, start, end + 1)):
                longest = token
        return longest


def _in_word(text: str, start: int, end: int) -> bool:
    return bool(re.match(r"\w", text[end : end + 1]) or (start and re.match(r"\w", text[start - 1])))


def joined(parts: Sequence[Part], mark: str) -> str:
    """The text of parts, `mark` for each token."""
    return "".join(part if isinstance(part, str) else mark for part in parts)
