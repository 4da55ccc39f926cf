"""The two kinds of vocabulary beneath a Tokenizer: what `tokenizers` runs, and what `sentencepiece` runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tpimpi.errors import ModelError
from tpimpi.serving.text.checks import needing, refusing

if TYPE_CHECKING:
    import tokenizers

_SPACE = "▁"  # how SentencePiece spells a space
# What happens to spaces at the start of an answer: SentencePiece puts one before the first word of a text.
Leading = Literal["keep", "drop one", "drop all"]


class Vocabulary(Protocol):
    """The two kinds of vocabulary, seen from the Tokenizer."""

    leading: Leading

    @property
    def size(self) -> int: ...  # ids are below it

    def encode(self, text: str) -> list[int]: ...  # the text's own ids, special tokens in it recognised

    def piece(self, token_id: int) -> bytes: ...  # the bytes it stands for; b"" for a special or an unknown id

    def find(self, token: str) -> int | None: ...


@dataclass(frozen=True)
class AddedToken:
    """A token beside the vocabulary, cut out of the text before anything else; flags as in `tokenizers`."""

    content: str
    token_id: int
    special: bool  # not part of the text that a user sees
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenizersVocabulary:
    """A `tokenizers.Tokenizer`: from tokenizer.json, or built from a GGUF file's vocabulary."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.no_truncation()  # both may be saved in a tokenizer.json
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._byte_level, self.leading = _read_decoder(tokenizer)
        self._bytes = _byte_alphabet() if self._byte_level else {}

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

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
        with refusing("the tokenizer fails"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def piece(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if not self._byte_level:
            return _piece_bytes(token)
        try:
            return bytes(self._bytes[char] for char in token)
        except KeyError:  # an added token, spelled as it is
            return token.encode("utf-8")

    def find(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


Prefix = Literal["every", "first", "never"]  # which stretches of text get SentencePiece's space in front


class SentencePieceVocabulary:
    """A SentencePiece model, and the tokens beside it that SentencePiece itself does not look for in a text."""

    def __init__(self, model: bytes, name: str, prefix: Prefix) -> None:
        with needing("sentencepiece protobuf"):
            import sentencepiece
            from sentencepiece import sentencepiece_model_pb2

        pb2: Any = sentencepiece_model_pb2  # its classes are made at import, unseen by mypy
        sentencepiece.set_min_log_level(3)  # our line says it
        with refusing(f"{name} is not a SentencePiece model"):
            proto = pb2.ModelProto.FromString(model)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            dummy, collapse = proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces
            self._bare = self._model  # for the stretches that get no space
            if dummy and prefix != "every":
                proto.normalizer_spec.add_dummy_prefix = False
                self._bare = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
            pieces = [self._model.id_to_piece(index) for index in range(len(self._model))]  # all read: all UTF-8
        if prefix == "never":
            self._model, dummy = self._bare, False
        self.leading: Leading = "drop all" if collapse else "drop one" if dummy else "keep"

        self._added: dict[str, AddedToken] = {}
        self._by_id: dict[int, AddedToken] = {}
        self._pattern: re.Pattern[str] | None = None
        self._order: list[AddedToken] = []
        self.add(
            AddedToken(piece, index, special=True)
            for index, piece in enumerate(pieces)
            if self._model.is_control(index) or self._model.is_unknown(index)
        )

    @property
    def size(self) -> int:
        return max(len(self._model), max(self._by_id, default=-1) + 1)

    def named(self) -> dict[str, str]:
        """The model's own special tokens, under the names that the configs use."""
        ids = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        ids |= {"unk_token": self._model.unk_id(), "pad_token": self._model.pad_id()}
        return {name: self._model.id_to_piece(index) for name, index in ids.items() if index >= 0}

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Tokens to cut out of a text; one with the id of a piece takes that piece's place."""
        for token in tokens:
            if token.token_id in self._by_id:
                self._added.pop(self._by_id[token.token_id].content, None)
            self._added[token.content] = self._by_id[token.token_id] = token
        self._order = sorted(self._added.values(), key=lambda token: len(token.content), reverse=True)
        self._pattern = re.compile("|".join(map(_token_pattern, self._order))) if self._order else None

    def mark_special(self, tokens: list[str]) -> None:
        """Tokens, where they exist, are whole in a text and absent from an answer."""
        ids = {token: self.find(token) for token in tokens}
        found = {token: index for token, index in ids.items() if index is not None}
        self.add(
            replace(self._added.get(t, AddedToken(t, index, special=True)), special=True) for t, index in found.items()
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            ids += self._plain(text[end : match.start()], first=end == 0)
            ids.append(self._order[(match.lastindex or 1) - 1].token_id)
            end = match.end()
        return ids + self._plain(text[end:], first=end == 0)

    def _plain(self, text: str, *, first: bool) -> list[int]:
        with refusing("tokenizer.model fails"):
            ids: list[int] = (self._model if first else self._bare).encode(text)
        return ids

    def piece(self, token_id: int) -> bytes:
        added = self._by_id.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode("utf-8")
        return _piece_bytes(self._model.id_to_piece(token_id)) if 0 <= token_id < len(self._model) else b""

    def find(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].token_id
        index: int = self._model.piece_to_id(token)  # the unknown token's id where there is none
        known = 0 <= index < len(self._model) and index not in self._by_id
        return index if known and self._model.id_to_piece(index) == token else None


def _token_pattern(token: AddedToken) -> str:
    """A regex whose one group is the token."""
    before, after = (r"(?<!\w)", r"(?!\w)") if token.single_word else ("", "")
    before, after = r"\s*" * token.lstrip + before, after + r"\s*" * token.rstrip
    return f"{before}({re.escape(token.content)}){after}"


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: text with its spaces spelled out, or one byte as <0x0A>."""
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8")


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
