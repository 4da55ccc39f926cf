"""Reasoning apart from the answer: harmony and <think>, id by id, in a conversation, and in runs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from tests.support.launch import Result
from tests.support.real_tokenizers import templates
from tests.support.tokenizer_cases import added, gguf_keys, load_gguf
from tpimpi.cli import answers
from tpimpi.serving.generate import to_pieces
from tpimpi.serving.session import Session
from tpimpi.serving.text.answer import AnswerStream, Piece
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

HARMONY = [
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endoftext|>",
]
THINK = ["<think>", "</think>"]
HARMONY_CHAT = (
    "{% for m in messages %}{% if m.role == 'assistant' and '<|channel|>final<|message|>' in m.content %}"
    "{{ raise_exception('You have passed a message containing <|channel|> tags') }}{% endif %}"
    "<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{% if loop.last and not add_generation_prompt %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
THINK_CHAT = "{% for m in messages %}<|start|>{{ m.content }}<|end|>\n{% endfor %}<|start|>\n<think>\n</think>"
OPENED_CHAT = THINK_CHAT.removesuffix("</think>")


def tokenizer_with(trained: tokenizers.Tokenizer, special: Sequence[str], plain: Sequence[str], chat: str) -> Tokenizer:
    copy = tokenizers.Tokenizer.from_str(trained.to_str())
    copy.add_special_tokens(list(special))
    copy.add_tokens(list(plain))
    config = json.dumps({"chat_template": chat, "eos_token": special[0]}).encode()
    found = load_tokenizer({"tokenizer.json": copy.to_str().encode(), "tokenizer_config.json": config}, 600)
    assert isinstance(found, Tokenizer)
    return found


@pytest.fixture(scope="module")
def harmony(byte_level: tokenizers.Tokenizer) -> Tokenizer:
    return tokenizer_with(byte_level, HARMONY, (), HARMONY_CHAT)


def said(stream: AnswerStream, ids: Sequence[int]) -> tuple[str, str]:
    """The answer and its reasoning."""
    parts = list(to_pieces(ids, stream))
    assert all(part.text or part.mark for part in parts)
    answer, reasoning = ("".join(part.text for part in parts if part.reasoning is kind) for kind in (False, True))
    return answer, reasoning


def of_chat(tokenizer: Tokenizer, answer: str, prompt: Sequence[int] | None = None) -> tuple[str, str]:
    ids = tokenizer.encode_chat("x<think>") if prompt is None else prompt
    return said(tokenizer.answer_stream(ids, raw=False), tokenizer.encode(answer, special=False))


FINAL = "<|start|>assistant<|channel|>final<|message|>"


# As OpenAI describes the format; test_harmony_oracle.py has the whole ones from openai-harmony too.
@pytest.mark.parametrize(
    ("text", "answer", "reasoning", "tools"),
    [
        (f"<|channel|>analysis<|message|>Think.\n<|end|>{FINAL}Hi!<|return|>", "Hi!", "Think.\n", []),
        ("<|channel|>final<|message|> b\n", " b\n", "", []),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "{}", "", []),
        ("<|message|>Hello<|return|>", "Hello", "", []),
        ("<|channel|>analysis<|message|>cut", "", "cut", []),
        ("<|channel|>anal", "", "", []),
        (" to", " to", "", []),
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{1}<|call|>",
            *("", "call of functions.f: {1}", ["functions.f"]),
        ),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant to=functions.g<|channel|>commentary json<|message|>[]",
            *("", "a\ncall of functions.g: []", ["functions.g"]),
        ),
        (" to=f.h<|channel|>commentary<|message|>1<|call|>", "", "call of f.h: 1", ["f.h"]),
        (
            f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>{FINAL}c",
            *("c", "a\nb", []),
        ),
        (f"<|channel|>final<|message|>a<|end|>{FINAL}b<|return|>", "a\nb", "", []),
        # What leaves the format loses no text of a message.
        ("Hello there", "Hello there", "", []),
        ("Hello<|start|>assistant<|channel|>analysis<|message|>a", "Hello", "a", []),
        (f"<|channel|>analysis<|message|>a{FINAL}b<|return|>", "b", "a", []),
        ("<|channel|>analysis<|message|>a<|channel|>final<|message|>b<|return|>", "b", "a", []),
        (f"<|channel|>final<|message|>a<|return|><|start|>user<|message|>b<|end|>{FINAL}c", "a\nc", "b", []),
    ],
)
def test_channels_of_harmony(harmony: Tokenizer, text: str, answer: str, reasoning: str, tools: list[str]) -> None:
    ids = harmony.encode_chat("x")
    stream = harmony.answer_stream(ids, raw=False)
    assert said(stream, harmony.encode(text, special=False)) == (answer, reasoning)
    assert list(stream.tools) == tools
    whole = harmony.encode(text, special=False)
    assert said(harmony.answer_stream(ids, raw=True), whole) == (harmony.decode(whole), ""), "--raw: all as it is"


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=6)


@given(messages=st.lists(st.tuples(st.sampled_from(["analysis", "final"]), TEXT), max_size=4))
def test_harmony_streams_whatever_its_text_is_cut_into(harmony: Tokenizer, messages: list[tuple[str, str]]) -> None:
    """Each byte a token of its own, so that characters are cut too."""
    names = {name: harmony.encode(name, special=False) for name in (*HARMONY, "assistant", "analysis", "final")}
    ids: list[int] = []
    for channel, text in messages:
        spelled = [token_id for char in text for token_id in harmony.encode(char, special=False)]
        message = [*names["<|channel|>"], *names[channel], *names["<|message|>"], *spelled, *names["<|end|>"]]
        ids += [*(names["<|start|>"] + names["assistant"] if ids else []), *message]
    stream, shown = harmony.answer_stream(harmony.encode_chat("x"), raw=False), {False: "", True: ""}
    expected = {
        kind: "\n".join(text for channel, text in messages if (channel != "final") is kind and text)
        for kind in (False, True)
    }
    for token_id in ids:
        for part in stream.push(token_id):
            shown[part.reasoning] += part.text
        assert all(expected[kind].startswith(shown[kind]) for kind in shown)
    assert not stream.flush() and shown == expected


def test_where_the_prompt_ends_in_another_place(harmony: Tokenizer) -> None:
    def prompt(text: str) -> list[int]:
        return harmony.encode(text, special=False)

    asked = "<|start|>user<|message|>x<|end|>"
    assert of_chat(harmony, "Hi<|return|>", prompt(f"{asked}{FINAL}")) == ("Hi", "")
    assert of_chat(harmony, "Hm", prompt(f"{asked}<|start|>assistant<|channel|>analysis<|message|>")) == ("", "Hm")
    assert of_chat(harmony, "final<|message|>Hi", prompt(f"{asked}<|start|>assistant<|channel|>")) == ("Hi", "")
    assert of_chat(harmony, "Hi", prompt("x")) == ("Hi", "")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>\nHm, é\n</think>\n\nHi\n", "Hi\n", "Hm, é"),
        ("\n<think>a\n\nb </think>Hi", "Hi", "a\n\nb"),
        ("<think>\n\n</think>\n\n    x = 1", "    x = 1", ""),
        ("<think></think> Hi", "Hi", ""),
        ("<think>cut\n", "", "cut"),
        ("<think>a<|end|>b</think>c<|end|>d", "cd", "ab"),
        (" \n Hi", " \n Hi", ""),
        (" \n", " \n", ""),
    ],
)
def test_thoughts(byte_level: tokenizers.Tokenizer, special: bool, text: str, answer: str, reasoning: str) -> None:
    names = ["<|start|>", "<|end|>", *(THINK if special else ())]
    tokenizer = tokenizer_with(byte_level, names, () if special else THINK, THINK_CHAT)
    assert of_chat(tokenizer, text) == (answer, reasoning)
    if "<think>" in text:
        opened = tokenizer_with(byte_level, names, () if special else THINK, OPENED_CHAT)
        assert of_chat(opened, text.partition("<think>")[2]) == (answer, reasoning)
        assert of_chat(opened, text) == (answer, reasoning)


@pytest.mark.skipif(not templates(), reason="llama.cpp's templates are not there: jobs/test.sh")
def test_templates_that_open_the_reasoning_themselves(byte_level: tokenizers.Tokenizer) -> None:
    """Of all published templates that name the marks: what transformers renders ends in the first, or does not."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    found: dict[bool, int] = {False: 0, True: 0}
    for path in templates():
        source = path.read_text("utf-8")
        if not all(mark in source for mark in THINK):
            continue
        messages = [{"role": "user", "content": "x"}]
        named = {"bos_token": "<|start|>", "eos_token": "<|end|>"}
        try:
            (rendered,), _ = utils.render_jinja_template(
                [messages], chat_template=source, add_generation_prompt=True, **named
            )
        except Exception:  # a template may refuse a conversation, or want more than this
            continue
        opened = rendered.rstrip().endswith("<think>")
        found[opened] += 1
        tokenizer = tokenizer_with(byte_level, ["<|end|>", "<|start|>"], THINK, source)
        prompt = tokenizer.encode_chat("x")
        assert of_chat(tokenizer, "a</think>b", prompt) == (("b", "a") if opened else ("a</think>b", "")), path.stem
        if not opened:
            assert of_chat(tokenizer, "<think>a</think>b", prompt) == ("b", "a"), path.stem
    assert min(found.values()) > 3, found


