"""What the tests of this room share."""

from __future__ import annotations

import io
from typing import Any

import pytest
import tokenizers

from tests.support.tokenizer_cases import (
    CORPUS,
    TEXTS,
)


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
