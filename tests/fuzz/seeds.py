"""Tiny models, tokenizers and slices that are right, made anew: what inputs are changed from."""

from __future__ import annotations

import functools
import io
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.fuzz.target import folder
from tests.support.synth_cases import made, write_config
from tests.support.tokenizer_cases import CHATML, TEXTS, spm_keys
from tpimpi.weights.make import slice_model
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources.export import write_gguf, write_hf
from tpimpi.weights.sources.synthetic import SyntheticSource, quantize_exactly

_TINY = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES = {**_TINY, "num_key_value_heads": 1}
KINDS = ("llama", "llama-3.1", "llama-bias", "qwen2")


def _silent(done: int, whole: int) -> None:
    """Progress that nobody is told of."""


def _source(kind: str, fmt: str = "q4_0") -> SyntheticSource:
    return made(write_config(folder() / "seeds" / f"{kind}-{fmt}", kind, **_SIZES), fmt)


@functools.cache
def gguf_file(kind: str = "llama") -> bytes:
    path = folder() / "seeds" / f"{kind}.gguf"
    with closing(_source(kind)) as source:
        write_gguf(source, path, _silent)
    return path.read_bytes()


@functools.cache
def hf_folder(kind: str = "llama") -> Path:
    """With config.json and model.safetensors."""
    path = folder() / "seeds" / f"{kind}-hf"
    with closing(_source(kind, "bf16")) as source:
        write_hf(source, path, _silent)
    return path


@functools.cache
def slice_file() -> bytes:
    """Rank 0's of one."""
    path = folder() / "seeds" / "slices"
    with closing(_source("llama")) as source:
        plan = make_partition(source.config, [1.0])
        slice_model(source, plan, source.formats, path, quantizer=quantize_exactly)
    return (path / slice_name(0, 1)).read_bytes()


@functools.cache
def tokenizer_json() -> bytes:
    """A byte-level BPE with control tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("~", "-")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<|begin|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
    )
    return tokenizer.to_str().encode()


@functools.cache
def sentencepiece_model(kind: str = "bpe") -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in TEXTS for line in text.splitlines() if "\x00" not in line] * 3),
        model_writer=model,
        model_type=kind,
        vocab_size=380,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
        minloglevel=2,
    )
    return model.getvalue()


def gguf_vocabulary(model: str) -> bytes:
    """gguf.json of a vocabulary, "gpt2" or "llama"."""
    keys: dict[str, Any]
    if model == "llama":
        keys = spm_keys(sentencepiece_model())
    else:
        bpe = json.loads(tokenizer_json())["model"]
        tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
        keys = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "qwen2",
            "tokenizer.ggml.tokens": [*tokens, "<|im_start|>", "<|im_end|>"],
            "tokenizer.ggml.token_type": [1] * len(tokens) + [3, 3],
            "tokenizer.ggml.merges": [" ".join(merge) for merge in bpe["merges"]],
            "tokenizer.ggml.bos_token_id": len(tokens),
            "tokenizer.ggml.eos_token_id": len(tokens) + 1,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": CHATML,
        }
    return json.dumps(keys).encode()


TOKENIZER_CONFIG = json.dumps(
    {
        "bos_token": "<|begin|>",
        "eos_token": {"content": "<|im_end|>"},
        "additional_special_tokens": ["<|im_start|>"],
        "added_tokens_decoder": {"281": {"content": "<|im_start|>", "special": True, "lstrip": False}},
        "add_bos_token": True,
        "legacy": False,
        "chat_template": CHATML,
    }
).encode()
