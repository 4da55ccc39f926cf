"""A SentencePiece model as a vocabulary: what `sentencepiece` runs, and the tokens beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

from tpimpi.serving.text.added_tokens import AddedToken, Part, TokenFinder
from tpimpi.serving.text.checks import needing, refusing
from tpimpi.serving.text.vocabularies import Leading, piece_bytes

_CONTROL, _USER_DEFINED = 3, 4  # types of pieces

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

        # Tokens that SentencePiece itself looks for in a text; the model's other tokens of a kind are `_added`.
        self._own = {
            index: AddedToken(piece, index, special=False)
            for index, piece in enumerate(pieces)
            if proto.pieces[index].type == _USER_DEFINED
        }
        self._added: dict[str, AddedToken] = {}
        self._by_id: dict[int, AddedToken] = {}
        self._kept_out: frozenset[int] = frozenset()
        self._rowless: frozenset[int] = frozenset()
        self._finders: dict[str, TokenFinder] = {}
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

    @property
    def size_of_text(self) -> int:
        return len(self._model)

    def added(self) -> list[AddedToken]:
        return [token for _, token in sorted({**self._own, **self._by_id}.items())]

    def add(self, tokens: Iterable[AddedToken]) -> None:
        """Tokens to cut out of a text; one with the id of a piece takes that piece's place."""
        for token in tokens:
            if token.token_id in self._by_id:
                self._added.pop(self._by_id[token.token_id].content, None)
            self._added[token.content] = self._by_id[token.token_id] = token
        self._finders.clear()

    def keep_out(self, control: Collection[AddedToken], rowless: Collection[AddedToken]) -> None:
        """See Vocabulary."""
        self._kept_out = frozenset(token.token_id for token in (*control, *rowless))
        self._rowless = frozenset(token.token_id for token in rowless)
        if own := self._kept_out & self._own.keys():
            self.add(self._own[index] for index in own if index not in self._by_id)
            self._model, same = self._without(self._model, own), self._model is self._bare
            self._bare = self._model if same else self._without(self._bare, own)

    @staticmethod
    def _without(model: Any, pieces: Iterable[int]) -> Any:
        """A processor that leaves `pieces`, which it looked for in a text, to others."""
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2

        pb2: Any = sentencepiece_model_pb2
        proto = pb2.ModelProto.FromString(model.serialized_model_proto())
        for index in pieces:
            proto.pieces[index].type = _CONTROL
        return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def mark_special(self, tokens: list[str]) -> None:
        """Tokens, where they exist, are whole in a text and absent from an answer."""
        ids = {token: self.find(token) for token in tokens}
        found = {token: index for token, index in ids.items() if index is not None}
        self.add(
            replace(self._added.get(t, AddedToken(t, index, special=True)), special=True) for t, index in found.items()
        )

    def encode(self, text: str) -> list[int]:
        return self._encode("any", lambda token: token.token_id not in self._rowless, [text])

    def encode_parts(self, parts: Sequence[Part]) -> list[int]:
        """See Vocabulary."""
        return self._encode("plain", lambda token: token.token_id not in self._kept_out, parts)

    def _encode(self, name: str, looked_for: Callable[[AddedToken], bool], parts: Sequence[Part]) -> list[int]:
        if name not in self._finders:
            self._finders[name] = TokenFinder(filter(looked_for, self._added.values()))
        ids: list[int] = []
        first = True
        for whole in parts:
            for part in self._finders[name].cut(whole) if isinstance(whole, str) else (whole,):
                ids += [part.token_id] if isinstance(part, AddedToken) else self._plain(part, first=first)
                first = False
        return ids

    def _plain(self, text: str, *, first: bool) -> list[int]:
        with refusing("tokenizer.model fails"):
            ids: list[int] = (self._model if first else self._bare).encode(text)
        return ids

    def piece(self, token_id: int) -> bytes:
        added = self._by_id.get(token_id)
        if added is not None:
            return b"" if added.special else added.content.encode("utf-8")
        return piece_bytes(self._model.id_to_piece(token_id)) if 0 <= token_id < len(self._model) else b""

    def find(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].token_id
        index: int = self._model.piece_to_id(token)  # the unknown token's id where there is none
        known = 0 <= index < len(self._model) and index not in self._by_id
        return index if known and self._model.id_to_piece(index) == token else None
