"""OpenAI's completions of a text: `/v1/completions`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from tpimpi.serving.server.answering import Usage, server_sent
from tpimpi.serving.server.chat_completions import FINISH
from tpimpi.serving.server.exchange import Ended, Event, ReasoningMore, TextMore, Wanted
from tpimpi.serving.server.openai_fields import Common, check_logprobs, check_tokens, refuse, token_text
from tpimpi.serving.server.problems import ApiError, bad_field, not_supported
from tpimpi.serving.server.wire import Ids, Ready, Text, TokenLogprob

DEFAULT_TOKENS = 16  # OpenAI's
MAX_PROMPTS = 128


class CompletionRequest(Common, kw_only=True):
    """What a client sends: one prompt, or several, as texts or token ids."""

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    def wanted(self) -> list[Wanted]:
        """One for each prompt. Raises ApiError for what cannot be done."""
        refuse(self, ("suffix",))
        choices = self.choices()
        if self.best_of not in (None, choices):
            raise not_supported("best_of", "other than n is not supported by this server")
        if self.echo and self.logprobs is not None:
            raise not_supported("echo", "with logprobs is not supported by this server")
        most = check_tokens("max_tokens", self.max_tokens) or DEFAULT_TOKENS
        logprobs = None if self.logprobs is None else check_logprobs("logprobs", self.logprobs)
        sampling, stops = self.sampling(), self.stops()
        return [Wanted(prompt, sampling, most, stops, choices, logprobs, bool(self.echo)) for prompt in self._prompts()]

    def _prompts(self) -> list[Text | Ids]:
        given = self.prompt
        if isinstance(given, str):
            return [Text(given)]
        if given and all(_is_id(one) for one in given):
            return [Ids(given)]
        if not 1 <= len(given) <= MAX_PROMPTS:
            raise bad_field("prompt", f"give 1 to {MAX_PROMPTS} prompts")
        found: list[Text | Ids] = []
        for one in given:
            if isinstance(one, str):
                found.append(Text(one))
            elif isinstance(one, list) and one and all(map(_is_id, one)):
                found.append(Ids(one))
            else:
                raise bad_field("prompt", "it must be a text, token ids, or a list of such")
        return found


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31


class _Choice:
    """A text, as far as it has come; `offset` is where in it the next token stands."""

    def __init__(self, echoed: str) -> None:
        self.text, self.finish, self.offset = [echoed], "stop", len(echoed)
        self.logprobs: dict[str, list[Any]] = _no_logprobs()

    def take(self, found: list[TokenLogprob]) -> dict[str, list[Any]]:
        """Log-probabilities as completions have them."""
        logprobs = _no_logprobs()
        for one in found:
            text = token_text(one.token)
            logprobs["tokens"].append(text)
            logprobs["token_logprobs"].append(one.logprob)
            logprobs["top_logprobs"].append({token_text(token): value for token, value in one.likeliest})
            logprobs["text_offset"].append(self.offset)
            self.offset += len(text)
        for name, values in logprobs.items():
            self.logprobs[name] += values
        return logprobs


def _no_logprobs() -> dict[str, list[Any]]:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


class CompletionForm:
    """The objects of one answer."""

    def __init__(self, request: CompletionRequest, wanted: list[Wanted], echoed: list[str]) -> None:
        """`echoed` is what each prompt's answers begin with."""
        self.streams = bool(request.stream)
        self._usage = request.include_usage
        self._has_logprobs = request.logprobs is not None
        self._choices = [_Choice(text) for text, one in zip(echoed, wanted, strict=True) for _ in range(one.choices)]
        self._about: dict[str, Any] = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time())}
        self._about |= {"object": "text_completion", "model": request.model or ""}

    def use_model(self, ready: Ready) -> None:
        self._about["model"] = ready.model

    def begin(self, usage: Usage) -> Iterator[bytes]:
        for index, choice in enumerate(self._choices):
            if choice.text[0]:
                yield self._chunk(index, choice.text[0])

    def event(self, index: int, event: Event) -> Iterator[bytes]:
        choice = self._choices[index]
        match event:
            case TextMore() | ReasoningMore():
                logprobs = choice.take(event.logprobs) if isinstance(event, TextMore) and event.logprobs else None
                if self.streams:
                    yield self._chunk(index, event.text, logprobs=logprobs)
                else:
                    choice.text.append(event.text)
            case Ended():
                choice.finish = FINISH[event.why]
                if self.streams:
                    yield self._chunk(index, "", finish=choice.finish)

    def end(self, usage: Usage) -> Iterator[bytes]:
        if self._usage:
            yield server_sent({**self._about, "choices": [], "usage": usage.as_openai()})
        yield b"data: [DONE]\n\n"

    def error(self, error: ApiError) -> Iterator[bytes]:
        yield server_sent(error.body())

    def whole(self, usage: Usage) -> Any:
        choices = [
            {
                "index": index,
                "text": "".join(choice.text),
                "logprobs": choice.logprobs if self._has_logprobs else None,
                "finish_reason": choice.finish,
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._about, "choices": choices, "usage": usage.as_openai()}

    def _chunk(self, index: int, text: str, *, logprobs: Any = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if self._usage else {}
        return server_sent({**self._about, "choices": [choice], **usage})
