"""What OpenAI's chat completions and completions have in common: fields, their checks, and what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tpimpi.serving.server.problems import bad_field, not_supported
from tpimpi.serving.server.wire import Sampling, TokenLogprob

MAX_STOP_CHARACTERS = 1000  # what is looked for after each token: long ones would hold up everybody
MAX_BIASED = 1024  # tokens of logit_bias: each takes time for every token of an answer
MAX_STOPS, MAX_CHOICES, MAX_TOP_LOGPROBS = 16, 128, 20


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class Common(msgspec.Struct, kw_only=True):
    """Fields of both. What is None was not given: the defaults are OpenAI's. `top_k`, `min_p` and `repetition_penalty` are
    extensions that other servers have too."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def choices(self) -> int:
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MAX_CHOICES:
            raise bad_field("n", f"it is {n}, must be from 1 to {MAX_CHOICES}")
        return n

    def stops(self) -> list[str]:
        return check_stops("stop", [self.stop] if isinstance(self.stop, str) else self.stop or [])

    def sampling(self) -> Sampling:
        """Checked here as far as OpenAI's own limits go; rank 0 checks the rest."""
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise bad_field("temperature", f"it is {self.temperature}, must be from 0 to 2")
        if self.seed is not None and not -(1 << 63) <= self.seed < 1 << 63:
            raise bad_field("seed", "it must fit in 64 bits")
        given = {
            name: value
            for name in Sampling.__struct_fields__
            if name not in ("seed", "logit_bias") and (value := getattr(self, name)) is not None
        }
        seed = None if self.seed is None else self.seed % (1 << 62)
        return Sampling(**given, seed=seed, logit_bias=_bias(self.logit_bias or {}))


def _bias(given: Mapping[str, float]) -> dict[int, float]:
    if len(given) > MAX_BIASED:
        raise bad_field("logit_bias", f"it has {len(given)} tokens, at most {MAX_BIASED} are taken")
    try:
        return {int(token): value for token, value in given.items()}
    except ValueError as error:
        raise bad_field("logit_bias", "its keys must be token ids") from error


def check_stops(param: str, stops: list[str]) -> list[str]:
    """The stop strings. Raises ApiError where they are too many, too long or empty."""
    if len(stops) > MAX_STOPS or not all(1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise bad_field(param, f"give at most {MAX_STOPS} texts, each of 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


def check_tokens(param: str, value: int | None) -> int | None:
    """A number of tokens that was given. Raises ApiError where it is none."""
    if value is not None and value < 1:
        raise bad_field(param, f"it is {value}, must be 1 or more")
    return value


def check_logprobs(param: str, value: int) -> int:
    if not 0 <= value <= MAX_TOP_LOGPROBS:
        raise bad_field(param, f"it is {value}, must be from 0 to {MAX_TOP_LOGPROBS}")
    return value


def refuse(request: msgspec.Struct, names: Sequence[str]) -> None:
    """Raise ApiError for fields that would change the answer, and are not done."""
    for name in names:
        if getattr(request, name):
            raise not_supported(name)


def token_text(token: bytes) -> str:
    return token.decode("utf-8", "replace")


def chat_logprob(found: TokenLogprob) -> dict[str, Any]:
    """A token's log-probability, as chat completions have it."""
    likeliest = [_one(token, value) for token, value in found.likeliest]
    return {**_one(found.token, found.logprob), "top_logprobs": likeliest}


def _one(token: bytes, value: float) -> dict[str, Any]:
    return {"token": token_text(token), "logprob": value, "bytes": list(token)}
