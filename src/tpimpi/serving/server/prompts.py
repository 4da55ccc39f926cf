"""What is asked, as rank 0 answers it: prompts become token ids, and an Ask a Query."""

from __future__ import annotations

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.batched import Query
from tpimpi.serving.conversation import MAX_BYTES_A_TOKEN
from tpimpi.serving.grammar import GrammarError, Grammars
from tpimpi.serving.sampling import Additions, Sampler, failing_alone, make_sampler
from tpimpi.serving.server.wire import Ask, Chat, Ids, Sampling, Text
from tpimpi.serving.text.messages import texts_of
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer

CONTEXT_EXCEEDED = "context_length_exceeded"
SAMPLER_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
MAX_CHARACTERS_A_TOKEN = 64  # of any text, in the mean


class RefusedError(InputError):
    """What is asked cannot be answered: `what` is the field that is wrong, `code` OpenAI's word for why."""

    def __init__(self, problem: str, what: str = "", code: str = "") -> None:
        super().__init__(problem)
        self.what, self.code = what, code


def ids_of(tokenizer: Tokenizer | TokenIds, prompt: Chat | Text | Ids, context: int) -> list[int]:
    """The token ids of a prompt. Raises InputError for one that cannot be used, or that cannot have room in `context`
    positions: what is far too long is not encoded, since everybody would wait for that."""
    text = _text_of(prompt)
    if len(text) > context * MAX_CHARACTERS_A_TOKEN:
        raise _too_long(prompt, f"{len(text)} characters", context)
    if isinstance(prompt, Ids):
        if len(prompt.ids) > context:
            raise _too_long(prompt, f"{len(prompt.ids)} tokens", context)
        for token in prompt.ids:
            if not 0 <= token < tokenizer.sampled_ids:
                raise RefusedError(f"{token} is no token id, which are below {tokenizer.sampled_ids}", "prompt")
        return prompt.ids
    if isinstance(prompt, Text):
        return tokenizer.encode(prompt.text)
    if not tokenizer.has_chat_template:
        raise RefusedError(
            "the model has no chat template: ask for /v1/completions, or start the server with --chat-template FILE",
            "messages",
            "no_chat_template",
        )
    try:
        ids = tokenizer.encode_messages(prompt.messages, tools=prompt.tools, options=prompt.options)
    except ModelError as error:  # of a template that refuses what it is given
        raise RefusedError(str(error).removesuffix("; use --raw to do without it"), "messages") from error
    return [*ids, *tokenizer.encode_content(prompt.begun)] if prompt.begun else ids


def grammar_field(ask: Ask) -> str:
    """The field that an Ask's grammar comes of."""
    return "tools" if isinstance(ask.prompt, Chat) and ask.prompt.tools else "response_format"


def _text_of(prompt: Chat | Text | Ids) -> str:
    """All text that a client gave."""
    if isinstance(prompt, Ids):
        return ""
    return (
        prompt.text
        if isinstance(prompt, Text)
        else "".join(texts_of([prompt.messages, prompt.tools, prompt.options, prompt.begun]))
    )


def _too_long(prompt: Chat | Text | Ids, length: str, context: int) -> RefusedError:
    what = "messages" if isinstance(prompt, Chat) else "prompt"
    return RefusedError(
        f"the prompt has {length}, and this model's context is {context} tokens here, of which the answer needs one at "
        "least; shorten it",
        what,
        CONTEXT_EXCEEDED,
    )


def query_of(tokenizer: Tokenizer | TokenIds, ask: Ask, context: int, grammars: Grammars) -> Query:
    """How an Ask is answered, in `context` positions at most. Raises InputError where it cannot be."""
    raw = not isinstance(ask.prompt, Chat)
    if raw:
        tokenizer.check_params(raw=True, stops=ask.stops)
    text, usual = _text_of(ask.prompt), context * MAX_BYTES_A_TOKEN
    if len(text) > usual and len(ids := tokenizer.encode(text[:usual])) > context:
        raise _too_long(ask.prompt, f"over {len(ids)} tokens", context)
    ids = ids_of(tokenizer, ask.prompt, context)
    if not ids:
        raise RefusedError("the prompt has no tokens; give some text", "prompt" if raw else "messages")
    if len(ids) >= context:
        raise _too_long(ask.prompt, f"{len(ids)} tokens", context)
    sample = sampler_of(ask.sampling, len(ids), len(ask.so_far))
    if ask.grammar is not None:
        stream = tokenizer.answer_stream(ids, raw=raw)
        try:
            sample = grammars.constrain(ask.grammar, sample, stream, len(ids), ask.owner)
        except GrammarError as error:
            raise RefusedError(str(error), grammar_field(ask)) from error
    return Query(
        ids,
        context if ask.max_tokens is None else ask.max_tokens,
        sample,
        ask.stops,
        raw,
        ask.ignore_eos and ask.grammar is None,
        owner=ask.owner,
        logprobs=ask.logprobs,
        so_far=ask.so_far,
    )


def sampler_of(sampling: Sampling, prompt: int, drawn: int) -> Sampler:
    """The sampler of an answer that begins behind a prompt of so many ids, and has `drawn` tokens already. Raises
    RefusedError for a value out of its range."""
    try:
        additions = Additions(sampling.frequency_penalty, sampling.presence_penalty, sampling.logit_bias, start=prompt)
        options = {name: getattr(sampling, name) for name in SAMPLER_OPTIONS}
        sample = make_sampler(**options, drawn=drawn, additions=additions)
    except ValueError as error:
        raise RefusedError(str(error), str(error).split(" ")[0].replace("-", "_")) from error
    return failing_alone(sample)
