"""Programs that people use, against a real server at two ranks, with each of two real models: chat, stream, tools, schemas,
errors.

Greedy answers must be what a run without a server says. (More of OpenAI's and Anthropic's packages for Python is in
test_serve.py and test_tools.py.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import anthropic
import openai
import pydantic
import pytest

from tests.support import gemma
from tests.support.launch import TIMEOUT, Launcher
from tests.support.node_client import ask_by_node
from tests.support.real_tokenizers import FOLDER
from tests.support.servers import RunningServer

pytest.importorskip("llguidance")

TOKENS = 16
PROMPT = "How is the weather in Rome?"
ASKED: list[Any] = [{"role": "user", "content": PROMPT}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": PARAMETERS}
TOOLS: list[Any] = [{"type": "function", "function": FUNCTION}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}
CITIES = ({"city": "Rome"}, {"city": "Paris"})


class Animal(pydantic.BaseModel):
    """An animal."""

    model_config = pydantic.ConfigDict(extra="forbid")
    kind: Literal["cat", "dog"]
    wild: bool  # no limits of numbers: Anthropic's package takes them out of a schema


def get_weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather of a city."""
    return f"Sunny in {city}"


@dataclass
class Served:
    """A server that is ready, its model's name, and the greedy answer to PROMPT of a run without a server."""

    url: str
    model: str
    alone: str

    @property
    def api(self) -> str:
        return f"{self.url}/v1"


