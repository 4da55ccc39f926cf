"""Answers that follow a grammar, whatever the model would like to say, with tokenizers of every kind."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers

from tests.support import real_tokenizers
from tests.support.tokenizer_cases import CHATML, gguf_keys, load_gguf
from tpimpi.compute.arrays import F32
from tpimpi.serving.grammar import MAX_BYTES, GrammarError, Grammars
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.server.lark import special_name
from tpimpi.serving.server.wire import Grammar
from tpimpi.serving.speculation import checked
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.weights.sources.safetensors import _hf_assets

pytest.importorskip("llguidance")

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["big", "small"]},
        "people": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 999}, "maxItems": 3},
    },
    "required": ["city", "kind", "people"],
    "additionalProperties": False,
}
SCHEMA = Grammar("json_schema", json.dumps(CITY))
LONGEST = 400


def check_city(text: str) -> None:
    """By hand what the schema says."""
    value = json.loads(text)
    assert list(value) == ["city", "kind", "people"]
    assert isinstance(value["city"], str) and len(value["city"]) <= 8
    assert value["kind"] in ("big", "small")
    assert len(value["people"]) <= 3
    assert all(isinstance(n, int) and 0 <= n <= 999 for n in value["people"])


def random_logits(tokenizer: Tokenizer, seed: int) -> Iterator[F32]:
    """Of a model that says anything, but likes best to end."""
    rng = np.random.default_rng(seed)
    while True:
        logits = rng.standard_normal(tokenizer.sampled_ids, np.float32) * 4
        logits[sorted(tokenizer.end_ids)] = 30
        yield logits


def answer(tokenizer: Tokenizer, grammar: Grammar, seed: int, prompt: list[int]) -> list[int]:
    """The ids of an answer, the last of which is one that ends it."""
    inner = make_sampler(temperature=1.0, seed=seed)
    stream = tokenizer.answer_stream(prompt, raw=False)
    sample = Grammars(tokenizer).constrain(grammar, inner, stream, len(prompt))
    history = list(prompt)
    for logits in random_logits(tokenizer, seed):
        history.append(sample(logits, history))
        if history[-1] in tokenizer.end_ids:
            return history[len(prompt) :]
        if len(history) >= LONGEST:
            raise TooLongError
    raise AssertionError


class TooLongError(Exception):
    """A model that says anything may never end a string."""


def small_json(tokenizer_json: bytes) -> Tokenizer:
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    return load_tokenizer({"tokenizer.json": tokenizer_json, "tokenizer_config.json": json.dumps(config).encode()}, 600)


@pytest.fixture(params=["json", "gguf", "sentencepiece"])
def small(request: pytest.FixtureRequest) -> Tokenizer:
    """A tokenizer of each kind."""
    if request.param == "json":
        return small_json(request.getfixturevalue("tokenizer_json"))
    if request.param == "gguf":
        return load_gguf(gguf_keys(request.getfixturevalue("byte_level"), "gpt-2"))
    return load_tokenizer({"tokenizer.model": request.getfixturevalue("pieces")}, 480)


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_is_followed_with_every_kind_of_vocabulary(small: Tokenizer, seed: int) -> None:
    ids = answer(small, SCHEMA, seed, [])
    assert ids[-1] in small.end_ids and not set(ids[:-1]) & small.control_ids
    check_city(small.decode(ids))


def test_other_grammars(small: Tokenizer) -> None:
    for seed in range(4):
        assert re.fullmatch("a[bc/]{2,5}\n?", small.decode(answer(small, Grammar("regex", "a[bc/]{2,5}\n?"), seed, [])))
        lark = 'start: "x" ("-" NUMBER)+ "!"\nNUMBER: /[0-9]{1,2}/'
        assert re.fullmatch(r"x(-\d{1,2})+!", small.decode(answer(small, Grammar("lark", lark), seed, [])))
        short = Grammar("json_schema", '{"type": "object", "additionalProperties": {"const": 1}, "maxProperties": 2}')
        with contextlib.suppress(TooLongError):
            assert isinstance(json.loads(small.decode(answer(small, short, seed, []))), dict)


@pytest.mark.parametrize("folder", real_tokenizers.tokenizer_folders(), ids=lambda path: path.name)
def test_a_schema_is_followed_with_real_tokenizers(folder: Any) -> None:
    vocab = 300000
    tokenizer = load_tokenizer(_hf_assets(folder), vocab)
    assert isinstance(tokenizer, Tokenizer)
    if tokenizer.has_reasoning:
        prompt = tokenizer.encode("x", special=False)
        begun = [tokenizer._vocabulary.find(token) for token in REASONING[folder.name]]
        prompt += [token for token in begun if token is not None]
        stream = tokenizer.answer_stream(prompt, raw=False)
        assert stream.allowed().answer
    else:
        prompt = []
    ids = answer(tokenizer, SCHEMA, 1, prompt)
    stream = tokenizer.answer_stream(prompt, raw=False)
    told = [*(piece for token in ids[:-1] for piece in stream.push(token)), *stream.flush()]
    check_city("".join(piece.text for piece in told if not piece.reasoning))


# What a prompt ends with so that an answer without reasoning begins.
REASONING = {
    "qwen3": ["<think>", "</think>"],
    "deepseek_v3": ["<think>", "</think>"],
    "gptoss": ["<|start|>", "assistant", "<|channel|>", "final", "<|message|>"],
}


def test_drafts_are_drawn_as_without_them_and_answers_go_on(small: Tokenizer) -> None:
    """Each place of a draft in turn, and an answer some of whose tokens are there already."""
    prompt = small.encode("Hello", special=False)
    logits = [next(random_logits(small, seed)) for seed in range(LONGEST)]

    def sampler(drawn: int = 0) -> Callable[..., int]:
        inner = make_sampler(temperature=0.8, seed=5, drawn=drawn)
        return Grammars(small).constrain(SCHEMA, inner, small.answer_stream(prompt, raw=False), len(prompt))

    sample, alone = sampler(), list(prompt)
    while alone[-1] not in small.end_ids:
        alone.append(sample(logits[len(alone)], alone))
    check_city(small.decode(alone[len(prompt) :]))
    for length in (1, 3, 7):
        for cut in (0, len(alone) // 2):
            history = alone[: len(prompt) + cut]
            sample = sampler(cut)
            while history[-1] not in small.end_ids:
                draft = alone[len(history) : len(history) + length - 1]
                wrong = [*draft, 0, 1]  # what is behind is never asked for
                rows = np.stack([logits[len(history) + place] for place in range(len(wrong) + 1)])
                before = len(history)
                for token in checked(rows, wrong, sample, history):
                    if token in small.end_ids:
                        break
                assert len(history) > before
            assert history == alone


def test_choices_of_one_request_have_one_compiled_grammar(small: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn in turns, each as if its grammar were its own; another owner has the grammar compiled again."""
    compiled: list[Grammar] = []
    compile_grammar = Grammars._compile

    def count(self: Grammars, grammar: Grammar, owner: str) -> Any:
        compiled.append(grammar)
        return compile_grammar(self, grammar, owner)

    monkeypatch.setattr(Grammars, "_compile", count)
    grammars, histories = Grammars(small), [list[int]() for _ in range(3)]
    samples = [
        grammars.constrain(
            SCHEMA, make_sampler(temperature=1.0, seed=seed), small.answer_stream([], raw=False), 0, "anna"
        )
        for seed in range(3)
    ]
    assert compiled == [SCHEMA]
    models = [random_logits(small, seed) for seed in range(3)]
    for _ in range(24):
        for history, sample, model in zip(histories, samples, models, strict=True):
            if not history or history[-1] not in small.end_ids:
                history.append(sample(next(model), history))
    for seed, history in enumerate(histories):
        alone = list[int]()
        sample = Grammars(small).constrain(
            SCHEMA, make_sampler(temperature=1.0, seed=seed), small.answer_stream([], raw=False), 0
        )
        for logits in random_logits(small, seed):
            if len(alone) == len(history):
                break
            alone.append(sample(logits, alone))
        assert alone == history
    assert len({tuple(history) for history in histories}) == 3
    grammars.constrain(SCHEMA, make_sampler(), small.answer_stream([], raw=False), 0, "bert")
    assert compiled == [SCHEMA] * 5


