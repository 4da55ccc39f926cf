"""A real server whose answers call tools and follow schemas, asked by the clients of OpenAI and Anthropic."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.support import gemma
from tests.support.launch import Launcher
from tests.support.real_tokenizers import templates
from tests.support.servers import RunningServer

pytest.importorskip("llguidance")

MODEL = "SmolLM2-135M-Instruct.Q4_1"
ASKED: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


class Animal(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    legs: int = pydantic.Field(ge=0, le=9)
    colours: list[Literal["black", "white", "red"]] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def server(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    options = ("--model", str(smollm2), "--parallel", "4", "--context", "1024")
    running = RunningServer(mpirun, 2, tmp_path_factory.mktemp("tools") / "log", *options, env=cache)
    running.until_ready()
    yield running
    running.close()


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as found:
        yield found


def check_weather(arguments: Any) -> None:
    assert set(arguments) == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit")
    assert len(arguments["city"]) <= 20


def test_a_tool_is_called_whole_and_streaming(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    for choice, temperature in ((NAMED, 0), ("required", 1)):
        options: Any = {"tools": TOOLS, "tool_choice": choice, "temperature": temperature, "seed": 1, "max_tokens": 200}
        options |= {"parallel_tool_calls": False}
        whole = create(model=MODEL, messages=ASKED, **options).choices[0]
        assert whole.finish_reason == "tool_calls" and not whole.message.content
        (call,) = whole.message.tool_calls or []
        assert call.type == "function" and call.function.name == "get_weather"
        check_weather(json.loads(call.function.arguments))
        chunks = [chunk.choices[0] for chunk in create(model=MODEL, messages=ASKED, stream=True, **options)]
        calls = [one for chunk in chunks for one in chunk.delta.tool_calls or []]
        assert calls[0].function.name == "get_weather" and calls[0].id
        assert "".join(one.function.arguments or "" for one in calls) == call.function.arguments
        assert len(calls) > 4 and chunks[-1].finish_reason == "tool_calls"
        assert not any(chunk.delta.content for chunk in chunks)
    # The conversation goes on with what the tool said.
    said = [*ASKED, whole.message.model_dump(exclude_none=True)]
    said.append({"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees"})
    answer = create(model=MODEL, messages=said, tools=TOOLS, temperature=0, max_tokens=16)
    assert answer.choices[0].message.content and answer.usage is not None and answer.usage.prompt_tokens > 150


def test_answers_follow_a_schema(client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(
        model=MODEL,
        messages=[{"role": "user", "content": "Describe a cat as JSON."}],
        response_format=Animal,
        temperature=0,
        max_tokens=200,
    )
    assert isinstance(found.choices[0].message.parsed, Animal) and found.choices[0].finish_reason == "stop"
    schema = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "maxProperties": 0}}}
    free = client.chat.completions.create(
        model=MODEL, messages=ASKED, response_format=schema, temperature=1, seed=3, n=3, max_tokens=50
    )
    assert [json.loads(choice.message.content or "") for choice in free.choices] == [{}] * 3
    cut = client.chat.completions.create(
        model=MODEL, messages=ASKED, response_format={"type": "json_object"}, temperature=0, max_tokens=30
    ).choices[0]
    assert (cut.message.content or "").startswith("{")
    if cut.finish_reason == "stop":
        json.loads(cut.message.content or "")


def test_what_cannot_be_done_is_said_by_name(client: openai.OpenAI, server: RunningServer) -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "'fly'"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS * 2}, "two have the name"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "colour"}}}},
            "colour",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9"}},
                }
            },
            "retriev",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}, "tool_calls[0].function"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages'"),
    ]
    for fields, said in bad:
        body = {"model": MODEL, "messages": ASKED, "max_tokens": 5, **fields}
        found = server.client.post("/v1/chat/completions", json=body)
        assert found.status_code == 400, found.text
        error = found.json()["error"]
        assert error["type"] == "invalid_request_error" and said in error["message"] and "\n" not in error["message"]
    nested: Any = {"type": "integer"}
    for _ in range(300):
        nested = {"type": "array", "items": nested}
    body = {
        "messages": ASKED,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": nested}},
    }
    assert server.client.post("/v1/chat/completions", json=body).status_code == 400
    # Logits that overflow end their own answer.
    body = {"messages": ASKED, "repetition_penalty": 1e-308, "max_tokens": 5}
    found = server.client.post("/v1/chat/completions", json=body)
    assert found.status_code == 400 and "no token can be chosen" in found.json()["error"]["message"]
    # The server goes on.
    assert client.chat.completions.create(model=MODEL, messages=ASKED, max_tokens=1).choices


# Responses


def test_responses(client: openai.OpenAI) -> None:
    tools: list[Any] = [{"type": "function", **FUNCTION, "strict": True}]
    options: Any = {
        "model": MODEL,
        "input": ASKED,
        "tools": tools,
        "tool_choice": {"type": "function", "name": "get_weather"},
    }
    options |= {"temperature": 0, "max_output_tokens": 200, "store": False}
    whole = client.responses.create(**options)
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "get_weather" and whole.status == "completed"
    check_weather(json.loads(call.arguments))
    with client.responses.stream(**options) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert final.output[0].arguments == call.arguments
    assert kinds.count("response.function_call_arguments.delta") > 4
    items = [*ASKED, call.model_dump(), {"type": "function_call_output", "call_id": call.call_id, "output": "Sunny"}]
    answer = client.responses.create(model=MODEL, input=items, tools=tools, temperature=0, max_output_tokens=8)
    assert answer.output_text and answer.status == "incomplete" and answer.usage.output_tokens == 8
    parsed = client.responses.parse(
        model=MODEL, instructions="Answer as JSON.", input="Describe a dog.", text_format=Animal, temperature=0
    )
    assert isinstance(parsed.output_parsed, Animal)
    for fields in ({"previous_response_id": "resp_1"}, {"store": True}):
        with pytest.raises(openai.BadRequestError, match=next(iter(fields))):
            client.responses.create(model=MODEL, input="x", **fields)


def test_a_text_is_the_same_by_every_way(client: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Name a colour."}]
    chat = client.chat.completions.create(model=MODEL, messages=asked, temperature=0, max_tokens=20)
    response = client.responses.create(model=MODEL, input="Name a colour.", temperature=0, max_output_tokens=20)
    message = claude.messages.create(model=MODEL, messages=asked, max_tokens=20, extra_body={"temperature": 0})
    assert response.output_text == chat.choices[0].message.content == message.content[0].text
    assert message.stop_reason == "max_tokens" and message.usage.output_tokens == 20
    assert chat.usage is not None
    counted = claude.messages.count_tokens(model=MODEL, messages=asked)
    assert counted.input_tokens == chat.usage.prompt_tokens == response.usage.input_tokens
    with client.responses.stream(model=MODEL, input="Name a colour.", temperature=0, max_output_tokens=20) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == response.output_text


# Messages


@pytest.fixture(scope="module")
def claude(server: RunningServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as found:
        yield found


def test_messages(claude: anthropic.Anthropic) -> None:
    tools: list[Any] = [{"name": "get_weather", "description": "The weather.", "input_schema": PARAMETERS}]
    options: Any = {"model": MODEL, "max_tokens": 200, "messages": ASKED, "tools": tools, "system": "Be brief."}
    options |= {"tool_choice": {"type": "tool", "name": "get_weather"}, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(**options)
    (call,) = whole.content
    assert call.type == "tool_use" and whole.stop_reason == "tool_use" and call.name == "get_weather"
    check_weather(call.input)
    with claude.messages.stream(**options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert final.content[0].input == call.input and events[0] == "message_start" and events[-1] == "message_stop"
    assert events.count("input_json") > 4
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
    said = [*ASKED, {"role": "assistant", "content": whole.content}, {"role": "user", "content": [result]}]
    answer = claude.messages.create(model=MODEL, max_tokens=8, messages=said, tools=tools)
    assert answer.content[0].type == "text" and answer.usage.output_tokens <= 8


def test_stop_sequences_and_begun_answers(claude: anthropic.Anthropic) -> None:
    asked: list[Any] = [{"role": "user", "content": "Count from one to ten, in digits."}]
    greedy = {"temperature": 0}
    begun: list[Any] = [*asked, {"role": "assistant", "content": "1, 2, 3,"}]
    answer = claude.messages.create(model=MODEL, max_tokens=30, messages=begun, extra_body=greedy)
    assert answer.content[0].text.lstrip().startswith("4")
    stopped = claude.messages.create(
        model=MODEL, max_tokens=30, messages=begun, stop_sequences=["never", "6"], extra_body=greedy
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "6"
    assert stopped.content[0].text == answer.content[0].text.partition("6")[0]


def test_errors_of_messages(claude: anthropic.Anthropic) -> None:
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model=MODEL, max_tokens=5, messages=[{"role": "user", "content": [image]}])  # type: ignore[list-item]
    body: Any = raised.value.body
    assert (
        body["type"] == "error"
        and body["error"]["type"] == "invalid_request_error"
        and "image" in body["error"]["message"]
    )
    with pytest.raises(anthropic.NotFoundError):
        claude.messages.create(model="another", max_tokens=5, messages=ASKED)
    tools: list[Any] = [{"name": "f", "input_schema": {"type": "colour"}}]
    with pytest.raises(anthropic.BadRequestError, match="colour"):
        claude.messages.create(model=MODEL, max_tokens=5, messages=ASKED, tools=tools, tool_choice={"type": "any"})


# Gemma 3, whose files have no chat template: it gets one that knows neither tools nor a system prompt.


@pytest.mark.slow
def test_gemma_calls_tools_and_follows_schemas(mpirun: Launcher, cache: dict[str, str], tmp_path: Path) -> None:
    template = next((path for path in templates() if path.stem == "google-gemma-2-2b-it"), None)
    if template is None or not gemma.MODEL.exists():
        pytest.skip("Gemma 3 and its template are not there: set up with jobs/test.sh")
    options = ("--model", str(gemma.MODEL), "--chat-template", str(template), "--parallel", "2", "--context", "1024")
    server = RunningServer(mpirun, 2, tmp_path / "log", *options, env=cache)
    try:
        server.until_ready()
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            name = client.models.list().data[0].id
            chat: Any = {"model": name, "messages": ASKED, "temperature": 0, "max_tokens": 200}
            called = client.chat.completions.create(**chat, tools=TOOLS, tool_choice=NAMED).choices[0]
            assert called.finish_reason == "tool_calls" and called.message.tool_calls
            check_weather(json.loads(called.message.tool_calls[0].function.arguments))
            found = client.chat.completions.parse(**chat, response_format=Animal)
            assert isinstance(found.choices[0].message.parsed, Animal)
        with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0, timeout=120) as claude:
            tools: list[Any] = [{"name": "get_weather", "input_schema": PARAMETERS}]
            message = claude.messages.create(
                model=name,
                max_tokens=200,
                messages=ASKED,
                tools=tools,
                tool_choice={"type": "tool", "name": "get_weather"},
            )
            check_weather(message.content[-1].input)
    finally:
        server.close()
