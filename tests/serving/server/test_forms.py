"""Requests and answers of three APIs, without a server: what is made is parsed by the clients' own types, strictly."""

from __future__ import annotations

import json
from typing import Any

import anthropic.types
import msgspec
import openai.types.responses as openai_types
import pydantic
import pytest

from tpimpi.serving.server.answering import Usage
from tpimpi.serving.server.anthropic import MessagesForm, MessagesRequest, error_body
from tpimpi.serving.server.exchange import (
    CallBegan,
    CallMore,
    Ended,
    Event,
    ReasoningMore,
    TextMore,
    ToolChoice,
    Wanted,
)
from tpimpi.serving.server.problems import ApiError
from tpimpi.serving.server.response_objects import ResponsesForm
from tpimpi.serving.server.responses import ResponsesRequest
from tpimpi.serving.server.wire import Chat, Ready

USAGE = Usage(prompt_tokens=20, completion_tokens=9, cached_tokens=5, reasoning_tokens=3)
EVENTS: list[Event] = [
    *(ReasoningMore("Hm, "), ReasoningMore("yes.")),
    *(TextMore("I "), TextMore("look."), TextMore("")),
    *(CallBegan(0, "call_a", "get_weather"), CallMore(0, '{"city": '), CallMore(0, '"Rome"}')),
    *(CallBegan(1, "call_b", "get_time"), CallMore(1, "{}")),
    Ended("tool_calls", 9, 5, 3),
]
PLAIN: list[Event] = [TextMore("Hel"), TextMore("lo"), Ended("length", 2, 0)]
READY = Ready("model", 100, 1, 600, "hermes")


def strictly(kind: Any, value: Any) -> Any:
    """The value as the client's own type, none of whose fields may be missing or of another type; nor may fields be there
    that the type does not have."""
    found = pydantic.TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    known = found.model_dump(mode="json", by_alias=True)
    assert not (extra := _extra(found)), extra
    for name, one in value.items():
        if not isinstance(one, dict | list):
            assert known[name] == one
    return found


def _extra(found: Any) -> list[str]:
    """Names of fields that no type has, within and within."""
    names: list[str] = []
    if isinstance(found, pydantic.BaseModel):
        names += list(found.model_extra or {})
        for name in type(found).model_fields:
            names += _extra(getattr(found, name))
    elif isinstance(found, list):
        for one in found:
            names += _extra(one)
    return names


def streamed(form: Any, events: list[Event], usage: Usage = USAGE) -> list[dict[str, Any]]:
    """The events of a stream, each under the name of its type."""
    form.use_model(READY)
    data = b"".join(
        [*form.begin(Usage(prompt_tokens=20)), *(d for e in events for d in form.event(0, e)), *form.end(usage)]
    )
    found = []
    for block in data.decode().removesuffix("\n\n").split("\n\n"):
        name, _, text = block.partition("\ndata: ")
        value = json.loads(text)
        assert name == f"event: {value['type']}"
        found.append(value)
    return found


def whole(form: Any, events: list[Event], usage: Usage = USAGE) -> Any:
    form.use_model(READY)
    for event in events:
        list(form.event(0, event))
    return json.loads(msgspec.json.encode(form.whole(usage)))


# Responses


def response_request(**fields: Any) -> ResponsesRequest:
    return msgspec.json.decode(json.dumps({"model": "m", "input": "Hi", **fields}).encode(), type=ResponsesRequest)


