"""Ids as text, as it becomes certain: one stream an answer.

Ids become text through the bytes of each token and an incremental UTF-8 decoder, so that an answer streams at a constant
cost a token and never shows half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable

from tpimpi.serving.text.vocabularies import Leading


class TextStream:
    """Turns ids, one at a time, into text that is certain: the pieces joined equal `decode` of all ids."""

    def __init__(self, piece: Callable[[int], bytes], leading: Leading) -> None:
        self._piece = piece
        self._leading: Leading = leading
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is incomplete."""
        return self._trim(self._decoder.decode(self._piece(token_id)))

    def flush(self) -> str:
        """What is left at the end, or before a token that is no text: a character that stays incomplete, as U+FFFD."""
        return self._trim(self._decoder.decode(b"", final=True))

    def is_blank(self, token_id: int) -> bool:
        """Whether the id stands for text of nothing but blanks."""
        return self._piece(token_id).isspace()

    def _trim(self, text: str) -> str:
        if self._leading == "keep" or not text:
            return text
        kept = text.removeprefix(" ") if self._leading == "drop one" else text.lstrip(" ")
        if kept or self._leading == "drop one":
            self._leading = "keep"
        return kept


class IdStream:
    """Ids as text, with blanks between them; like TextStream."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, token_id: int) -> str:
        """The id, after a blank unless it is the first."""
        text = f"{self._between}{token_id}"
        self._between = " "
        return text

    def flush(self) -> str:
        """Nothing is ever left."""
        return ""
