"""Calls of tools in answers as they stream: what templates write for a call is what is read, however it comes in pieces."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.real_tokenizers import templates, tokenizer_folders
from tpimpi.serving.server.exchange import CallBegan, CallMore, Ended, Event, ReasoningMore, TextMore
from tpimpi.serving.server.loop import parts_of
from tpimpi.serving.server.tool_calls import ToolEvents
from tpimpi.serving.server.wire import Done, Part, TokenLogprob
from tpimpi.serving.text.answer import Piece
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.messages import variants
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.weights.sources.safetensors import _hf_assets

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "A tool.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "more": {"type": "object"}},
            },
        },
    }
    for name in ("get_weather", "get_time")
]
ARGUMENTS = {"city": 'São "Paulo" {}[] \\ \n<tag> </s>', "days": 3, "more": {"a": [1, None, {"b": "}"}]}}
MARKED = re.compile(r"(\[TOOL_CALLS\]|\[ARGS\]|\[CALL_ID\]|<\|python_tag\|>)")
DONE = Done(1, "end", 9, 2)


def parts_of_text(text: str, *, marks: bool, sizes: random.Random | None) -> list[Part]:
    """The text in pieces of any size, or whole."""
    parts = []
    for piece in MARKED.split(text) if marks else [text]:
        if marks and MARKED.fullmatch(piece):
            parts.append(Part(1, "", "", [0], mark=piece))
            continue
        while piece:
            size = len(piece) if sizes is None else sizes.randint(1, 6)
            parts.append(Part(1, piece[:size], "", [0]))
            piece = piece[size:]  # noqa: PLW2901
    return parts


def read(family: str, parts: list[Part], done: Done = DONE, **more: Any) -> tuple[str, list[tuple[str, str]], str]:
    """The text, the calls with their arguments, and why it ended; what is told is checked to be in order."""
    stream = ToolEvents(family, TOOLS, **more)
    events: list[Event] = [event for part in parts for event in stream.part(part)]
    events += stream.done(done)
    text, calls, ids = "", [], set()
    for event in events:
        match event:
            case TextMore():
                text += event.text
            case CallBegan():
                assert event.index == len(calls)
                calls.append((event.name, ""))
                ids.add(event.id)
            case CallMore():
                assert event.index == len(calls) - 1 and event.arguments
                calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
            case Ended():
                assert event is events[-1]
    assert len(ids) == len(calls)
    last = events[-1]
    assert isinstance(last, Ended)
    return text, calls, last.why


# Templates of families; what they cannot say is left out: tags have no place for </s>, which is a token.
BY_TEMPLATE = {
    "Qwen-Qwen3-0.6B": ("hermes", 2),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", 2),
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": ("hermes", 2),
    "ibm-granite-granite-4.0": ("hermes", 2),
    "Qwen3-Coder": ("qwen3-coder", 2),
    "Qwen3.5-4B": ("qwen3-coder", 2),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("qwen3-coder", 2),
    "GLM-4.6": ("glm", 2),
    "GLM-4.7-Flash": ("glm", 2),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3", 1),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3", 1),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", 2),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral-args", 2),
    "unsloth-mistral-Devstral-Small-2507": ("mistral-args", 2),
    "mistralai-Ministral-3-14B-Reasoning-2512": ("mistral-args", 2),
}


def written_by_template(path: Path, calls: int) -> str:
    """What transformers writes for an answer with calls, without what ends it."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = path.read_text("utf-8")
    made = [
        {"id": f"abcdefgh{number}", "type": "function", "function": {"name": name, "arguments": ARGUMENTS}}
        for number, name in zip(range(calls), ("get_weather", "get_time"), strict=False)
    ]
    user = {"role": "user", "content": "x"}
    texts = []
    for answer in ([], [{"role": "assistant", "content": "", "tool_calls": made}]):
        for messages in variants([user, *answer], as_text=False, developer=False):
            try:
                (text,), _ = utils.render_jinja_template(
                    [messages],
                    tools=TOOLS,
                    chat_template=source,
                    add_generation_prompt=not answer,
                    bos_token="<s>",
                    eos_token="</s>",
                )
            except Exception:  # another form
                continue
            texts.append(text)
            break
    prompt, whole = texts
    common = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt))
    text = whole[common:]
    ends = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|observation|>")
    while ending := next((end for end in ends if text.rstrip().endswith(end)), None):
        text = text.rstrip().removesuffix(ending)
    return text.rpartition("think>")[2]


