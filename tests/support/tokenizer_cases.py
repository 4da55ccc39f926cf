"""What tests of tokenizer share."""

from __future__ import annotations

import json
import re
from typing import Any

import tokenizers

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


# Texts in templates that look like control tokens.
MARKER = re.compile(r"<\|[\w ▁]+\|>|</?s>|\[/?\w+\]|</?\w+>|<｜[\w▁]+｜>")  # noqa: RUF001


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = tokenizer.stream()
    return [*map(stream.push, ids), stream.flush()]


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


def added(*tokens: tuple[int, str], **flags: bool) -> dict[str, Any]:
    return {str(index): {"content": content, "special": True, **flags} for index, content in tokens}


def directory(pieces: bytes, **config: Any) -> dict[str, bytes]:
    return {"tokenizer.model": pieces, "tokenizer_config.json": json.dumps(config).encode()}


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


def assets_of(tokenizer_json: bytes, **files: Any) -> dict[str, bytes]:
    names = {"config": "config.json", "generation": "generation_config.json"}
    names |= {"tokenizer": "tokenizer_config.json", "special": "special_tokens_map.json"}
    return {"tokenizer.json": tokenizer_json} | {names[key]: json.dumps(value).encode() for key, value in files.items()}


def chat(tokenizer_json: bytes, template: Any, **files: bytes) -> Tokenizer:
    config = {"chat_template": template, "bos_token": "<|begin|>", "eos_token": "<|im_end|>"}
    return load_tokenizer({**assets_of(tokenizer_json, tokenizer=config), **files}, 600)
