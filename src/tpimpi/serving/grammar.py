"""Answers that a grammar allows: a JSON schema, a regular expression or a grammar in llguidance's Lark, run by `llguidance`.

Before a token is drawn, the logits of all that the grammar does not allow there are masked; a token that ends the answer is
allowed only where the grammar can end. A grammar is of the answer alone, as the answer's stream tells it from reasoning
(see `AnswerStream.allowed`), unless it is `whole`.

Memory: 105 MB for the 262145 tokens of Gemma 3, 53 MB for the 128256 of Llama 3.1, 16 MB for 32000, made when the first
grammar comes, in 1.1 s for Gemma 3 on an idle core; a mask takes 0.03 to 0.3 ms.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tpimpi.errors import shorten
from tpimpi.serving.grammar_process import compile_lark, vocabulary_of
from tpimpi.serving.grammar_trial import CostlyError, GrammarTrial
from tpimpi.serving.sampling import Floats, Sampler, SamplingError
from tpimpi.serving.schema_limits import is_plain, too_costly
from tpimpi.serving.server.lark import json_rule, special_name
from tpimpi.serving.server.wire import Grammar
from tpimpi.serving.text.answer import AnswerStream
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 1 << 17  # of a grammar's text: compiling so much takes a second, in which nothing else is computed
_MAX_ERROR_CHARACTERS = 200
# Tokens are masked by their bytes alone. llguidance would else demand the tokens that a tokenizer makes of forced text.
_OPTIONS = '%llguidance {"no_forcing": true, "skip_repetition": "once"}\n'


class GrammarError(SamplingError):
    """A grammar that cannot be used, or that an answer cannot follow any further: one line, for that answer alone."""


class Grammars:
    """Makes the samplers of one model's answers that have a grammar."""

    def __init__(self, tokenizer: Tokenizer | TokenIds) -> None:
        self._tokenizer = tokenizer
        # Whose, what, and compiled; copies of it are used.
        self._last: tuple[str, Grammar, llguidance.LLMatcher] | None = None
        self._trial = GrammarTrial()
        weakref.finalize(self, self._trial.close)  # at the end of this process, too

    def constrain(
        self, grammar: Grammar, sample: Sampler, stream: AnswerStream, start: int, owner: str = ""
    ) -> Sampler:
        """A sampler that draws with `sample` from what the grammar allows.

        `stream` is a fresh one, of the answer that begins at place `start` of the histories: tokens that stand there at the
        first call, as of an answer that goes on, are taken as if they had been drawn. A grammar that comes again next, as
        with several choices of one request, is not compiled again; for another `owner` it is, who would else learn from the
        time that somebody has it. Raises GrammarError, in one line, for a grammar that is wrong or too large; the sampler
        raises it where the answer cannot go on by it.
        """
        if self._last is None or self._last[:2] != (owner, grammar):
            self._last = (owner, grammar, self._compile(grammar, owner))
        matcher = self._last[2].deep_copy()
        return _Constrained(matcher, self._ends, sample, None if grammar.whole else stream, start)

    def _compile(self, grammar: Grammar, owner: str) -> llguidance.LLMatcher:
        """What is not plain is tried in a process of its own first; where there can be none, only what its shape makes
        likely to be harmless is compiled."""
        size = len(grammar.text.encode("utf-8", "replace"))
        if size > MAX_BYTES:
            raise GrammarError(f"the {_name(grammar)} has {size} bytes, at most {MAX_BYTES} are taken; make it smaller")
        text = _lark(grammar)
        vocabulary = self._vocabulary
        try:
            if not is_plain(grammar.kind, grammar.text):
                error = self._trial.problem(text, self._names, owner)
                if error is None and (likely := too_costly(grammar.kind, grammar.text)) is not None:
                    raise CostlyError(likely)
                if error:
                    raise GrammarError(f"the {_name(grammar)} cannot be used: {_reason(error)}")
        except RecursionError:
            raise GrammarError(f"the {_name(grammar)} is nested too deep; make it flatter") from None
        except CostlyError as error:
            raise GrammarError(f"the {_name(grammar)} is too costly: {error}") from error
        matcher = compile_lark(vocabulary, text)
        if matcher.is_error():
            raise GrammarError(f"the {_name(grammar)} cannot be used: {_reason(matcher.get_error())}")
        if matcher.is_stopped() and not matcher.is_accepting():
            raise GrammarError(f"the {_name(grammar)} allows no text at all")
        return matcher

    @cached_property
    def _ends(self) -> npt.NDArray[np.intp]:
        return np.array(sorted(self._tokenizer.end_ids), np.intp)

    @cached_property
    def _vocabulary(self) -> llguidance.LLTokenizer:
        """The bytes of every token; of those that are no text, the name: `<|python_tag|>`, `<|[TOOL_CALLS]|>`."""
        try:
            import llguidance  # noqa: F401
        except ImportError as error:
            raise GrammarError(
                "answers with a grammar need the package llguidance; run: pip install llguidance"
            ) from error

        tokenizer = self._tokenizer
        if not isinstance(tokenizer, Tokenizer) or not tokenizer.end_ids:
            raise GrammarError("the model has no tokenizer that tells where an answer ends, which grammars need")
        pieces = [tokenizer.piece(token_id) for token_id in range(tokenizer.sampled_ids)]
        names = tokenizer.control_names
        textless = [token_id for token_id, piece in enumerate(pieces) if not piece or token_id in tokenizer.end_ids]
        for token_id in textless:
            pieces[token_id] = special_name(names.get(token_id, f"token {token_id}")).encode("utf-8")
        return vocabulary_of(pieces, textless, sorted(tokenizer.end_ids), tokenizer.bos_id)

    @cached_property
    def _names(self) -> list[str]:
        """Of control tokens, as grammars have them."""
        assert isinstance(self._tokenizer, Tokenizer)
        return sorted({special_name(name) for name in self._tokenizer.control_names.values()})