@pytest.mark.parametrize("stem", BY_TEMPLATE)
def test_what_a_template_writes_for_calls_is_read(stem: str) -> None:
    path = next((path for path in templates() if path.stem == stem), None)
    if path is None:
        pytest.skip("llama.cpp's templates are not there: jobs/test.sh")
    family, calls = BY_TEMPLATE[stem]
    text = written_by_template(path, calls)
    assert "get_weather" in text
    for seed in range(20):
        sizes = None if seed == 0 else random.Random(seed)
        said, found, why = read(family, parts_of_text(text, marks=family.startswith("mistral"), sizes=sizes))
        assert [name for name, _ in found] == ["get_weather", "get_time"][:calls]
        for _, arguments in found:
            assert json.loads(arguments) == ARGUMENTS
        assert (said, why) == ("", "tool_calls")


CALL = '{"name": "get_weather", "arguments": {"city": "Rome"}}'
LLAMA = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
ROME = [("get_weather", '{"city": "Rome"}')]
# Family, what is answered, and its text, calls and end.
ANSWERS: list[tuple[str, str, str, list[tuple[str, str]], str]] = [
    ("hermes", "Hello, <b>world</b>.\n", "Hello, <b>world</b>.\n", [], "end"),
    ("hermes", f"I look.\n\n<tool_call>\n{CALL}\n</tool_call>", "I look.", ROME, "tool_calls"),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\nSo.", "So.", ROME * 2, "tool_calls"),
    ("hermes", f"<tool_call>\n{CALL}", "", ROME, "tool_calls"),  # not closed
    ("hermes", f"<tool_call>\n{CALL}\n{CALL}\n</tool_call>", "", ROME * 2, "tool_calls"),
    ("hermes", '<tool_call>{"arguments": {"city": "Rome"}, "name": "get_weather"}</tool_call>', "", ROME, "tool_calls"),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
        *("", ROME, "tool_calls"),
    ),
    ("hermes", '<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")], "tool_calls"),
    ("hermes", "a < b and <tool", "a < b and <tool", [], "end"),
    ("hermes", "<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", [], "end"),
    ("hermes", 'A\n<tool_call>\n{"city": 1}\n</tool_call>', 'A\n<tool_call>\n{"city": 1}\n</tool_call>', [], "end"),
    ("hermes", '<tool_call>\n{"name": "get_w', '<tool_call>\n{"name": "get_w', [], "end"),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}</tool_call>', None, [], "end"),  # type: ignore[list-item]
    ("", f"<tool_call>\n{CALL}\n</tool_call>", "", ROME, "tool_calls"),
    ("llama3", LLAMA, "", ROME, "tool_calls"),
    ("llama3", f"\n {LLAMA}; {LLAMA}", "", ROME * 2, "tool_calls"),
    ("llama3", f"<|python_tag|>{LLAMA}", "", ROME, "tool_calls"),
    ("llama3", f"Wait.<|python_tag|>{LLAMA}", "Wait.", ROME, "tool_calls"),
    ("llama3", f"It is {LLAMA}", f"It is {LLAMA}", [], "end"),
    ("llama3", '{"a": {"b": 1}} is JSON', '{"a": {"b": 1}} is JSON', [], "end"),
    ("llama3", '{"name": "Ada", "parameters": {}} is JSON', '{"name": "Ada", "parameters": {}} is JSON', [], "end"),
    ("llama3", "<|python_tag|>print(1)", "print(1)", [], "end"),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", ROME * 2, "tool_calls"),
    ("mistral", f"[TOOL_CALLS] [{CALL}]", "", ROME, "tool_calls"),
    ("mistral-args", 'So:[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "So:", ROME, "tool_calls"),
    (
        "mistral-args",
        '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome"}[TOOL_CALLS]get_time[ARGS]{}',
        *("", [*ROME, ("get_time", "{}")], "tool_calls"),
    ),
    ("mistral", "[TOOL_CALLS]hm", "hm", [], "end"),
    ("glm", "<tool_call>get_time\n</tool_call>", "", [("get_time", "{}")], "tool_calls"),
    ("glm", "<tool_call>Ü und (mehr)", "<tool_call>Ü und (mehr)", [], "end"),
    ("qwen3-coder", "<tool_call>\nhm", "<tool_call>\nhm", [], "end"),
    (
        "qwen3-coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n5\n</parameter>",
        *("", [("get_weather", '{"city": "5", "days": 5}')], "tool_calls"),
    ),
]


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_answers(number: int) -> None:
    family, answer, text, calls, why = ANSWERS[number]
    for seed in range(25):
        sizes = None if seed == 0 else random.Random(seed)
        marks = family.startswith(("mistral", "llama"))
        assert read(family, parts_of_text(answer, marks=marks, sizes=sizes)) == (
            answer if text is None else text,
            calls,
            why,
        )


