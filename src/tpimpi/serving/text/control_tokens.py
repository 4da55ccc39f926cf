"""Which tokens steer a model: those that no content may become, and those that end an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from tpimpi.serving.text.added_tokens import AddedToken, TokenFinder

# Tokens that end an answer whatever the file says: files that name only one of several are common. llama.cpp ends
# generation at these (its `special_eog_ids`), and at those that stand for padding, a repository or a file where a model
# of code fills in a middle.
END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<end_of_turn>",
        "<end_of_utterance>",
        "<｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek spells it with full-width bars)
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "[e~[",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "</s>",
    }
)
# Of each list the first token that a vocabulary has.
_END_TOKENS_OF_CODE = (
    ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    ("<|file_sep|>",),
)
# Where all of a line are there, "<|end|>" ends a message of several that make an answer.
_WITHOUT_END = tuple((first, call) for first in ("<|return|>", "<|flush|>") for call in ("<|call|>", "<|calls|>"))

_LOOKS_LIKE_CONTROL = re.compile(r"<\|[^<>\s]+\|>|<｜[^<>\s]+｜>")  # noqa: RUF001


_TREATED_CHARACTERS = frozenset("\"\\' \t\r\n")  # those that JSON and templates treat in a way of their own


class ControlTokens:
    """The tokens that no content may become, and where a text holds them.

    characters: what they are spelled with, save what only a token of nothing else is. A text that lacks
    `telling_characters` holds none of them whole.
    """

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = tuple(tokens)
        self.texts = frozenset(token.content for token in self.tokens)
        self.ids = frozenset(token.token_id for token in self.tokens)
        self.cut = TokenFinder(self.tokens).cut
        self.telling_characters = frozenset(map(_telling, self.texts))
        self.characters = frozenset("".join(self.texts)) - _TREATED_CHARACTERS | self.telling_characters


def _telling(token: str) -> str:
    """The character of a token that texts have least use for."""
    return min(token, key=lambda char: (char in _TREATED_CHARACTERS, char.isalnum()))


def looks_like_control(token: str) -> bool:
    """Whether a token is spelled as only control tokens are; DeepSeek's are not always marked as such."""
    return _LOOKS_LIKE_CONTROL.fullmatch(token) is not None


def ends_of_generation(ids: Mapping[str, int], named: Iterable[int | None]) -> frozenset[int]:
    """The ids that end an answer: those `named` by a file, and those known by the text of a token. `ids` holds the
    special tokens of a vocabulary; an ordinary "</s>" is just text."""
    ends = {ids[token] for token in END_TOKENS if token in ids}
    for tokens in _END_TOKENS_OF_CODE:
        ends |= {ids[token] for token in [token for token in tokens if token in ids][:1]}
    ends |= {token_id for token_id in named if token_id is not None}
    if any(all(token in ids for token in tokens) for tokens in _WITHOUT_END):
        ends.discard(ids.get("<|end|>", -1))
    return frozenset(ends)


def written_by_template(tokens: Iterable[str], source: str | None, literals: Callable[[], str]) -> set[str]:
    """Those of `tokens` that stand in the literal text of a template; blanks are text. `literals` is asked for it only
    where the `source` of the template holds one."""
    found = {token for token in tokens if source and token in source and not token.isspace()}
    if not found:
        return set()
    text = literals()
    return {token for token in found if token in text}
