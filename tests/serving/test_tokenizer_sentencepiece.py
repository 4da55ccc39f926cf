"""tokenizer.model, against sentencepiece."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from tests.support.tokenizer_cases import (
    CHATML,
    CORPUS,
    TEXTS,
    added,
    directory,
    load_gguf,
    spm_keys,
    streamed,
)
from tpimpi.errors import ModelError
from tpimpi.serving.text.load import load_tokenizer


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
    assert tokenizer.encode_chat("Hello, world!") == [1, *expected]  # the BOS that the config asks for


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
    assert chat[:2] == [1, 480] and chat[2 : chat.index(481)] == processor.encode("user\nHello")


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