@pytest.fixture(scope="module", params=["smollm2", "gemma"])
def served(
    request: pytest.FixtureRequest,
    mpirun: Launcher,
    cache: dict[str, str],
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("clients")
    options = ["--model", str(smollm2)]
    if request.param == "gemma":  # a base model: with the template of the one that was made for chats
        published = FOLDER / "gemma3" / "tokenizer_config.json"
        if not gemma.MODEL.exists() or not published.exists():
            pytest.skip("Gemma 3 270M, or its chat template, was not fetched; set up with: bash jobs/test.sh")
        (folder / "template").write_text(json.loads(published.read_text())["chat_template"])
        options = ["--model", str(gemma.MODEL), "--chat-template", str(folder / "template")]
    running = RunningServer(mpirun, 2, folder / "log", *options, "--parallel", "4", "--context", "1024", env=cache)
    try:
        asked = ("--prompt", PROMPT, "--max-tokens", str(TOKENS), "--quiet")
        result = mpirun(2, "-m", "tpimpi", *options, *asked, env=cache)
        assert result.code == 0, result.err
        running.until_ready()
        model = running.client.get("/v1/models").json()["data"][0]["id"]
        yield Served(running.url, model, result.out.removesuffix("\n"))
        assert "Traceback" not in running.said()
    finally:
        running.close()


@pytest.mark.slow_but("smollm2")
def test_openai_of_npm(served: Served) -> None:
    found = ask_by_node(
        served.api, served.model, {"messages": ASKED, "tools": TOOLS, "schema": Animal.model_json_schema()}
    )
    assert found["models"] == [served.model]
    assert found["whole"] == found["streamed"] == found["response"] == served.alone
    usage, streamed = found["usage"], found["streamedUsage"]
    assert usage["completion_tokens"] == streamed["completion_tokens"] == TOKENS
    assert usage["prompt_tokens"] == streamed["prompt_tokens"] == usage["total_tokens"] - TOKENS
    (given,) = found["called"]
    assert given in CITIES and found["roles"] == ["user", "assistant", "tool"] and found["after"]
    Animal.model_validate_json(found["shaped"])
    assert found["wrongModel"] == {"known": True, "status": 404, "code": "model_not_found", "param": "model"}
    assert found["wrongField"] == {"known": True, "status": 400, "code": None, "param": "temperature"}


@pytest.mark.slow
def test_openai_of_python(served: Served) -> None:
    with openai.OpenAI(base_url=served.api, api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        create = client.chat.completions.create
        greedy: dict[str, Any] = {"model": served.model, "messages": ASKED, "temperature": 0, "max_tokens": TOKENS}
        assert create(**greedy).choices[0].message.content == served.alone
        assert "".join(chunk.choices[0].delta.content or "" for chunk in create(**greedy, stream=True)) == served.alone
        called = create(**{**greedy, "max_tokens": 100}, tools=TOOLS, tool_choice=NAMED).choices[0]
        (call,) = called.message.tool_calls or []
        assert json.loads(call.function.arguments) in CITIES and called.finish_reason == "tool_calls"
        said = [*ASKED, called.message, {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}]
        assert create(**{**greedy, "messages": said}, tools=TOOLS).choices[0].message.content
        shaped = client.chat.completions.parse(**{**greedy, "max_tokens": 400}, response_format=Animal)
        assert isinstance(shaped.choices[0].message.parsed, Animal)
        with client.responses.stream(
            model=served.model, input=PROMPT, temperature=0, max_output_tokens=TOKENS
        ) as stream:
            told = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(told) == served.alone
        with pytest.raises(openai.NotFoundError):
            create(**{**greedy, "model": "another"})
        with pytest.raises(openai.BadRequestError) as raised:
            create(**greedy, top_p=2)
        assert raised.value.param == "top_p"


@pytest.mark.slow
def test_anthropic(served: Served) -> None:
    with anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0, timeout=TIMEOUT) as client:
        options: Any = {"model": served.model, "messages": ASKED, "extra_body": {"temperature": 0}}
        assert client.messages.create(max_tokens=TOKENS, **options).content[0].text == served.alone
        with client.messages.stream(max_tokens=TOKENS, **options) as stream:
            assert "".join(stream.text_stream) == served.alone
        tools: list[Any] = [{"name": "get_weather", "input_schema": PARAMETERS}]
        choice: Any = {"type": "tool", "name": "get_weather"}
        called = client.messages.create(max_tokens=100, tools=tools, tool_choice=choice, **options)
        (call,) = called.content
        assert call.type == "tool_use" and call.input in CITIES
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny"}
        said = [*ASKED, {"role": "assistant", "content": called.content}, {"role": "user", "content": [result]}]
        answer = client.messages.create(max_tokens=TOKENS, tools=tools, **{**options, "messages": said})
        assert answer.content[0].type == "text" and answer.content[0].text
        shaped = client.messages.parse(max_tokens=400, output_format=Animal, **options)
        assert isinstance(shaped.parsed_output, Animal)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(max_tokens=1, **{**options, "model": "another"})


@pytest.mark.slow
def test_langchain(served: Served) -> None:
    from langchain_core.messages import HumanMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    def chat(**options: Any) -> Any:
        given = {"model": served.model, "temperature": 0, "max_tokens": TOKENS, "stream_usage": True, **options}
        return ChatOpenAI(base_url=served.api, api_key="none", max_retries=0, **given)

    whole = chat().invoke(PROMPT)
    chunks = list(chat().stream(PROMPT))
    assert whole.content == "".join(chunk.content for chunk in chunks) == served.alone
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert [one["output_tokens"] for one in (whole.usage_metadata, *usage)] == [TOKENS, TOKENS]
    assert chat(use_responses_api=True).invoke(PROMPT).text == served.alone
    weather = tool(get_weather)
    bound = chat(max_tokens=100).bind_tools([weather], tool_choice="get_weather", strict=True)
    called = bound.invoke(PROMPT)
    (call,) = called.tool_calls
    streamed = None
    for chunk in bound.stream(PROMPT):
        streamed = chunk if streamed is None else streamed + chunk
    assert call["args"] == streamed.tool_calls[0]["args"] and call["args"] in CITIES
    assert chat().bind_tools([weather]).invoke([HumanMessage(PROMPT), called, weather.invoke(call)]).content
    for method in ("json_schema", "function_calling"):
        shaped = chat(max_tokens=400).with_structured_output(Animal, method=method)
        assert isinstance(shaped.invoke("Describe a cat."), Animal)
    with pytest.raises(openai.NotFoundError):
        chat(model="another").invoke(PROMPT)
    with pytest.raises(openai.BadRequestError) as raised:
        chat(top_p=2).invoke(PROMPT)
    assert raised.value.param == "top_p"


@pytest.mark.slow
def test_llm_command(served: Served, tmp_path: Path) -> None:
    """Without plugins: models that speak as OpenAI's stand in a file of its user's folder."""
    named = {"here": (served.model, "supports_schema: true\n  supports_tools: true"), "another": ("another", "")}
    (tmp_path / "extra-openai-models.yaml").write_text(
        "".join(
            f"- model_id: {name}\n  model_name: {model}\n  api_base: {served.api}\n  {more}\n"
            for name, (model, more) in named.items()
        )
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}

    def llm(model: str, *arguments: str, tokens: int = TOKENS) -> subprocess.CompletedProcess[str]:
        options = ["-o", "temperature", "0", "-o", "max_tokens", str(tokens)]
        command = [sys.executable, "-m", "llm", "-m", model, *options, *arguments]
        return subprocess.run(
            command,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )

    for arguments in ((PROMPT,), ("--no-stream", PROMPT)):
        found = llm("here", *arguments)
        assert (found.returncode, found.stdout.removesuffix("\n")) == (0, served.alone), found.stderr
    shaped = llm("here", "--schema", json.dumps(Animal.model_json_schema()), "Describe a cat.", tokens=400)
    Animal.model_validate_json(shaped.stdout)
    function = 'def get_weather(city: str) -> str:\n    "The weather of a city."\n    return "Sunny"\n'
    tools = llm("here", "--functions", function, PROMPT)  # which these models do not call by themselves
    assert tools.returncode == 0 and tools.stdout.strip() and tools.stdout != shaped.stdout, tools.stderr
    wrong = llm("another", PROMPT)
    assert wrong.returncode == 1 and "does not exist" in wrong.stderr