def test_control_tokens_that_are_only_spelled_are_text() -> None:
    """What a page or a tool made the model repeat is no call."""
    for family, answer in (("mistral", f"[TOOL_CALLS][{CALL}]"), ("llama3", f"x <|python_tag|>{LLAMA}")):
        assert read(family, parts_of_text(answer, marks=False, sizes=random.Random(1))) == (answer, [], "end")


def test_text_is_told_at_once_and_arguments_as_they_come() -> None:
    stream = ToolEvents("hermes", TOOLS)
    assert stream.part(Part(1, "Hi", "", [1])) == [TextMore("Hi")]
    assert stream.part(Part(1, " <", "", [2])) == []
    assert stream.part(Part(1, "b>", "", [3])) == [TextMore(" <b>")]
    assert stream.part(Part(1, "<tool_call>", "", [4])) == []
    assert stream.part(Part(1, '{"name": "get_time", "argu', "", [5])) == []
    (began,) = stream.part(Part(1, 'ments": ', "", [6])) or [None]
    assert began is None
    found = stream.part(Part(1, '{"ci', "", [7]))
    assert isinstance(found[0], CallBegan) and found[1] == CallMore(0, '{"ci')
    assert stream.part(Part(1, 'ty": "Ro', "", [8])) == [CallMore(0, 'ty": "Ro')]
    logprobs = [TokenLogprob(b"x", -1.0)]
    assert stream.part(Part(1, 'me"}}', "", [9], logprobs)) == [CallMore(0, 'me"}'), TextMore("", logprobs)]


def test_ends_ids_and_parallel_calls() -> None:
    parts = parts_of_text(f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", marks=False, sizes=None)
    assert read("hermes", parts, parallel=False) == ("", ROME, "tool_calls")
    assert read("hermes", parts, Done(1, "max_tokens", 9, 0))[2] == "length"
    assert read("hermes", parts[:0], Done(1, "stop", 9, 0)) == ("", [], "stop")
    for family, form in (("hermes", r"call_\w{24}"), ("mistral", r"[a-zA-Z0-9]{9}")):
        stream = ToolEvents(family, TOOLS)
        marked = [Part(1, "", "", [1], mark="[TOOL_CALLS]"), Part(1, f"[{CALL}]", "", [2])]
        (began, *_) = [e for part in (parts if family == "hermes" else marked) for e in stream.part(part)]
        assert isinstance(began, CallBegan) and re.fullmatch(form, began.id)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["hermes", "llama3", "mistral", "mistral-args", "glm", "qwen3-coder", ""]),
    st.lists(
        st.sampled_from(
            [
                *(
                    "<tool_call>",
                    "</tool_call>",
                    "[TOOL_CALLS]",
                    "[ARGS]",
                    "<|python_tag|>",
                    CALL,
                    LLAMA,
                    "{",
                    "}",
                    '"',
                ),
                *("\n", " ", "x", "<", "[", "]", "\\", "<function=f>", "<parameter=a>", "</parameter>", "</function>"),
                *("<arg_key>", "k</arg_key>", "<arg_value>v</arg_value>", '{"name": "', "get_time", ";", ","),
            ]
        ),
        max_size=14,
    ),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_how_text_is_cut_changes_nothing(family: str, pieces: list[str], sizes: random.Random, marks: bool) -> None:
    """Whatever the answer is; and what has no call in it loses no text but blanks and marks."""
    text = "".join(pieces)
    whole = read(family, parts_of_text(text, marks=marks, sizes=None))
    assert read(family, parts_of_text(text, marks=marks, sizes=sizes)) == whole
    if not whole[1] and not marks:
        assert whole[0] == text