def test_later_marks_are_text(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = tokenizer_with(byte_level, ["<|end|>"], THINK, "{{ messages[-1].content }}<|end|>")
    for text in ("Write <think> and </think>.", "</think>a"):
        assert of_chat(tokenizer, text) == (text, "")
    assert of_chat(tokenizer, "<think>a <think> b</think>c</think>") == ("c</think>", "a <think> b")
    # What a user wrote opens nothing, though this template has it become the token.
    bare = tokenizer_with(byte_level, ["<|end|>"], THINK, "{{ messages[-1].content }}")
    prompt = bare.encode_chat("x<think>")
    assert prompt[-1] == bare.encode("<think>", special=False)[0]
    assert of_chat(bare, "a", prompt) == ("a", "")


def test_nothing_changes_where_the_vocabulary_has_no_marks(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = tokenizer_with(byte_level, ["<|start|>", "<|end|>"], ["<think>"], THINK_CHAT)
    assert not tokenizer.has_reasoning
    for text in ("\n<think>a</think>\n\nb", "<|channel|>analysis<|message|>a"):
        assert of_chat(tokenizer, text) == (text, "")


def test_ends_of_an_answer_in_harmony(byte_level: tokenizers.Tokenizer, harmony: Tokenizer) -> None:
    ids = {name: harmony.encode(name, special=False)[0] for name in HARMONY}
    expected = {ids[name] for name in ("<|return|>", "<|endoftext|>", "<|call|>")}
    assert harmony.end_ids == expected
    closing = HARMONY_CHAT.replace("<|return|>", "<|end|>")
    assert tokenizer_with(byte_level, HARMONY, (), closing).end_ids == expected
    # A GGUF file names one or two; some name "<|end|>".
    keys = gguf_keys(byte_level, "gpt-4o")
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"][:500], *HARMONY]
    keys["tokenizer.ggml.token_type"] = [*[1] * 500, *[3] * len(HARMONY)]
    for more in ({"eos": 500}, {"eos": 500, "eot": 504}, {"eos": 504}):
        named = {f"tokenizer.ggml.{name}_token_id": token_id for name, token_id in more.items()}
        found = load_gguf(
            {**keys, "tokenizer.ggml.bos_token_id": 507, **named, "tokenizer.chat_template": HARMONY_CHAT}
        )
        assert found.end_ids == {500, 506, 507}
        assert of_chat(found, f"<|channel|>analysis<|message|>a<|end|>{FINAL}b") == ("b", "a")


def test_an_answer_may_spell_what_its_template_refuses(harmony: Tokenizer) -> None:
    """gpt-oss's template raises where an answer holds names of its tokens, which are text here."""
    spelled = "Write <|channel|>final<|message|> first."
    ids = harmony.encode_chat("And?", [("How?", spelled)])
    text = f"<|start|>user<|message|>How?<|end|>{FINAL}\0<|end|><|start|>user<|message|>And?<|end|><|start|>assistant"
    before, after = (harmony.encode(part, special=False) for part in text.split("\0"))
    assert ids[: len(before)] == before and ids[-len(after) :] == after
    answer = ids[len(before) : -len(after)]
    assert harmony.decode(answer) == spelled and not harmony.control_ids & set(answer)


# --- where it is printed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [True, False])
def test_reasoning_is_dim_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dim: bool
) -> None:
    monkeypatch.setattr(answers, "is_terminal", lambda number: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "" if dim else "1")
    for shown in (True, False):
        printer = answers.AnswerPrinter(reasoning=shown)
        for piece in (Piece("Hm", reasoning=True), Piece("?\n", reasoning=True), Piece("Hi"), Piece("!")):
            printer.print(piece)
        printer.end()
        styled = "\x1b[2mHm\x1b[22m\x1b[2m?\n\x1b[22m" if dim else "Hm?\n"
        assert tuple(capsys.readouterr()) == ("Hi!\n", f"reasoning:\n{styled}answer:\n" if shown else "")


# --- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaks_harmony(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with harmony's tokens in place of the last ones of its vocabulary."""
    folder = tmp_path_factory.mktemp("harmony") / "tiny"
    shutil.copytree(tiny, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    kept = 300 - len(HARMONY)
    content["model"]["vocab"] = {token: index for token, index in content["model"]["vocab"].items() if index < kept}
    content["model"]["merges"] = [m for m in content["model"]["merges"] if "".join(m) in content["model"]["vocab"]]
    content["added_tokens"] += [
        {**content["added_tokens"][0], "id": kept + number, "content": name} for number, name in enumerate(HARMONY)
    ]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": HARMONY_CHAT, "added_tokens_decoder": added(*enumerate(HARMONY, kept))}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_runs_tell_reasoning_from_answer(tpimpi: Callable[..., Result], speaks_harmony: Path, tmp_path: Path) -> None:
    """What the tiny model says is put into a session, as if a run had been broken off in it."""
    path, report = tmp_path / "s", tmp_path / "report.json"
    options = ("--model", str(speaks_harmony), "--format", "f32", "--session", str(path), "--report", str(report))
    assert tpimpi(*options, "--prompt", "the fox", "--max-tokens", "1", "--ignore-eos").code == 0
    assets = {name: (speaks_harmony / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    tokenizer: Any = load_tokenizer(assets, 300)
    begun = path.read_text().splitlines(keepends=True)[:2]

    def go_on(answer: str, *more: str) -> Result:
        tokens = tokenizer.encode(answer, special=False)
        path.write_text("".join([*begun, *(f'{{"token": {token_id}}}\n' for token_id in tokens)]))
        result = tpimpi(*options, *more, "--max-tokens", str(len(tokens)))
        assert result.code == 0, result.err
        return result

    spoken = f"<|channel|>analysis<|message|>fox?<|end|>{FINAL}dog"
    shown = go_on(spoken)
    assert shown.out == "dog\n"
    assert "\nreasoning:\nfox?\nanswer:\n" in f"\n{shown.err}" and "\x1b" not in shown.err
    line = json.loads(path.read_text().splitlines()[-1])
    assert line == {"end": "max_tokens", "text": "dog", "reasoning": "fox?"}
    answer = json.loads(report.read_text())
    for where in (answer, answer["answers"][0]):
        assert (where["text"], where["reasoning"]) == ("dog", "fox?")
    kept = path.read_bytes()
    for more in (("--reasoning", "hide"), ("--quiet",)):
        hidden = go_on(spoken, *more)
        assert hidden.out == "dog\n" and "fox?" not in hidden.err and path.read_bytes() == kept
    assert go_on(spoken, "--quiet", "--reasoning", "show").err == "reasoning:\nfox?\nanswer:\n"
    # The next turn has the answer, without its analysis.
    assert tpimpi(*options, "--prompt", "the dog", "--max-tokens", "1", "--ignore-eos").code == 0
    session = Session(str(path))
    session.close()
    asked = "<|start|>user<|message|>{}<|end|>".format
    text = f"{asked('the fox')}{FINAL}dog<|end|>{asked('the dog')}<|start|>assistant"
    assert session.turns[1].ids == tokenizer.encode(text, special=False)

    cut = go_on("<|channel|>analysis<|message|>fox")
    assert cut.out == "\n" and re.search(r"was cut at --max-tokens \d+, in its reasoning; give more", cut.err)
    called = go_on(" to=jump<|channel|>commentary<|message|>the fox<|call|>", "--reasoning", "hide")
    assert called.out == "\n" and "the answer calls jump; tpimpi calls no tools" in called.err
