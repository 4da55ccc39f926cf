"""What clients send to the server: bodies of every endpoint, grammars, and what front and rank 0 say to each other."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import msgspec
from starlette.requests import Request

from tests.fuzz import seeds
from tests.fuzz.mutate import mutate_json
from tests.fuzz.target import Target
from tpimpi.serving.grammar import GrammarError, Grammars
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.server import wire
from tpimpi.serving.server.answering import _ask, _with_tools
from tpimpi.serving.server.bodies import Bodies
from tpimpi.serving.server.chat_completions import ChatForm, ChatRequest, messages_of
from tpimpi.serving.server.link import _check_numbers
from tpimpi.serving.server.problems import ApiError
from tpimpi.serving.server.prompts import RefusedError, query_of
from tpimpi.serving.server.routes import endpoints
from tpimpi.serving.server.service import TokenizeRequest
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

_FAMILIES = ("", "hermes", "llama3", "mistral", "mistral-args", "harmony", "qwen3-coder", "glm")
_CONTEXT = 256


def _body(data: bytes) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": data, "more_body": False}

    return Request({"type": "http", "headers": [(b"content-length", str(len(data)).encode())]}, receive)


@cache
def _kinds() -> list[type]:
    """What each endpoint takes."""
    service: Any = SimpleNamespace(__getattr__=None)
    names = ("chat_completions", "completions", "responses", "messages", "count_tokens", "models", "tokenize")
    names += ("detokenize", "health", "cluster", "metrics")
    for name in names:
        setattr(service, name, None)
    return list(dict.fromkeys(one.body for one in endpoints(service) if one.body is not None))


@cache
def _tokenizer() -> Tokenizer:
    files = {"tokenizer.json": seeds.tokenizer_json(), "tokenizer_config.json": seeds.TOKENIZER_CONFIG}
    found = load_tokenizer(files, 600)
    assert isinstance(found, Tokenizer)
    return found


@cache
def _grammars() -> Grammars:
    return Grammars(_tokenizer())


def _request(data: bytes) -> None:
    """The first byte says which endpoint, and which family of tools the model has."""
    if not data:
        return
    kind, family = _kinds()[data[0] % len(_kinds())], _FAMILIES[data[0] % len(_FAMILIES)]
    body: Any = asyncio.run(Bodies().json(_body(data[1:]), kind))
    if isinstance(body, TokenizeRequest) and body.messages is not None:
        messages_of(body.messages)
    if not hasattr(body, "wanted"):
        return
    wanted = body.wanted()
    if isinstance(body, ChatRequest):
        ChatForm(body, wanted)
    ready = wire.Ready("m", _CONTEXT, 4, 600, family)
    for one in wanted if isinstance(wanted, list) else [wanted]:
        full = _with_tools(one, ready)
        question = _ask(full, full.sampling, "o")
        _check_numbers(question)
        ask = wire.decode_question(wire.frame(question)[4:])
        assert isinstance(ask, wire.Ask)
        query_of(_tokenizer(), ask, _CONTEXT, _grammars())


def _request_seeds() -> list[bytes]:
    path = Path(__file__).parent.parent / "support" / "hostile_bodies.json"
    bodies = [json.dumps(body).encode() for _, body in json.loads(path.read_text())]
    found = []
    for body in bodies:
        for number, kind in enumerate(_kinds()):
            try:
                msgspec.json.decode(body, type=kind)
            except msgspec.ValidationError:
                continue
            found += [bytes([number + len(_kinds()) * more]) + body for more in (0, 1, 2)]
    return found


def _mutate_request(data: bytes, random: Random) -> bytes:
    first = data[:1] if random.randrange(8) else random.randbytes(1)
    return first + mutate_json(data[1:], random)


def _grammar(data: bytes) -> None:
    """The first byte says what kind of grammar."""
    kinds = ("json_schema", "json_schema", "json_schema", "regex", "lark")
    text = data[1:].decode("utf-8", "replace")
    grammar = wire.Grammar(kinds[data[0] % len(kinds)] if data else "regex", text)  # type: ignore[arg-type]
    tokenizer = _tokenizer()
    sample = make_sampler(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, seed=1)
    constrained = _grammars().constrain(grammar, sample, tokenizer.answer_stream([1], raw=True), 1)
    import numpy as np

    logits, history = np.zeros(tokenizer.sampled_ids, np.float32), [1]
    for _ in range(6):
        token = constrained(logits, history)
        if token in tokenizer.end_ids:
            return
        history.append(token)


def _grammar_seeds() -> list[bytes]:
    schema = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": "^a+$"},
            "b": {"type": "array", "items": {"$ref": "#/$defs/c"}},
        },
        "required": ["a"],
        "$defs": {"c": {"anyOf": [{"type": "integer", "minimum": 1}, {"enum": ["x", None]}, {"const": 2}]}},
        "additionalProperties": False,
    }
    lark = b'start: a | "b" c\na[lazy]: /x.*y/\nc: %json {"type": "integer"}'
    return [b"\0" + json.dumps(schema).encode(), b"\3[a-z]+(b|c){2,5}\\d?", b"\4" + lark]


def _mutate_grammar(data: bytes, random: Random) -> bytes:
    return data[:1] + mutate_json(data[1:], random)


def _wire(data: bytes) -> None:
    for message in wire.Frames().feed(data):
        for decode in (wire.decode_question, wire.decode_reply):
            try:
                found = decode(message)
            except msgspec.MsgspecError:
                continue
            wire.frame(found)


def _wire_seeds() -> list[bytes]:
    said: list[Any] = [
        wire.Ask(1, "o", wire.Chat([{"role": "user", "content": "a"}]), wire.Sampling(seed=1), stops=["x"]),
        wire.Part(1, "t", "r", [1, 2], [wire.TokenLogprob(b"a", -0.5, [(b"b", -1.0)])]),
        wire.Figures(1.0, 1, 2, 3, 4, 5, 6, 7, [wire.RankFigures(0, "h", 1, None, 2, 0.1, 0.2, 0.3)], 8, 9),
        wire.Done(1, "end", 3, 0),
    ]
    return [wire.frame(one) for one in said]


TARGETS = [
    Target("http-body", _request, _request_seeds, _mutate_request, (ApiError, RefusedError)),
    Target("grammar", _grammar, _grammar_seeds, _mutate_grammar, (GrammarError,)),
    Target("wire", _wire, _wire_seeds, expected=(ValueError, UnicodeDecodeError)),
]