# gpt-oss


@pytest.fixture(scope="module")
def harmony() -> Tokenizer:
    folder = next((folder for folder in tokenizer_folders() if folder.name == "gptoss"), None)
    template = next((path for path in templates() if path.stem == "openai-gpt-oss-120b"), None)
    if folder is None or template is None:
        pytest.skip("the tokenizer of gpt-oss is not there: set up with jobs/test.sh")
    tokenizer = load_tokenizer(_hf_assets(folder), 10**6, template.read_text("utf-8"))
    assert isinstance(tokenizer, Tokenizer) and tokenizer.family == "harmony"
    return tokenizer


def test_calls_of_harmony(harmony: Tokenizer) -> None:
    """As OpenAI's description of the format has them."""
    written = (
        "<|channel|>analysis<|message|>I look.<|end|><|start|>assistant<|channel|>commentary<|message|>Wait.<|end|>"
        '<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city":"Rome"}'
    )
    texts = [
        written,
        written.replace(
            "<|channel|>commentary to=functions.get_weather", " to=functions.get_weather<|channel|>commentary"
        ),
    ]
    prompt = harmony.encode_messages([{"role": "user", "content": "x"}], tools=TOOLS)
    for text in texts:
        stream, answer = harmony.answer_stream(prompt, raw=False), ToolEvents("harmony", TOOLS)
        events: list[Event] = []
        for token in harmony.encode(text, special=False):
            for part in parts_of(1, stream.push(token), [token], []):
                events += answer.part(part)
        for part in parts_of(1, stream.flush(), [], []):
            events += answer.part(part)
        events += answer.done(DONE)
        reasoning = "".join(event.text for event in events if isinstance(event, ReasoningMore))
        arguments = "".join(event.arguments for event in events if isinstance(event, CallMore))
        assert reasoning == "I look.\nWait." and arguments == '{"city":"Rome"}'
        assert [event.name for event in events if isinstance(event, CallBegan)] == ["get_weather"]
        assert isinstance(events[-1], Ended) and events[-1].why == "tool_calls" and events[-1].reasoning_tokens > 4
        assert not any(isinstance(event, TextMore) for event in events)


def test_parts_keep_the_order_of_pieces() -> None:
    pieces = [Piece("a", reasoning=True), Piece("b"), Piece("c"), Piece("call", mark="m"), Piece("d", reasoning=True)]
    logprobs = [TokenLogprob(b"x", -1.0)]
    assert parts_of(3, pieces, [7, 8], logprobs) == [
        Part(3, "bc", "a", [7, 8], logprobs),
        Part(3, "", "d", [], mark="m"),
    ]
    assert parts_of(3, [Piece("a"), Piece("b", reasoning=True)], [7], []) == [
        Part(3, "a", "", [7]),
        Part(3, "", "b", []),
    ]
    assert parts_of(3, [], [7], []) == [Part(3, "", "", [7])]
    assert parts_of(3, [], [], []) == []
