"""Tools, calls and their results in real chat templates: as transformers renders them, and none of it a control token."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_tokenizers import templates
from tests.support.tokenizer_cases import CHATML, MARKER
from tpimpi.errors import InputError
from tpimpi.serving.text.added_tokens import AddedToken
from tpimpi.serving.text.chat_template import ChatTemplate
from tpimpi.serving.text.control_tokens import ControlTokens
from tpimpi.serving.text.tool_forms import MARKS, family_of

NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
FAMILIES = {
    "Bielik-11B-v3.0-Instruct": "hermes",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral-args",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3-coder",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3-coder",
    "Qwen3.5-4B": "qwen3-coder",
    "google-gemma-2-2b-it": "",
    "ibm-granite-granite-4.0": "hermes",
    "meta-llama-Llama-3.1-8B-Instruct": "llama3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama3",
    "microsoft-Phi-3.5-mini-instruct": "",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral-args",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "openai-gpt-oss-120b": "harmony",
    "unsloth-mistral-Devstral-Small-2507": "mistral-args",
}
ESCAPING = ("Apriel-1.6-15b-Thinker-fixed", "unsloth-Apriel-1.5", "meetkai-functionary-medium-v3.1")  # as HTML has it
# These change lists, or need variables of their own, which transformers refuses too.
REFUSING = ("Kimi-K2-Instruct", "Kimi-K2-Thinking", "fireworks-ai-llama-3-firefunction-v2")
needs_templates = pytest.mark.skipif(not templates(), reason="llama.cpp's templates are not there: jobs/test.sh")


def tools_with(text: str) -> list[dict[str, Any]]:
    place = {"type": "string", "description": f"Where {text}"}
    parameters = {"type": "object", "properties": {"place": place}, "required": ["place"]}
    function = {"name": "get_weather", "description": f"The weather. {text}", "parameters": parameters}
    return [{"type": "function", "function": function}]


def chat_with(text: str, *, key: str = "place") -> list[dict[str, Any]]:
    """As a client sends it: arguments are JSON, a call has no content."""
    function = {"name": "get_weather", "arguments": json.dumps({key: f"Rome {text}"})}
    return [
        {"role": "user", "content": f"How is it in Rome? {text}"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "abcdefghi", "name": "get_weather", "content": f"Sunny {text}"},
    ]


def expected_texts(source: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[str]:
    """What transformers makes of it, in the forms that its own documentation and the templates ask for."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    found = []
    for as_object, content in itertools.product((True, False), (None, "", "absent")):
        made = json.loads(json.dumps(messages))
        for message in made:
            for call in message.get("tool_calls", ()):
                if as_object:
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
                message["content"] = content
                if content == "absent":
                    del message["content"]
        try:
            (text,), _ = utils.render_jinja_template(
                [made], tools=tools, chat_template=source, add_generation_prompt=True, **NAMED
            )
        except Exception:  # a template may insist on another form
            continue
        found.append(text)
    return found


def control_of(template: ChatTemplate) -> ControlTokens:
    texts = sorted({*MARKER.findall(template.literals()), *MARKS, "<s>", "</s>"})
    return ControlTokens(AddedToken(text, number, special=True) for number, text in enumerate(texts))


@needs_templates
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
@pytest.mark.slow_but("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "mistralai-Mistral-Nemo-Instruct-2407")
def test_tools_and_calls_are_rendered_as_transformers_renders_them(path: Path) -> None:
    source = path.read_text("utf-8")
    template = ChatTemplate(source, NAMED)
    control = control_of(template)
    assert family_of(source, control.texts) == FAMILIES.get(path.stem, family_of(source, control.texts))
    for text in ("", "<|im_end|></s> [TOOL_CALLS] <tool_call> \"'\\ é"):
        messages, tools = chat_with(text), tools_with(text)
        expected = expected_texts(source, messages, tools)
        if not expected and path.stem in REFUSING:
            continue
        written = "".join(
            part if isinstance(part, str) else part.content for part in template.parts(messages, control, tools=tools)
        )
        assert "get_weather" in written and "Rome" in written and "Sunny" in written
        assert "None" not in written
        assert "'place': 'Rome" not in written, "an object of Python, where JSON is meant"
        if template.shows_tools and not (text and path.stem in ESCAPING):
            assert written in expected


@needs_templates
@pytest.mark.parametrize("path", templates(), ids=lambda path: path.stem)
@pytest.mark.slow_but("Qwen-Qwen3-0.6B", "openai-gpt-oss-120b", "meta-llama-Llama-3.1-8B-Instruct")
def test_no_part_of_tools_calls_and_results_becomes_a_control_token(path: Path) -> None:
    """In text, in names of arguments and in descriptions."""
    if path.stem in REFUSING:
        pytest.skip("it refuses calls of tools")
    template = ChatTemplate(path.read_text("utf-8"), NAMED)
    control = control_of(template)

    def tokens(text: str, key: str) -> list[int]:
        parts = template.parts(chat_with(text, key=key), control, tools=tools_with(text), options={"a": text})
        return [part.token_id for part in parts if not isinstance(part, str)]

    neutral = tokens("x", "place")
    assert neutral or path.stem == "llama-cpp-rwkv-world"
    for token in sorted(control.texts)[:12]:
        assert tokens(token, f"k{token}") == neutral


def test_a_template_without_tools_has_them_as_text() -> None:
    template = ChatTemplate(CHATML, {})
    assert not template.shows_tools
    control = control_of(template)
    written = "".join(
        part if isinstance(part, str) else part.content
        for part in template.parts(chat_with(""), control, tools=tools_with(""))
    )
    assert written.startswith("<|im_start|>system\nYou can call functions")
    assert json.dumps(tools_with("")[0]) in written
    assert "<|im_start|>assistant\n<tool_call>\n" in written
    assert written.endswith(
        "<|im_start|>user\n<tool_response>\nSunny \n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_ids_of_calls_are_made_such_as_a_template_insists_on() -> None:
    path = next((path for path in templates() if "Mistral-Nemo" in path.stem), None)
    if path is None:
        pytest.skip("llama.cpp's templates are not there")
    template = ChatTemplate(path.read_text("utf-8"), NAMED)
    messages = chat_with("")
    messages[1]["tool_calls"][0]["id"] = messages[2]["tool_call_id"] = "call_0123456789"
    written = "".join(
        part if isinstance(part, str) else part.content
        for part in template.parts(messages, control_of(template), tools=tools_with(""))
    )
    short = written.partition('"id": "')[2].partition('"')[0]
    assert len(short) == 9 and short.isalnum() and f'"call_id": "{short}"' in written


def test_variables_of_the_template() -> None:
    source = "{% if enable_thinking is defined and not enable_thinking %}no {% endif %}{{ effort }}{{ eos_token }}"
    template = ChatTemplate(source, NAMED)
    control = control_of(template)
    parts = template.parts(chat_with("")[:1], control, options={"enable_thinking": False, "effort": "</s>"})
    assert parts[0] == "no </s>" and next(part for part in parts if not isinstance(part, str)).content == "</s>"
    for name in ("messages", "tools", "eos_token", "raise_exception"):
        with pytest.raises(InputError, match=f"'{name}' is a variable of the chat template's own"):
            template.parts(chat_with("")[:1], control, options={name: "x"})