def test_events_of_a_response_stand_in_their_order() -> None:
    found = streamed(ResponsesForm(response_request(stream=True)), EVENTS)
    for value in found:
        strictly(openai_types.ResponseStreamEvent, value)
    assert [value["sequence_number"] for value in found] == list(range(len(found)))
    item, part = ("response.output_item.added", "response.output_item.done"), "response.content_part"
    reasoning, text, arguments = (
        [f"response.{name}.{end}" for end in ("delta", "delta", "done")]
        for name in ("reasoning_text", "output_text", "function_call_arguments")
    )
    assert [value["type"] for value in found] == [
        *("response.created", "response.in_progress"),
        *(item[0], f"{part}.added", *reasoning, f"{part}.done", item[1]),
        *(item[0], f"{part}.added", *text, f"{part}.done", item[1]),
        *(item[0], *arguments, item[1]),
        *(item[0], *arguments[1:], item[1]),
        "response.completed",
    ]
    response = found[-1]["response"]
    items = [value["item"] for value in found if value["type"] == item[1]]
    assert response["output"] == items
    for value in found:
        if "item_id" in value:
            assert items[value["output_index"]]["id"] == value["item_id"]
    assert [one["type"] for one in items] == ["reasoning", "message", "function_call", "function_call"]
    assert items[2]["arguments"] == '{"city": "Rome"}' and items[2]["call_id"] == "call_a"
    assert found[2]["item"]["content"] == [] and found[2]["item"]["status"] == "in_progress"
    assert found[3]["part"]["text"] == ""


def test_a_whole_response() -> None:
    found = whole(ResponsesForm(response_request()), EVENTS)
    response = strictly(openai_types.Response, found)
    assert response.output_text == "I look." and response.status == "completed" and response.object == "response"
    assert response.usage.model_dump()["output_tokens_details"]["reasoning_tokens"] == 3
    assert response.usage.total_tokens == 29 and response.usage.input_tokens_details.cached_tokens == 5
    cut = strictly(openai_types.Response, whole(ResponsesForm(response_request(max_output_tokens=2)), PLAIN))
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.output[0].status == "incomplete"
    last = streamed(ResponsesForm(response_request(stream=True)), PLAIN)[-1]
    assert last["type"] == "response.incomplete"
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}]
    given = whole(ResponsesForm(response_request(tools=tools, temperature=0.5, metadata={"a": "b"})), PLAIN)
    response = strictly(openai_types.Response, given)
    assert response.tools[0].name == "f" and response.temperature == 0.5 and response.metadata == {"a": "b"}


def test_errors_within_a_stream_of_responses() -> None:
    form = ResponsesForm(response_request(stream=True))
    list(form.begin(USAGE))
    data = b"".join(form.error(ApiError(503, "a rank has died", kind="server_error", code="rank_failed"))).decode()
    values = [json.loads(block.partition("\ndata: ")[2]) for block in data.removesuffix("\n\n").split("\n\n")]
    for value in values:
        strictly(openai_types.ResponseStreamEvent, value)
    assert [value["type"] for value in values] == ["error", "response.failed"]
    assert values[1]["response"]["status"] == "failed"


def chat_of(wanted: Wanted) -> Chat:
    assert isinstance(wanted.prompt, Chat)
    return wanted.prompt


def test_items_become_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rome?"}]},
        {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Noon"}]},
    ]
    tools = [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True, "description": "F."}]
    schema = {"type": "json_schema", "name": "s", "schema": {"type": "object"}}
    wanted = response_request(
        input=items,
        instructions="System.",
        tools=tools,
        tool_choice={"type": "function", "name": "f"},
        text={"format": schema},
        max_output_tokens=5,
        temperature=0.5,
        reasoning={"effort": "low"},
        store=False,
        parallel_tool_calls=False,
    ).wanted()
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    chat = chat_of(wanted)
    assert chat.messages == [
        {"role": "system", "content": "System."},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "Hm.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "Noon"},
    ]
    function = {"name": "f", "description": "F.", "parameters": {"type": "object"}, "strict": True}
    assert chat.tools == [{"type": "function", "function": function}]
    assert wanted.tool_choice == ToolChoice("named", "f", parallel=False) and chat.options == {
        "reasoning_effort": "low"
    }
    assert wanted.grammar is not None and json.loads(wanted.grammar.text) == {"type": "object"}
    assert wanted.max_tokens == 5 and wanted.sampling.temperature == 0.5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
        ({"input": []}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
    ],
)
def test_what_responses_cannot_do_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        response_request(**fields).wanted()
    assert (raised.value.status, raised.value.param) == (400, param) and param in raised.value.message


# Messages


def message_request(**fields: Any) -> MessagesRequest:
    body = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}], **fields}
    return msgspec.json.decode(json.dumps(body).encode(), type=MessagesRequest)


