"""What stands in for a tokenizer where a model has none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tpimpi.errors import InputError, shorten
from tpimpi.serving.text.answer import PlainAnswer
from tpimpi.serving.text.stream import IdStream


class TokenIds:
    """Stands in for a Tokenizer where there is none, as in what `synth` makes: text is ids in decimal, one after another.

    `gguf`: it is a GGUF file that has none, or slices of one.
    """

    bos_id = None
    end_ids: frozenset[int] = frozenset()
    has_chat_template = has_reasoning = False
    family = ""

    def __init__(self, vocab: int, *, gguf: bool = False) -> None:
        self.vocab_size = self.sampled_ids = vocab
        self._lacking = f"{'the GGUF file has' if gguf else 'these slices have'} no tokenizer"
        self._made = "" if gguf else " (synth made them)"

    def check_params(self, *, raw: bool, stops: Sequence[str]) -> None:
        """Raise InputError for what has no meaning without a tokenizer: a chat, and texts to stop before."""
        if not raw:
            raise InputError(
                f"{self._lacking}{self._made}, so a prompt is token ids; give --raw, and ids such as "
                '--prompt "1 15043 29871"'
            )
        if stops:
            raise InputError(f"{self._lacking}, so there is no text to stop before; leave --stop out")

    def difference(self, other: object) -> str | None:
        """As of a Tokenizer."""
        if not isinstance(other, TokenIds):
            return "one has no tokenizer"
        if other.vocab_size != self.vocab_size:
            return f"it has {other.vocab_size} token ids, needed are {self.vocab_size}"
        return None

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids that a text holds, with blanks or commas between them. InputError for anything else."""
        words = text.replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdecimal() and len(word) <= 10 and int(word) < self.vocab_size):
                raise InputError(
                    f"{shorten(word)!r} is no token id; {self._lacking}, so give whole numbers below "
                    f"{self.vocab_size} with blanks or commas between them"
                )
        return [int(word) for word in words]

    def encode_content(self, text: str) -> list[int]:
        """As `encode`."""
        return self.encode(text)

    def check_system(self, system: str) -> None:
        """As of a Tokenizer; InputError always."""
        self.check_params(raw=False, stops=())

    def encode_chat(self, prompt: str, said: Sequence[tuple[str, str]] = (), system: str | None = None) -> list[int]:
        """InputError always: there is no chat template."""
        return self.encode_messages([])

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """InputError always: there is no chat template."""
        self.check_params(raw=False, stops=())
        return []

    def stream(self) -> IdStream:
        """A fresh IdStream, for one answer."""
        return IdStream()

    def piece(self, token_id: int) -> bytes:
        """The id in decimal."""
        return str(token_id).encode()

    def answer_stream(self, prompt: Sequence[int], *, raw: bool) -> PlainAnswer:
        """As of a Tokenizer; there is no reasoning."""
        return PlainAnswer(self.stream())
