"""Calls that are asked for: a model that says anything makes valid ones, in the form of each family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers

from tests.support.real_tokenizers import templates, tokenizer_folders
from tests.support.tokenizer_cases import CHATML
from tpimpi.compute.arrays import F32
from tpimpi.serving.grammar import Grammars
from tpimpi.serving.sampling import make_sampler
from tpimpi.serving.server.exchange import CallBegan, CallMore, Ended, Event, TextMore, ToolChoice, Wanted
from tpimpi.serving.server.loop import parts_of
from tpimpi.serving.server.tool_calls import tool_events
from tpimpi.serving.server.tool_grammars import with_tools
from tpimpi.serving.server.wire import Chat, Done, Grammar, Ready, Sampling
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.weights.sources.safetensors import _hf_assets

pytest.importorskip("llguidance")

PLACE = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["city", "land"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["kind", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PLACE, "strict": True}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]
FAMILIES = ("hermes", "qwen3-coder", "glm", "llama3", "mistral", "mistral-args", "")


@pytest.fixture(scope="module")
def small(byte_level: tokenizers.Tokenizer) -> Tokenizer:
    trained = tokenizers.Tokenizer.from_str(byte_level.to_str())
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"])
    trained.add_tokens(["<tool_call>", "</tool_call>"])
    config = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    assets = {"tokenizer.json": trained.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    tokenizer = load_tokenizer(assets, 600)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


def wanted_of(choice: ToolChoice, grammar: Grammar | None = None, tools: Sequence[Any] = TOOLS) -> Wanted:
    chat = Chat([{"role": "user", "content": "x"}], list(tools))
    return Wanted(chat, Sampling(), tool_choice=choice, grammar=grammar)


def ready_of(family: str) -> Ready:
    return Ready("m", 100, 1, 600, family)


def answer(
    tokenizer: Tokenizer,
    family: str,
    wanted: Wanted,
    seed: int,
    wish: str = "",
    *,
    end: float = 20,
    skipping: bool = False,
) -> tuple[str, list[tuple[str, Any]], str]:
    """What is told of an answer of a model that says anything, after what it wishes to say as far as it may; `skipping`: it
    goes on with its wish behind a token that it may not say."""
    ready = ready_of(family)
    wanted = with_tools(wanted, ready)
    assert isinstance(wanted.prompt, Chat) and wanted.grammar is not None
    prompt = tokenizer.encode_messages(wanted.prompt.messages, tools=TOOLS)
    wishes = tokenizer.encode(wish, special=False)
    inner = make_sampler(temperature=1.0, seed=seed)

    def sample(logits: F32, history: Sequence[int]) -> int:
        if skipping:
            while wishes and not np.isfinite(logits[wishes[0]]):
                wishes.pop(0)
        if wishes and np.isfinite(logits[wishes[0]]):
            return wishes.pop(0)
        wishes.clear()
        return inner(logits, history)

    stream = tokenizer.answer_stream(prompt, raw=False)
    constrained = Grammars(tokenizer).constrain(wanted.grammar, sample, stream, len(prompt))
    told, events = tokenizer.answer_stream(prompt, raw=False), tool_events(wanted, ready)
    assert events is not None
    found: list[Event] = []
    rng, history = np.random.default_rng(seed), list(prompt)
    while True:
        logits = rng.standard_normal(tokenizer.sampled_ids, np.float32) * 3
        logits[sorted(tokenizer.end_ids)] = end
        token = constrained(logits, history)
        if token in tokenizer.end_ids:
            break
        history.append(token)
        assert len(history) < len(prompt) + 2000
        for part in parts_of(1, told.push(token), [token], []):
            found += events.part(part)
    for part in parts_of(1, told.flush(), [], []):
        found += events.part(part)
    found += events.done(Done(1, "end", 1, 0))
    calls: list[tuple[str, Any]] = []
    for event in found:
        if isinstance(event, CallBegan):
            calls.append((event.name, ""))
        if isinstance(event, CallMore):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    last = found[-1]
    assert isinstance(last, Ended)
    text = "".join(event.text for event in found if isinstance(event, TextMore))
    return text, [(name, json.loads(arguments)) for name, arguments in calls], last.why


def check(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        if name == "get_weather":
            assert set(arguments) == {"kind", "days"} and arguments["kind"] in ("city", "land")
            assert 1 <= len(arguments["days"]) <= 2 and all(1 <= day <= 31 for day in arguments["days"])
        else:
            assert name == "get_time" and isinstance(arguments, dict)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_that_is_asked_for_is_made(small: Tokenizer, family: str) -> None:
    several = set()
    for seed in range(12):
        choice = ToolChoice("named", "get_weather")
        text, calls, why = answer(small, family, wanted_of(choice), seed)
        assert (text, why) == ("", "tool_calls") and [name for name, _ in calls] == ["get_weather"]
        check(calls)
        bounded = [
            TOOLS[0],
            {
                "type": "function",
                "function": {
                    "name": "get_time",
                    "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
                },
            },
        ]
        text, calls, why = answer(small, family, wanted_of(ToolChoice("required"), tools=bounded), seed, end=2)
        assert (text, why) == ("", "tool_calls") and calls
        check(calls)
        several.add(len(calls))
        alone = wanted_of(ToolChoice("required", parallel=False), tools=bounded)
        assert len(answer(small, family, alone, seed)[1]) == 1
    assert len(several) > 1 or family == "llama3"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_strict_tool_is_called_by_its_schema_or_not_at_all(small: Tokenizer, family: str) -> None:
    """The model wishes to call with arguments of its own."""
    begins = {
        "hermes": 'I look. <tool_call>\n{"name": "get_weather", "arguments": {"nonsense": 5}}',
        "qwen3-coder": "I look. <tool_call>\n<function=get_weather>\n<parameter=nonsense>\n",
        "glm": "I look. <tool_call>get_weather\n<arg_key>nonsense",
        "llama3": '{"name": "get_weather", "parameters": {"nonsense": 5}}',
        "mistral": 'I look. [TOOL_CALLS][{"name": "get_weather", "arguments": {"nonsense": 5}}',
        "mistral-args": 'I look. [TOOL_CALLS]get_weather[ARGS]{"nonsense": 5}',
    }
    wish = begins[family or "hermes"]
    for seed in range(4):
        text, calls, why = answer(small, family, wanted_of(ToolChoice(), tools=TOOLS[:1]), seed, wish)
        assert text.strip() == ("" if family == "llama3" else "I look.") and why == "tool_calls"
        assert calls[0][0] == "get_weather"
        check(calls)
    text, calls, why = answer(small, family, wanted_of(ToolChoice()), 0, "Hello, world")
    assert (text, calls, why) == ("Hello, world", [], "end")


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_or_the_format_of_the_answer(small: Tokenizer, family: str) -> None:
    schema = Grammar(
        "json_schema",
        json.dumps(
            {
                "type": "object",
                "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}},
                "required": ["n"],
                "additionalProperties": False,
            }
        ),
    )
    tools = json.loads(json.dumps(TOOLS[:1]).replace('{"$ref": "#/$defs/day"}', json.dumps(PLACE["$defs"]["day"])))
    text, calls, _ = answer(small, family, wanted_of(ToolChoice(), schema, tools), 3, '{"n"')
    assert calls == [] and set(json.loads(text)) == {"n"}
    wish = {"llama3": '{"na', "mistral": "[TOOL_CALLS]", "mistral-args": "[TOOL_CALLS]"}.get(family, "<tool_call>")
    text, calls, _ = answer(small, family, wanted_of(ToolChoice(), schema, tools), 3, wish)
    assert text == "" and calls
    check(calls)


def test_strings_between_tags_are_as_they_are(small: Tokenizer) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "n": {"type": "integer"}},
        "required": ["city"],
    }
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    for family, wish in (
        (
            "qwen3-coder",
            '<tool_call>\n<function=f>\n<parameter=city>\nNew "York"\n</x>\n</parameter>\n</function>\n</tool_call>',
        ),
        ("glm", '<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>New "York"\n</x></arg_value>\n</tool_call>'),
    ):
        wanted = wanted_of(ToolChoice("required", parallel=False), tools=tools)
        _, calls, why = answer(small, family, wanted, 1, wish)
        assert calls == [("f", {"city": 'New "York"\n</x>'})] and why == "tool_calls"


def test_harmony() -> None:
    folder = next((folder for folder in tokenizer_folders() if folder.name == "gptoss"), None)
    template = next((path for path in templates() if path.stem == "openai-gpt-oss-120b"), None)
    if folder is None or template is None:
        pytest.skip("the tokenizer of gpt-oss is not there: set up with jobs/test.sh")
    tokenizer = load_tokenizer(_hf_assets(folder), 10**6, template.read_text("utf-8"))
    assert isinstance(tokenizer, Tokenizer)
    thoughts = "<|channel|>analysis<|message|>Hm, the weather.<|end|><|start|>assistant"
    for wish in (
        "<|channel|>commentary to",
        f"{thoughts}<|channel|>commentary to",
        f"{thoughts}<|channel|>finalcommentary to",
    ):
        wanted = wanted_of(ToolChoice("named", "get_weather"))
        text, calls, why = answer(tokenizer, "harmony", wanted, 2, wish, skipping=True)
        assert (text, why) == ("", "tool_calls") and [name for name, _ in calls] == ["get_weather"]
        check(calls)
    said = f"{thoughts}<|channel|>final<|message|>It is fine."
    assert answer(tokenizer, "harmony", wanted_of(ToolChoice()), 2, said) == ("It is fine.", [], "end")
    wish = f"{thoughts}<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{{}}"
    _, calls, why = answer(tokenizer, "harmony", wanted_of(ToolChoice()), 2, wish)
    assert why == "tool_calls" and calls[0][0] == "get_weather"
    check(calls)


def test_without_tools_and_without_a_wish() -> None:
    plain = wanted_of(ToolChoice(), tools=[])
    assert with_tools(plain, ready_of("hermes")) is plain
    free = wanted_of(ToolChoice(), tools=TOOLS[1:])
    assert with_tools(free, ready_of("hermes")) is free
    none = with_tools(wanted_of(ToolChoice("none")), ready_of("hermes"))
    assert isinstance(none.prompt, Chat) and none.prompt.tools == [] and tool_events(none, ready_of("hermes")) is None
    with pytest.raises(ValueError, match="'fly', which is none of the tools"):
        with_tools(wanted_of(ToolChoice("named", "fly")), ready_of("hermes"))
    with pytest.raises(ValueError, match="there are no tools"):
        with_tools(wanted_of(ToolChoice("required"), tools=[]), ready_of("hermes"))