class _Constrained:
    """A Sampler of one answer. `stream` is None where the grammar is of all that the model writes."""

    def __init__(
        self,
        matcher: llguidance.LLMatcher,
        ends: npt.NDArray[np.intp],
        sample: Sampler,
        stream: AnswerStream | None,
        start: int,
    ) -> None:
        self._matcher, self._ends, self._sample, self._stream = matcher, ends, sample, stream
        self._taken = start  # places of the history that the grammar has seen

    def __call__(self, logits: Floats, history: Sequence[int]) -> int:
        for token in history[self._taken :]:
            self._take(token)
        self._taken = len(history)
        allowed = self._allowed(len(logits))
        if not allowed.any():
            raise GrammarError("the grammar of the answer allows no token here")
        return self._sample(np.where(allowed, logits, np.float32(-np.inf)), history)

    def _take(self, token: int) -> None:
        """The answer has one more token."""
        if self._stream is not None:
            allowed = self._stream.allowed()
            self._stream.push(token)
            if not allowed.answer or (allowed.others is not None and token in allowed.others):
                return
        if self._matcher.is_stopped() and token in self._ends:
            return  # once more: the answer does not end at its end
        if not self._matcher.consume_token(token):
            raise GrammarError(f"the answer does not follow its grammar: {_reason(self._matcher.get_error())}")

    def _allowed(self, vocab: int) -> npt.NDArray[np.bool_]:
        """Which tokens may come next, [vocab]."""
        allowed = None if self._stream is None else self._stream.allowed()
        if allowed is not None and allowed.others is None:
            mask = np.ones(vocab, np.bool_)
            mask[self._ends[self._ends < vocab]] = False
        else:
            mask = np.zeros(vocab, np.bool_)
            if allowed is None or allowed.answer:
                bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
                if self._matcher.is_error():
                    raise GrammarError(f"the grammar is too complex: {_reason(self._matcher.get_error())}")
                found = np.unpackbits(bits, count=min(vocab, 8 * len(bits)), bitorder="little")
                mask[: len(found)] = found
        if allowed is not None:
            mask[[token for token in (*(allowed.others or ()), *allowed.ends) if token < vocab]] = True
        return mask


def _lark(grammar: Grammar) -> str:
    """The grammar in llguidance's Lark. Raises GrammarError for a schema that is no JSON object."""
    if grammar.kind == "lark":
        return f"{grammar.text}\n{_OPTIONS}"
    if grammar.kind == "regex":
        import llguidance

        made = json.loads(llguidance.LLMatcher.grammar_from_regex(grammar.text.replace("\n", "\\n")))
        return f"{made['grammars'][0]['lark_grammar']}\n{_OPTIONS}"
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {shorten(str(error))}") from error
    if not isinstance(schema, dict):
        raise GrammarError(f"the JSON schema is a {type(schema).__name__}, must be an object")
    return f"start: {json_rule(schema)}\n{_OPTIONS}"


def _name(grammar: Grammar) -> str:
    return {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}[grammar.kind]


def _reason(message: str) -> str:
    """llguidance's message as one line, without the place in a text that the user did not write."""
    told = re.sub(r"\n *\d+ \|.*", "", message.partition("\n<")[0], flags=re.DOTALL)
    told = re.sub(r"^at \d+\(\d+\): |[\s^]*\n\s*|failed to compile JSON schema: ", " ", told)
    return shorten(" ".join(told.split()), _MAX_ERROR_CHARACTERS)
