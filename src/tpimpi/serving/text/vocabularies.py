"""The two kinds of vocabulary beneath a Tokenizer: what `tokenizers` runs, and what `sentencepiece` runs."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

from tpimpi.errors import ModelError
from tpimpi.serving.text.added_tokens import AddedToken, Part, TokenFinder, joined
from tpimpi.serving.text.checks import needing, refusing

if TYPE_CHECKING:
    import tokenizers

SPACE = "▁"  # how SentencePiece spells a space
_LAST_PRIVATE_CHARACTER = 0x10FFFD
# What happens to spaces at the start of an answer: SentencePiece puts one before the first word of a text.
Leading = Literal["keep", "drop one", "drop all"]


class Vocabulary(Protocol):
    """The two kinds of vocabulary, seen from the Tokenizer."""

    leading: Leading

    @property
    def size(self) -> int: ...  # ids are below it

    @property
    def size_of_text(self) -> int: ...  # ids of tokens that any text may become are below it, or are of `added`

    def added(self) -> list[AddedToken]: ...  # the tokens that are looked for in a text, in the order of ids

    def keep_out(self, control: Collection[AddedToken], rowless: Collection[AddedToken]) -> None:
        """From now on `encode_parts` makes neither of a text, and `encode` not what the model has no row for."""

    def encode(self, text: str) -> list[int]: ...  # the text's own ids, added tokens in it recognised

    def encode_parts(self, parts: Sequence[Part]) -> list[int]: ...  # of a text whose control tokens are parts

    def piece(self, token_id: int) -> bytes: ...  # the bytes it stands for; b"" for a special or an unknown id

    def find(self, token: str) -> int | None: ...


class TokenizersVocabulary:
    """A `tokenizers.Tokenizer`: from tokenizer.json, or built from a GGUF file's vocabulary."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # both may be saved in a tokenizer.json
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_level, self.leading = _read_decoder(tokenizer)
        self._bytes = _byte_alphabet() if self._byte_level else {}
        self._size = 0  # until `keep_out` has put tokens of its own beside
        self._kept_out: frozenset[int] = frozenset()
        self._with_rows: TokenFinder | None = None  # where not all tokens have one

    @property
    def size(self) -> int:
        last = max(self._tokenizer.get_added_tokens_decoder(), default=-1)
        return self._size or max(self._tokenizer.get_vocab_size(), last + 1)

    @property
    def size_of_text(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def added(self) -> list[AddedToken]:
        return [
            AddedToken(token.content, index, index in self._special, token.lstrip, token.rstrip, token.single_word)
            for index, token in sorted(self._tokenizer.get_added_tokens_decoder().items())
        ]

    def keep_out(self, control: Collection[AddedToken], rowless: Collection[AddedToken]) -> None:
        """See Vocabulary."""
        self._size = self.size
        self._kept_out = frozenset(token.token_id for token in (*control, *rowless))
        if rowless:
            self._with_rows = TokenFinder(token for token in self.added() if token not in rowless)
        found = self._tokenizer.get_added_tokens_decoder()
        plain = [found[index] for index in self._kept_out if index in found and not found[index].special]
        for token in plain:  # special ones are left as text where that is asked for
            token.special = True
        self._tokenizer.add_special_tokens(plain)

    def add(self, tokens: list[AddedToken]) -> None:
        """Tokens of tokenizer_config.json that tokenizer.json may lack. Raises ModelError if the two contradict."""
        import tokenizers

        for token in tokens:
            if self.find(token.content) is None:
                flags = {name: getattr(token, name) for name in ("lstrip", "rstrip", "single_word")}
                self._tokenizer.add_tokens([tokenizers.AddedToken(token.content, normalized=False, **flags)])
            if (found := self.find(token.content)) != token.token_id:
                raise ModelError(
                    f"token {token.content!r} has id {token.token_id} in tokenizer_config.json and {found} in "
                    f"tokenizer.json; download the model again"
                )
            if token.special:
                self.mark_special([token.content])

    def mark_special(self, tokens: list[str]) -> None:
        """Tokens, where they exist, are whole in a text and absent from an answer."""
        import tokenizers

        for token in tokens:
            token_id = self.find(token)
            if token_id is not None and token_id not in self._special:
                self._special.add(token_id)
                if token_id not in self._tokenizer.get_added_tokens_decoder():
                    added = tokenizers.AddedToken(token, normalized=False, special=True)
                    self._tokenizer.add_special_tokens([added])

    def affixes(self) -> tuple[list[int], list[int]]:
        """The ids that the tokenizer's own post-processor puts before and behind a text."""
        bare = self.encode("a")
        with refusing("the post-processor in tokenizer.json fails"):
            full: list[int] = self._tokenizer.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def encode(self, text: str) -> list[int]:
        if self._with_rows is not None:
            return self.encode_parts(self._with_rows.cut(text))
        with refusing("the tokenizer fails"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """See Vocabulary. All parts in one text, a mark for each token: what stands between is cut as in any text."""
        text = joined(parts, "")
        mark = next(mark for code in range(_LAST_PRIVATE_CHARACTER, 0, -1) if (mark := chr(code)) not in text)
        mark_id = self._id_of_mark(mark)
        self._tokenizer.encode_special_tokens = True  # as any other text
        try:
            with refusing("the tokenizer fails"):
                ids: list[int] = self._tokenizer.encode(joined(parts, mark), add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = False
        tokens = (part.token_id for part in parts if isinstance(part, AddedToken))
        known: list[int] = []
        for token_id in ids:
            if token_id == mark_id:
                known.append(next(tokens))
            elif token_id in self._kept_out:
                known += self._spelled(token_id)
            else:
                known.append(token_id)
        return known

    def _id_of_mark(self, mark: str) -> int | None:
        if self._tokenizer.token_to_id(mark) is None:
            import tokenizers

            self._tokenizer.add_tokens([tokenizers.AddedToken(mark, normalized=False)])
        return self._tokenizer.token_to_id(mark)

    def _spelled(self, token_id: int) -> list[int]:
        """A token that text became by the vocabulary's own merges, character by character."""
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        ids = (self._tokenizer.encode(char, add_special_tokens=False).ids for char in text)
        return [index for char in ids for index in char if index not in self._kept_out]

    def piece(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._byte_level:
            return piece_bytes(token)
        try:
            return bytes(self._bytes[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            return token.encode("utf-8")

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


def piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: text with its spaces spelled out, or one byte as <0x0A>."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(SPACE, " ").encode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


def parse_tokenizer_json(data: bytes) -> tokenizers.Tokenizer:
    with needing("tokenizers"):
        import tokenizers
    with refusing("tokenizer.json cannot be read"):
        return tokenizers.Tokenizer.from_str(data.decode("utf-8"))


def _read_decoder(tokenizer: tokenizers.Tokenizer) -> tuple[bool, Leading]:
    """Whether tokens are spelled in the byte alphabet (else SentencePiece's way), and the rule for leading spaces.

    Raises ModelError for a decoder that does anything else.
    """
    if tokenizer.decoder is None:
        raise ModelError("tokenizer.json has no decoder, so ids cannot become text; download the model again")
    decoder = json.loads(tokenizer.decoder.__getstate__())
    leading: Leading = "keep"
    byte_level = False
    for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
        match step:
            case {"type": "ByteLevel"}:
                byte_level = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme}:
                leading = "keep" if scheme == "never" else "drop one"
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                leading = "drop one" if start else leading
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "} | {"type": "ByteFallback" | "Fuse"}:
                pass
            case _:
                raise ModelError(f"the decoder in tokenizer.json has a step that tpimpi does not know: {step}")
    return byte_level, leading
