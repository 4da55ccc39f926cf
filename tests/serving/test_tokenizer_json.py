"""tokenizer.json and the chat template."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from tests.support.tokenizer_cases import (
    CHATML,
    CORPUS,
    TEXTS,
    added,
    assets_of,
    chat,
    directory,
    gguf_keys,
    load_gguf,
    spm_keys,
    streamed,
)
from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

# --- tokenizer.json ----------------------------------------------------------------------------------------------------


def test_tokenizer_json(tokenizer_json: bytes, byte_level: tokenizers.Tokenizer) -> None:
    files = {
        "tokenizer": {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|im_end|>", "chat_template": CHATML},
        "config": {"eos_token_id": [7, 8]},
        "generation": {"eos_token_id": 9},
    }
    tokenizer = load_tokenizer({**assets_of(tokenizer_json, **files), "tokenizer.model": b"not looked at"}, 600)
    count = byte_level.get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.end_ids) == (count, {count + 2, 7, 8, 9})
    for text in CORPUS:
        ids = byte_level.encode(text).ids
        assert tokenizer.encode(text) == [count, *ids]
        assert tokenizer.decode([count, *ids, count + 2]) == text
        assert "".join(streamed(tokenizer, ids)) == text
    assert tokenizer.decode([count + 3]) == "<think>"
    user = byte_level.encode("user\nhi").ids
    assert tokenizer.encode_chat("hi")[: len(user) + 3] == [count, count + 1, *user, count + 2]


def test_tokenizer_json_flags_override_its_post_processor(tokenizer_json: bytes) -> None:
    named = {"bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    bare = load_tokenizer(assets_of(tokenizer_json), 600).encode("hi", special=False)
    for bos, eos in [(None, None), (False, None), (True, True), (False, False), (None, True)]:
        config = {**named, "add_bos_token": bos, "add_eos_token": eos}
        tokenizer = load_tokenizer(assets_of(tokenizer_json, tokenizer=config), 600)
        assert tokenizer.encode("hi") == [tokenizer.bos_id] * (bos is not False) + bare + [502] * (eos is True)


def test_special_tokens_map_and_more_special_tokens(tokenizer_json: bytes) -> None:
    special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<think>", "<absent>"]}
    tokenizer = load_tokenizer(assets_of(tokenizer_json, special=special), 600)
    assert tokenizer.end_ids == {502}
    assert tokenizer.decode(tokenizer.encode("<think>a")) == "a"


def test_added_tokens_decoder_completes_tokenizer_json(tokenizer_json: bytes) -> None:
    config = {"added_tokens_decoder": added((504, "<new>"), (505, "<newer>"))}
    tokenizer = load_tokenizer(assets_of(tokenizer_json, tokenizer=config), 600)
    assert tokenizer.encode("<new><newer>", special=False) == [504, 505]
    assert tokenizer.decode([504, 505]) == ""
    for wrong in (added((3, "<|im_end|>")), added((900, "<gap>"))):
        with pytest.raises(ModelError, match="download the model again"):
            load_tokenizer(assets_of(tokenizer_json, tokenizer={"added_tokens_decoder": wrong}), 600)


def test_tokenizer_json_of_sentencepiece_kind(pieces: bytes, processor: Any, tmp_path: Path) -> None:
    """Llama 2's kind of tokenizer.json: bytes as <0x0A>, spaces as ▁."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(pieces)
    oracle = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer({"tokenizer.json": oracle.backend_tokenizer.to_str().encode()}, 480)
    for text in TEXTS:
        ids = processor.encode(text)
        if not text.startswith(" "):
            assert tokenizer.encode(text, special=False) == oracle(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"\xff\xfe", b'{"model": 5}', b"[" * 100_000, b'{"version":"1.0","added_tokens":[]}']
)
def test_tokenizer_json_broken(data: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: .*; download or convert the model again"):
        load_tokenizer({"tokenizer.json": data}, 100)


def test_tokenizer_json_cut_short(tokenizer_json: bytes) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer({"tokenizer.json": tokenizer_json[:-100]}, 600)


def test_tokenizer_json_whose_parts_contradict(tokenizer_json: bytes) -> None:
    content = json.loads(tokenizer_json)
    content["post_processor"]["single"][0]["SpecialToken"]["id"] = "<absent>"
    with pytest.raises(ModelError, match=r"tokenizer.json"):
        load_tokenizer({"tokenizer.json": json.dumps(content).encode()}, 600)


def test_tokenizer_json_with_an_unknown_decoder(tokenizer_json: bytes) -> None:
    content = json.loads(tokenizer_json)
    for decoder, says in [({"type": "WordPiece", "prefix": "##", "cleanup": True}, "WordPiece"), (None, "no decoder")]:
        with pytest.raises(ModelError, match=says):
            load_tokenizer({"tokenizer.json": json.dumps({**content, "decoder": decoder}).encode()}, 600)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"bos_token": 5}'),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}'),
        ("tokenizer_config.json", b'{"add_bos_token": "yes"}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"9": {"content": ""}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"-9": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("config.json", b'{"eos_token_id": "2"}'),
        ("generation_config.json", b'{"eos_token_id": [1, null]}'),
        ("special_tokens_map.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_broken_configs_are_named(tokenizer_json: bytes, name: str, content: bytes) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer({"tokenizer.json": tokenizer_json, name: content}, 600)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_no_tokenizer() -> None:
    for assets in ({}, {"config.json": b"{}"}):
        with pytest.raises(ModelError, match=r"no tokenizer beside the model: .*put tokenizer.json or tokenizer.model"):
            load_tokenizer(assets, 100)


def test_ids_beyond_the_model(tokenizer_json: bytes) -> None:
    tokenizer = load_tokenizer(assets_of(tokenizer_json, config={"eos_token_id": [2, 700]}), 501)
    assert tokenizer.end_ids == {2}
    assert tokenizer.encode("fine")
    # What has no row is text, to a chat and without one.
    ids = tokenizer.encode("not <|im_end|>", special=False)
    assert max(ids) < 500 and tokenizer.decode(ids) == "not <|im_end|>"
    with pytest.raises(ModelError, match="gives ids up to 503, the model's vocabulary has 490; put the tokenizer that"):
        load_tokenizer(assets_of(tokenizer_json), 490)  # 500 tokens of text
    with pytest.raises(ModelError, match="gives ids up to 503, the model's vocabulary has 501"):
        load_tokenizer(assets_of(tokenizer_json, tokenizer={"chat_template": CHATML}), 501)  # which it writes


@pytest.mark.parametrize("prompt", ["\udcff", "a\ud800b"])
def test_undecodable_prompts(tokenizer_json: bytes, prompt: str) -> None:
    tokenizer = load_tokenizer(assets_of(tokenizer_json, tokenizer={"chat_template": CHATML}), 600)
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(InputError, match="not UTF-8"):
            encode(prompt)


# --- the chat template -------------------------------------------------------------------------------------------------


def said(tokenizer: Tokenizer, prompt: str = "hi") -> str:
    return tokenizer.decode(tokenizer.encode_chat(prompt))


def test_template_forms(tokenizer_json: bytes) -> None:
    assert said(chat(tokenizer_json, "A {{ messages[0]['content'] }}")) == "A hi"
    listed = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    assert said(chat(tokenizer_json, listed)) == "D"
    assert said(chat(tokenizer_json, {"rag": "R", "default": "D"})) == "D"
    assert said(chat(tokenizer_json, "A", **{"chat_template.jinja": "ü".encode()})) == "ü"
    without = chat(tokenizer_json, listed[:1])
    assert not without.has_chat_template
    with pytest.raises(
        ModelError, match=r"no chat template; give --raw to .*, or a template with --chat-template FILE"
    ):
        without.encode_chat("hi")


@pytest.mark.parametrize("empty", ["", " ", "\n\t \n"])
def test_an_empty_template_is_none(tokenizer_json: bytes, pieces: bytes, empty: str) -> None:
    in_gguf = load_gguf({**spm_keys(pieces), "tokenizer.chat_template": empty})
    in_jinja = chat(tokenizer_json, "A", **{"chat_template.jinja": empty.encode()})  # it counts, as in transformers
    listed = chat(tokenizer_json, [{"name": "default", "template": empty}])
    for tokenizer in (chat(tokenizer_json, empty), in_jinja, listed, in_gguf):
        assert not tokenizer.has_chat_template
        with pytest.raises(
            ModelError, match=r"no chat template; give --raw to .*, or a template with --chat-template FILE"
        ):
            tokenizer.encode_chat("hi")


def test_one_bos_where_the_tokenizer_asks_for_one(tokenizer_json: bytes) -> None:
    bare = chat(tokenizer_json, "x").encode("x", special=False)
    assert chat(tokenizer_json, "{{ bos_token }}x").encode_chat("") == [500, *bare]
    assert chat(tokenizer_json, "x").encode_chat("") == [500, *bare]
    assert chat(tokenizer_json, "x").encode("x") == chat(tokenizer_json, "x").encode("<|begin|>x") == [500, *bare]
    config = {"chat_template": "x", "bos_token": "<|begin|>", "add_bos_token": False}
    unasked = load_tokenizer(assets_of(tokenizer_json, tokenizer=config), 600)
    assert unasked.encode_chat("") == unasked.encode("x") == bare
    assert unasked.encode("<|begin|><|begin|>x") == [500, 500, *bare]


def test_template_environment(tokenizer_json: bytes) -> None:
    template = """
    {%- for word in ["a", "b", "c"] %}
      {%- if word == "b" %}{% continue %}{% endif %}
      {{- word }}
    {%- endfor %}
    {%- generation %}G{% endgeneration %}
    {{- {"k": "<é>"} | tojson }}{{ tools is none }}{{ add_generation_prompt }}{{ enable_thinking is defined }}
    {{- strftime_now("%Y") | length }}
    {% if true %}
    {# lines of tags alone leave nothing #}
    {% endif %}"""
    assert said(chat(tokenizer_json, template)) == 'acG{"k": "<é>"}TrueTrueFalse4\n'


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only with tools') }}",
        "{% if %}",
        "{{ messages.nothing.here }}",
        "{{ 1 / 0 }}",
        "{{ messages[0]['content'] + 5 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['__builtins__'] }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{% set _ = messages.append(1) %}",
        "{% for _ in range(10 ** 9) %}{% endfor %}",
        "{% include 'other' %}",
        "{{ '\\ud800' }}",
    ],
)
def test_templates_that_fail_or_attack(tokenizer_json: bytes, template: str) -> None:
    with pytest.raises(ModelError, match="the model's chat template") as caught:
        chat(tokenizer_json, template).encode_chat("hi")
    assert "\n" not in str(caught.value) and "--raw" in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("tokenizers", "pip install tokenizers"),
        ("sentencepiece", "pip install sentencepiece protobuf"),
        ("google.protobuf", "pip install sentencepiece protobuf"),
        ("jinja2", "pip install jinja2"),
    ],
)
def test_packages_that_are_not_installed_are_named(
    tokenizer_json: bytes,
    pieces: bytes,
    byte_level: tokenizers.Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    missing: str,
    says: str,
) -> None:
    chatty, keys = chat(tokenizer_json, "x"), spm_keys(pieces)
    loads: list[Any] = {
        "tokenizers": [
            lambda: load_tokenizer({"tokenizer.json": tokenizer_json}, 600),
            lambda: load_gguf(gguf_keys(byte_level, "gpt-2")),
        ],
        "jinja2": [lambda: chatty.encode_chat("hi")],
    }.get(missing, [lambda: load_tokenizer(directory(pieces), 600), lambda: load_gguf(keys)])
    for name in list(sys.modules):
        if name.split(".")[0] in (missing, "sentencepiece") or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    for load in loads:
        with pytest.raises(ModelError, match=f"; {says}") as caught:
            load()
        assert "\n" not in str(caught.value) and missing in str(caught.value)


def test_importing_is_light() -> None:
    """Every rank may import the module; only loading a tokenizer needs the libraries."""
    heavy = ["torch", "transformers", "tokenizers", "sentencepiece", "jinja2", "numpy"]
    code = f"import sys, tpimpi.serving.text.load; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