def test_no_token_is_forced_on_a_vocabulary_that_spells_it_otherwise(small: Tokenizer) -> None:
    """Where text is fixed, every token that begins it may come."""
    grammar = Grammar("regex", "Hello, world!")
    seen: list[int] = []

    def first(logits: F32, history: Any) -> int:
        seen.extend(np.flatnonzero(np.isfinite(logits)).tolist())
        return int(logits.argmax())

    sample = Grammars(small).constrain(grammar, first, small.answer_stream([], raw=False), 0)
    sample(np.zeros(small.sampled_ids, np.float32), [])
    expected = [i for i in range(small.sampled_ids) if (p := small.piece(i)) and b"Hello, world!".startswith(p)]
    assert seen == [i for i in expected if i not in small.end_ids] and len(seen) > 1


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def doubled(times: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(times):
        schema = {"anyOf": [schema, {"type": "array", "items": schema}]}
    return schema


HOSTILE: list[tuple[str, Any, str]] = [
    ("json_schema", nested(400), "recursion limit"),
    ("json_schema", "[" * 60000 + "]" * 60000, "no JSON"),
    ("json_schema", "{", "no JSON"),
    ("json_schema", "[]", "is a list, must be an object"),
    ("json_schema", {"$ref": "http://127.0.0.1:9/schema.json"}, "does not fetch resources"),
    ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch resources"),
    ("json_schema", {"$ref": "#/$defs/none"}, "cannot be used"),
    ("json_schema", {"type": "colour"}, "Invalid type: colour"),
    ("json_schema", {"type": "object", "dependentSchemas": {}}, "dependentSchemas"),
    ("json_schema", {"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    ("json_schema", doubled(13), "at most"),
    ("json_schema", {"enum": [f"v{i}" for i in range(100000)]}, f"at most {MAX_BYTES} are taken"),
    ("json_schema", {"type": "string", "minLength": 2, "maxLength": 1}, "cannot be used|allows no text"),
    ("regex", "(a", "unclosed group"),
    ("regex", "a" * 200000, f"at most {MAX_BYTES} are taken"),
    ("json_schema", {"multipleOf": 1e300, "anyOf": [{"multipleOf": 1e-300}]}, "too many digits"),
    ("json_schema", {"type": "integer", "multipleOf": 10**4000}, "number out of range"),
    ("json_schema", {"required": ["a"] * 999, "anyOf": [{"enum": [{}] * 9000}]}, "schema too large"),
    ("lark", "start: foo", 'unknown name: "foo"'),
    ("lark", "", "cannot be used"),
    ("lark", 'start: <|no_such|> "a"', "no_such"),
]


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_a_grammar_that_cannot_be_used_is_one_clear_line(tokenizer_json: bytes, number: int) -> None:
    kind, text, expected = HOSTILE[number]
    tokenizer = small_json(tokenizer_json)
    text = text if isinstance(text, str) else json.dumps(text)
    with pytest.raises(GrammarError, match=expected) as raised:
        Grammars(tokenizer).constrain(Grammar(kind, text), make_sampler(), tokenizer.answer_stream([], raw=False), 0)
    line = str(raised.value)
    assert "\n" not in line and len(line) < 350 and "no_forcing" not in line and "x-guidance" not in line


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("json_schema", json.dumps({"type": "string", "minLength": 100000, "maxLength": 1000000})),
        ("json_schema", json.dumps({"type": "array", "items": {"type": "integer"}, "minItems": 1000000})),
        ("json_schema", json.dumps({"type": "string", "pattern": "(a{1,1000}){1,1000}"})),
        ("json_schema", json.dumps({"type": "string", "pattern": f"^x{'a?' * 4000}y$", "maxLength": 50000})),
        ("json_schema", json.dumps({"anyOf": [{"type": "integer", "multipleOf": 99991}] * 1500})),
        ("json_schema", json.dumps({"$ref": "#/$defs/x", "$defs": {"x": {"anyOf": [{"$ref": "#/$defs/x"}]}}})),
        ("regex", "(.{0,1000}a.{0,1000}){100}"),
        ("regex", "((((a{0,100}){0,100}){0,100}){0,100})"),
        ("regex", ".*a.{60}b.*a.{60}"),
        ("lark", 'start: start start | "a" |'),
        ("lark", 'start: a a a a a a a a\na: "x"? b\nb: "x"* a?'),
    ],
)
def test_a_grammar_that_explodes_ends_its_own_answer_at_most(tokenizer_json: bytes, kind: Any, text: str) -> None:
    """It is refused, or fails within the answer, or does what it says; all that within a test's time."""
    tokenizer = small_json(tokenizer_json)
    history: list[int] = []
    try:
        sample = Grammars(tokenizer).constrain(
            Grammar(kind, text), make_sampler(), tokenizer.answer_stream([], raw=False), 0
        )
        for logits, _ in zip(random_logits(tokenizer, 0), range(60), strict=False):
            history.append(sample(logits, history))
            if history[-1] in tokenizer.end_ids:
                break
    except GrammarError as error:
        assert "\n" not in str(error)


def test_what_has_no_tokenizer_has_no_grammar() -> None:
    with pytest.raises(GrammarError, match="no tokenizer"):
        Grammars(TokenIds(100)).constrain(SCHEMA, make_sampler(), TokenIds(100).answer_stream([], raw=True), 0)


def test_names_of_control_tokens() -> None:
    assert special_name("<|python_tag|>") == "<|python_tag|>"
    assert special_name("[TOOL_CALLS]") == "<|[TOOL_CALLS]|>"
    assert special_name("</s>") == "</s>"


# Reasoning


@pytest.fixture(scope="module")
def thinking(byte_level: tokenizers.Tokenizer) -> Tokenizer:
    trained = tokenizers.Tokenizer.from_str(byte_level.to_str())
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    trained.add_tokens(["<think>", "</think>"])
    opened = CHATML.replace("assistant\n", "assistant\n<think>\n")
    config = {"eos_token": "<|im_end|>", "chat_template": opened}
    assets = {"tokenizer.json": trained.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = load_tokenizer(assets, 600)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.mark.parametrize("opening", ["by the prompt", "by the answer", "not at all", "never"])
def test_the_grammar_begins_where_thinking_ends(thinking: Tokenizer, opening: str) -> None:
    find = thinking._vocabulary.find
    think, close = find("<think>"), find("</think>")
    assert think is not None and close is not None
    prompt = {
        "by the prompt": thinking.encode_chat("x"),
        "by the answer": thinking.encode("x"),
        "not at all": thinking.encode("x"),
        "never": [*thinking.encode_chat("x"), close],
    }[opening]
    steer = {"by the prompt": [], "by the answer": [think], "not at all": [], "never": [think]}[opening]
    thoughts = [*thinking.encode("Hello, world!", special=False), close]
    wish = iter([*steer, *thoughts] if opening in ("by the prompt", "by the answer") else steer)
    inner = make_sampler(temperature=1.0, seed=3)

    def sample(logits: F32, history: Any) -> int:
        """What the model wants where that may come, and with the end of the answer before the end of its thoughts."""
        token = next(wish, None)
        if token is None or not np.isfinite(logits[token]):
            return inner(logits, history)
        if token == close:
            assert not np.isfinite(logits[sorted(thinking.end_ids)]).any()
        return token

    stream = thinking.answer_stream(prompt, raw=False)
    constrained = Grammars(thinking).constrain(SCHEMA, sample, stream, len(prompt))
    history = list(prompt)
    for logits in random_logits(thinking, 3):
        history.append(constrained(logits, history))
        if history[-1] in thinking.end_ids:
            break
        assert len(history) < LONGEST
    ids = history[len(prompt) : -1]
    told = thinking.answer_stream(prompt, raw=False)
    said = [*(piece for token in ids for piece in told.push(token)), *told.flush()]
    check_city("".join(piece.text for piece in said if not piece.reasoning))
    reasoning = "".join(piece.text for piece in said if piece.reasoning)
    assert reasoning == ("Hello, world!" if opening in ("by the prompt", "by the answer") else "")
