"""Text to token ids and back. Only rank 0 has any of it; `load` makes a Tokenizer of what a model brings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.answer import AnswerStream, MarkedAnswer, PlainAnswer
from tpimpi.serving.text.chat_template import NO_OPTIONS, ChatTemplate
from tpimpi.serving.text.checks import is_unicode
from tpimpi.serving.text.control_tokens import ControlTokens, looks_like_control, written_by_template
from tpimpi.serving.text.harmony import Harmony
from tpimpi.serving.text.messages import checked, texts_of
from tpimpi.serving.text.stream import TextStream
from tpimpi.serving.text.thinking import Thinking
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tool_forms import MARKS, family_of
from tpimpi.serving.text.vocabularies import Vocabulary

NO_TEMPLATE = "give --raw to complete the text as it is, or a template with --chat-template FILE"


class Tokenizer:
    """One model's text ↔ ids.

    vocab_size: number of ids the tokenizer knows (the model's table may have more rows, or fewer).
    sampled_ids: number of ids that an answer is made of: those from there on only fill the model's table.
    bos_id: the token that begins a text, or None.
    control_ids: what no content of a chat becomes: special tokens, and those that the template writes; `control_names` has
        the text of each.
    has_chat_template: whether `encode_chat` can be used; an empty template, which would leave the prompt out, is none.
    has_reasoning: whether answers in a chat may have reasoning, which tokens of the vocabulary mark.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab: int,
        *,
        prefix: list[int],
        suffix: list[int],
        bos_id: int | None,
        end_ids: Iterable[int],
        chat_template: str | None,
        named: Mapping[str, Any],
        used_ids: int | None = None,
    ) -> None:
        self.vocab_size = vocabulary.size
        self.sampled_ids = min(vocab, vocabulary.size if used_ids is None else used_ids)
        self.bos_id = bos_id
        self._end_ids = frozenset(end for end in end_ids if end < vocab)
        self._chat = ChatTemplate(chat_template, named) if chat_template and chat_template.strip() else None
        self.has_chat_template = self._chat is not None
        self._vocabulary = vocabulary
        self._vocab = vocab
        self._prefix, self._suffix = prefix, suffix
        self._closing_id: int | None = None
        self._control = self._take_out_control_tokens()
        self.control_ids = self._control.ids
        self.control_names = {token.token_id: token.content for token in self._control.tokens}
        self._reasoning = Harmony.of(vocabulary.find, self.control_ids) or Thinking.of(
            vocabulary.find, self.control_ids
        )
        self.has_reasoning = self._reasoning is not None
        # Of the control tokens with which calls are written those that are no text.
        self._marks = {i: name for i, name in self.control_names.items() if name in MARKS and not self.piece(i)}

    def _take_out_control_tokens(self) -> ControlTokens:
        """The control tokens, which the vocabulary makes of no text from now on.

        Raises ModelError where a text could become an id that the model has no row for, or the template writes one.
        """
        added = self._vocabulary.added()
        rowless = [token for token in added if token.token_id >= self._vocab]
        beside = {token.token_id for token in rowless}
        lost = [index for index in range(self._vocab, self._vocabulary.size_of_text) if index not in beside]
        source = self._chat.source if self._chat is not None else None
        named = {self.bos_id, *self._end_ids}
        control = [
            token for token in added if token.special or token.token_id in named or looks_like_control(token.content)
        ]
        known = {token.token_id for token in control} - beside
        written = written_by_template(
            [token.content for token in added if token.token_id not in known],
            source,
            lambda: self._chat.literals() if self._chat else "",
        )
        control += [token for token in added if token.content in written and token not in control]
        if lost or any(token.content in written for token in rowless):
            raise ModelError(
                f"the tokenizer gives ids up to {self.vocab_size - 1}, the model's vocabulary has {self._vocab}; "
                f"put the tokenizer that belongs to the model beside it"
            )
        self._vocabulary.keep_out(control, rowless)
        return ControlTokens(token for token in control if token.token_id < self._vocab)

    def check_params(self, *, raw: bool, stops: Sequence[str]) -> None:
        """Raise InputError for a chat where the model has no template."""
        if not raw and self._chat is None:
            raise InputError(f"the model has no chat template; {NO_TEMPLATE}")

    @property
    def end_ids(self) -> frozenset[int]:
        """Every id that ends an answer: those that the model's files name, and what the template writes behind one."""
        if self._chat is not None and self._closing_id is None:
            closing = self._chat.closing(self._control)
            self._closing_id = -1 if closing is None else closing
        ends = self._end_ids if self._closing_id in (None, -1) else self._end_ids | {self._closing_id}
        return ends if self._reasoning is None else self._reasoning.ends(ends)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text as it is, names of control tokens in it being those tokens; with `special`, BOS and EOS where the
        model's own tokenizer adds them, and never a second BOS.

        Raises InputError for text that has no UTF-8 form, ModelError for an id that the model has no row for.
        """
        _check_unicode(text, "the prompt")
        ids = self._vocabulary.encode(text)
        if special:
            ids = [*self._prefix, *self._without_bos(ids), *self._suffix]
        return self._checked(ids)

    def encode_content(self, text: str) -> list[int]:
        """Ids of a text that a message brought: names of control tokens in it are text."""
        _check_unicode(text, "the prompt")
        return self._checked(self._vocabulary.encode_parts([text]))

    def check_system(self, system: str) -> None:
        """Raise InputError for a system prompt that cannot be used: one without text or a UTF-8 form, or where the chat
        template has no place for it."""
        _check_unicode(system, "the system prompt")
        if not system.strip():
            raise InputError("the system prompt is empty; give some text, or leave it out")
        if self._chat is not None and not self._chat.has_system():
            raise InputError(
                "the model's chat template has no place for a system prompt; leave it out, and say it in the prompt"
            )

    def encode_chat(self, prompt: str, said: Sequence[tuple[str, str]] = (), system: str | None = None) -> list[int]:
        """Ids of a user message in the model's own chat template, up to where the answer begins; before it are a `system`
        prompt, and the prompts and answers of `said`. Names of control tokens in any of them are text.

        BOS is there if the template writes it or the model's own tokenizer adds one, once.
        Raises InputError for text that has no UTF-8 form, ModelError where the template is missing or fails.
        """
        messages = [] if system is None else [{"role": "system", "content": system}]
        for asked, answered in said:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return self.encode_messages([*messages, {"role": "user", "content": prompt}])

    def encode_messages(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        options: Mapping[str, Any] = NO_OPTIONS,
    ) -> list[int]:
        """Ids of messages, each with its "role" and "content", as `encode_chat` makes them of a conversation. They may have
        calls of `tools`, and their results, as in OpenAI's API; `options` are variables of the template."""
        for text in texts_of([messages, tools, options]):
            _check_unicode(text, "the prompt")
        if self._chat is None:
            raise ModelError(f"the model has no chat template; {NO_TEMPLATE}")
        parts = self._chat.parts(checked(messages), self._control, tools=tools, options=options)
        ids = self._vocabulary.encode_parts(parts)
        if self.bos_id is not None and self.bos_id in self._prefix:
            ids = [self.bos_id, *self._without_bos(ids)]
        return self._checked(ids)

    @property
    def family(self) -> str:
        """How the model writes calls of tools (see tool_forms)."""
        return family_of(None if self._chat is None else self._chat.source, set(self.control_names.values()))

    def _without_bos(self, ids: list[int]) -> list[int]:
        """The ids after a BOS that they begin with, where the tokenizer adds one."""
        twice = self.bos_id in self._prefix and ids[:1] == [self.bos_id]
        return ids[1:] if twice else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens skipped; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> TextStream:
        """A fresh TextStream, for one answer."""
        return TextStream(self._vocabulary.piece, self._vocabulary.leading)

    def piece(self, token_id: int) -> bytes:
        """The bytes that an id stands for; none of a special token."""
        return self._vocabulary.piece(token_id)

    def answer_stream(self, prompt: Sequence[int], *, raw: bool) -> AnswerStream:
        """What tells the reasoning of the answer to `prompt` from the answer itself; a `raw` text is all answer."""
        if raw:
            return PlainAnswer(self.stream())
        stream = self.stream()
        answer = PlainAnswer(stream) if self._reasoning is None else self._reasoning.stream(stream, prompt)
        return MarkedAnswer(answer, self._marks) if self._marks else answer

    def difference(self, other: Tokenizer | TokenIds) -> str | None:
        """In what ids of `other` mean something else than ours, as far as an answer may have them; None: in nothing."""
        if not isinstance(other, Tokenizer):
            return "one has no tokenizer"
        if other._vocab < self.sampled_ids:
            return f"it has {other._vocab} token ids, needed are {self.sampled_ids}"
        ours, theirs = self._vocabulary, other._vocabulary
        for token_id in range(self.sampled_ids):
            if ours.piece(token_id) != theirs.piece(token_id):
                return f"id {token_id} is another token"
        mine, its = ({token.content: token.token_id for token in v.added()} for v in (ours, theirs))
        moved = [content for content in mine if content in its and its[content] != mine[content]]
        return f"{moved[0]} is another id" if moved else None

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self._vocab:
            raise ModelError(
                f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self._vocab}; "
                f"put the tokenizer that belongs to the model beside it"
            )
        return ids


def _check_unicode(text: str, what: str) -> None:
    if not is_unicode(text):
        raise InputError(f"{what} holds bytes that are not UTF-8; write it in UTF-8")