def test_events_of_a_message_stand_in_their_order() -> None:
    found = streamed(MessagesForm(message_request(stream=True)), EVENTS)
    for value in found:
        if value["type"] != "ping":
            strictly(anthropic.types.RawMessageStreamEvent, value)
    block = ("content_block_start", "content_block_delta", "content_block_stop")
    assert [value["type"] for value in found] == [
        *("message_start", "ping"),
        *(block[0], block[1], block[1], block[2]),
        *(block[0], block[1], block[1], block[2]),
        *(block[0], block[1], block[1], block[2]),
        *block,
        *("message_delta", "message_stop"),
    ]
    assert [value["index"] for value in found if value["type"] == block[0]] == [0, 1, 2, 3]
    assert found[0]["message"]["usage"]["input_tokens"] == 20 and found[0]["message"]["content"] == []
    assert [value["content_block"] for value in found if value["type"] == block[0]][:3] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "call_a", "name": "get_weather", "input": {}},
    ]
    assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2]["usage"]["output_tokens"] == 9


def test_a_whole_message() -> None:
    message = strictly(anthropic.types.Message, whole(MessagesForm(message_request()), EVENTS))
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use", "tool_use"]
    assert message.content[0].thinking == "Hm, yes." and message.content[1].text == "I look."
    assert message.content[2].input == {"city": "Rome"} and message.stop_reason == "tool_use"
    assert message.usage.input_tokens == 15 and message.usage.cache_read_input_tokens == 5
    for why, stop, expected in (
        ("end", "", ("end_turn", None)),
        ("stop", "END", ("stop_sequence", "END")),
        ("length", "", ("max_tokens", None)),
    ):
        ended: Any = Ended(why, 2, 0, stop=stop)  # type: ignore[arg-type]
        message = strictly(anthropic.types.Message, whole(MessagesForm(message_request()), [TextMore("Hi"), ended]))
        assert (message.stop_reason, message.stop_sequence) == expected
    cut = [CallBegan(0, "c", "f"), CallMore(0, '{"city": "Ro'), Ended("length", 2, 0)]
    assert whole(MessagesForm(message_request()), cut)["content"][0]["input"] == {}


def test_blocks_become_messages() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Rome?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "Sunny"}]},
                {"type": "tool_result", "tool_use_id": "c2"},
                {"type": "text", "text": "And now?"},
            ],
        },
        {"role": "assistant", "content": "It is "},
    ]
    tools = [{"name": "f", "description": "F.", "input_schema": {"type": "object"}}]
    wanted = message_request(
        messages=messages,
        system=[{"type": "text", "text": "Be brief."}],
        tools=tools,
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        temperature=0.5,
        top_k=3,
        thinking={"type": "disabled"},
        metadata={"user_id": "x"},
    ).wanted()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = chat_of(wanted)
    assert chat.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call], "reasoning_content": "Hm."},
        {"role": "tool", "tool_call_id": "c1", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": ""},
        {"role": "user", "content": "And now?"},
    ]
    assert chat.begun == "It is" and chat.options == {"enable_thinking": False}
    function = {"name": "f", "description": "F.", "parameters": {"type": "object"}}
    assert chat.tools == [{"type": "function", "function": function}]
    assert wanted.tool_choice == ToolChoice("required", parallel=False) and wanted.stops == ["END"]
    assert wanted.sampling.top_k == 3 and wanted.max_tokens == 9
    config = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    grammar = message_request(output_config=config).wanted().grammar
    assert grammar is not None and json.loads(grammar.text) == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"temperature": 1.5}, "temperature"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"container": "x"}, "container"),
        ({"output_format": {"type": "xml"}}, "output_config.format"),
    ],
)
def test_what_messages_cannot_do_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as raised:
        message_request(**fields).wanted()
    assert (raised.value.status, raised.value.param) == (400, param)
    found = error_body(raised.value)
    assert found["type"] == "error" and found["error"]["type"] == "invalid_request_error"
    strictly(anthropic.types.ErrorResponse, {**found, "request_id": None})
