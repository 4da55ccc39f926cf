"""gpt-oss's vocabulary and template, against transformers and OpenAI's own package openai-harmony."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.real_tokenizers import templates, tokenizer_folders
from tests.support.tokenizer_cases import CORPUS, load_gguf
from tpimpi.serving.generate import to_pieces
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

GENERATION = {
    "bos_token_id": 199998,
    "do_sample": True,
    "eos_token_id": [200002, 199999, 200012],
    "pad_token_id": 199999,
}
ENDS = {200002, 199999, 200012}

pytestmark = pytest.mark.slow  # the vocabulary takes seconds to load


@pytest.fixture(scope="module")
def folder() -> Path:
    found = [folder for folder in tokenizer_folders() if folder.name == "gptoss"]
    if not found or not templates():
        pytest.skip("the tokenizer gptoss or llama.cpp's templates are not there: set up with jobs/test.sh")
    return found[0]


@pytest.fixture(scope="module")
def template() -> str:
    return next(path.read_text("utf-8") for path in templates() if path.stem == "openai-gpt-oss-120b")


@pytest.fixture(scope="module")
def tokenizer(folder: Path, template: str) -> Tokenizer:
    assets = {path.name: path.read_bytes() for path in folder.iterdir()}
    assets |= {"generation_config.json": json.dumps(GENERATION).encode(), "chat_template.jinja": template.encode()}
    found = load_tokenizer(assets, 201088)
    assert isinstance(found, Tokenizer)
    return found


@pytest.fixture(scope="module")
def oracle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """OpenAI's encoding, with the ranks of tokenizer.json, which have the SHA-256 that the package asks for."""
    openai_harmony = pytest.importorskip("openai_harmony")
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable} | {chr(256 + rank): byte for rank, byte in enumerate(others)}
    ranks = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    lines = [
        base64.b64encode(bytes(alphabet[char] for char in token)) + b" %d\n" % rank
        for token, rank in sorted(ranks.items(), key=lambda item: item[1])
    ]
    encodings = tmp_path_factory.mktemp("encodings")
    (encodings / "o200k_base.tiktoken").write_bytes(b"".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(encodings))
        yield openai_harmony.load_harmony_encoding("HarmonyGptOss")


def said(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, str]:
    parts = list(to_pieces(ids, tokenizer.answer_stream(tokenizer.encode_chat("x"), raw=False)))
    answer, reasoning = ("".join(part.text for part in parts if part.reasoning is kind) for kind in (False, True))
    return answer, reasoning


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>Think, é 🙂<|end|><|start|>assistant<|channel|>final<|message|> Hi 👍🏽\n<|return|>",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>c<|return|>",
        '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>',
        ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "<|channel|>analysis to=browser.search code<|message|>{}<|call|>",
        "<|message|>Hello<|return|>",
        "<|channel|>final <|message|> b <|end|>",
        "<|channel|>analysis<|message|>cut in the mid",
    ],
)
def test_messages_are_those_of_openai_harmony(tokenizer: Tokenizer, oracle: Any, text: str) -> None:
    ids = oracle.encode(text, allowed_special="all")
    assert tokenizer.encode(text, special=False) == ids
    expected: dict[bool, list[str]] = {False: [], True: []}
    tools = []
    import openai_harmony

    parser = openai_harmony.StreamableParser(oracle, openai_harmony.Role.ASSISTANT)
    for token_id in ids:
        parser.process(token_id)
    parser.process_eos()
    for message in parser.messages:
        content = "".join(part.text for part in message.content)
        reasoning = message.channel not in (None, "final")
        if message.recipient is not None:
            tools.append(message.recipient)
            content = f"call of {message.recipient}: {content}"
        expected[reasoning].append(content)
    stream = tokenizer.answer_stream(tokenizer.encode_chat("x"), raw=False)
    parts = list(to_pieces(ids, stream))
    for kind, contents in expected.items():
        assert "".join(part.text for part in parts if part.reasoning is kind) == "\n".join(contents)
    assert list(stream.tools) == tools


def test_a_conversation_is_rendered_as_openai_harmony_renders_it(tokenizer: Tokenizer, oracle: Any) -> None:
    """The analysis of a former turn is dropped; names of control tokens in what was said are text in both."""
    from openai_harmony import Author, Conversation, Message, Role, SystemContent

    prompt = "And <|end|> what?"
    ids = tokenizer.encode_chat(prompt, [("Hi <|start|>!", "I <|return|> am.")])
    date = tokenizer.decode(ids).partition("Current date: ")[2][:10]
    assistant = Author.new(Role.ASSISTANT, "")
    assistant.name = None
    conversation = Conversation.from_messages(
        [
            Message.from_role_and_content(Role.SYSTEM, SystemContent.new().with_conversation_start_date(date)),
            Message.from_role_and_content(Role.USER, "Hi <|start|>!"),
            Message.from_author_and_content(assistant, "Hm.").with_channel("analysis"),
            Message.from_author_and_content(assistant, "I <|return|> am.").with_channel("final"),
            Message.from_role_and_content(Role.USER, prompt),
        ]
    )
    assert ids == oracle.render_conversation_for_completion(conversation, Role.ASSISTANT)


def test_answers_end_where_openai_harmony_ends_them(tokenizer: Tokenizer, oracle: Any) -> None:
    assert tokenizer.end_ids == ENDS == {*oracle.stop_tokens_for_assistant_actions(), 199999}


def test_a_gguf_file_of_it_gives_the_same_ids(tokenizer: Tokenizer, folder: Path, template: str) -> None:
    """As llama.cpp's converter writes it: ids up to the model's 201088 rows, "gpt-4o" for what cuts a text."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokens = {index: token for token, index in content["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in content["added_tokens"]}
    rows = range(201088)
    keys = {
        "model": "gpt2",
        "pre": "gpt-4o",
        "tokens": [special.get(row) or tokens.get(row) or f"[PAD{row}]" for row in rows],
        "token_type": [3 if row in special else 1 if row in tokens else 5 for row in rows],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        "bos_token_id": 199998,
        "eos_token_id": 200002,
        "padding_token_id": 199999,
    }
    named = {f"tokenizer.ggml.{name}": value for name, value in keys.items()}
    found = load_gguf({**named, "tokenizer.chat_template": template}, 201088)
    assert found.end_ids == ENDS
    assert found.sampled_ids == 200019
    for text in CORPUS:
        assert found.encode(text, special=False) == tokenizer.encode(text, special=False), text
        assert found.encode_chat(text, [("Hi", text)]) == tokenizer.encode_chat(text, [("Hi", text)])
    assert said(found, found.encode("<|channel|>analysis<|message|>a<|end|>", special=False)) == ("", "a")
