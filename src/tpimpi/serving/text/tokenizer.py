"""Text to token ids and back. Only rank 0 has any of it; `load` makes a Tokenizer of what a model brings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.chat_template import render_chat
from tpimpi.serving.text.checks import is_unicode
from tpimpi.serving.text.stream import TextStream
from tpimpi.serving.text.vocabularies import Vocabulary


class Tokenizer:
    """One model's text ↔ ids.

    vocab_size: number of ids the tokenizer knows (the model's table may have more rows, or fewer).
    bos_id: the token that begins a text, or None.
    end_ids: every id that ends an answer.
    has_chat_template: whether `encode_chat` can be used; an empty template, which would leave the prompt out, is none.
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
        named: dict[str, str],
    ) -> None:
        self.vocab_size = vocabulary.size
        self.bos_id = bos_id
        self.end_ids = frozenset(end for end in end_ids if 0 <= end < vocab)
        self._chat_template = chat_template if chat_template and chat_template.strip() else None
        self.has_chat_template = self._chat_template is not None
        self._vocabulary = vocabulary
        self._vocab = vocab
        self._prefix, self._suffix = prefix, suffix
        self._named = named

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text as it is; with `special`, BOS and EOS where the model's own tokenizer adds them.

        Raises InputError for text that has no UTF-8 form, ModelError for an id that the model has no row for.
        """
        _check_prompt(text)
        ids = self._vocabulary.encode(text)
        if special:
            ids = [*self._prefix, *ids, *self._suffix]
        return self._checked(ids)

    def encode_chat(self, prompt: str, said: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a user message in the model's own chat template, up to where the answer begins; before it are the prompts
        and answers of `said`.

        The rendered template is complete: BOS is there if and only if the template writes it, as in transformers.
        Raises InputError for text that has no UTF-8 form, ModelError where the template is missing or fails.
        """
        _check_prompt(prompt)
        if self._chat_template is None:
            raise ModelError("the model has no chat template; use --raw to complete the prompt as it is")
        messages = []
        for asked, answered in said:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": prompt})
        text = render_chat(self._chat_template, messages, self._named)
        if not is_unicode(text):
            raise ModelError("the model's chat template writes text that is not Unicode; use --raw to do without it")
        return self._checked(self._vocabulary.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens skipped; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> TextStream:
        """A fresh TextStream, for one answer."""
        return TextStream(self._vocabulary.piece, self._vocabulary.leading)

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self._vocab:
            raise ModelError(
                f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self._vocab}; "
                f"put the tokenizer that belongs to the model beside it"
            )
        return ids


def _check_prompt(prompt: str) -> None:
    if not is_unicode(prompt):
        raise InputError("the prompt holds bytes that are not UTF-8; write it in UTF-8")
