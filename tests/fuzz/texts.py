"""What a model brings for text: tokenizer.json and what stands beside it, SentencePiece models, vocabularies of GGUF files,
chat templates."""

from __future__ import annotations

import atexit
import functools
import json

from tests.fuzz import seeds
from tests.fuzz.mutate import files_in, joined, mutate_bytes, mutate_files, mutate_json
from tests.fuzz.target import Target
from tests.support.tokenizer_cases import CHATML
from tpimpi.errors import ModelError
from tpimpi.serving.text.added_tokens import AddedToken
from tpimpi.serving.text.chat_template import ChatTemplate
from tpimpi.serving.text.control_tokens import ControlTokens
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.tokenizer_trial import TokenizerTrial

_VOCAB = 600
_TEXT = "Hello, <|im_end|> 123\n\tworld\u00e9 \u4f60 \U0001f642 " * 3
_MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": _TEXT},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "<|im_start|>c"},
]
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


def _use(assets: dict[str, bytes]) -> None:
    """Load a tokenizer, and do what a run does with it."""
    tokenizer = load_tokenizer(assets, _VOCAB)
    if isinstance(tokenizer, TokenIds):
        return
    ids = tokenizer.encode(_TEXT)
    assert all(0 <= token < _VOCAB for token in ids)
    tokenizer.decode(ids)
    stream = tokenizer.answer_stream(ids, raw=True)
    for token in range(0, tokenizer.sampled_ids, 7):
        tokenizer.piece(token)
        stream.push(token)
    stream.flush()
    if tokenizer.has_chat_template:
        assert all(0 <= token < _VOCAB for token in tokenizer.encode_messages(_MESSAGES))


@functools.cache
def _trial() -> TokenizerTrial:
    trial = TokenizerTrial()
    atexit.register(trial.close)
    return trial


def _tokenizer_json(data: bytes) -> None:
    """As a run does: what ends a process ends the one in which it is tried."""
    files = files_in(data, len(_FILES))
    assets = {name: content for name, content in zip(_FILES, files, strict=True) if content}
    if problem := _trial().problem(assets, _VOCAB):
        raise ModelError(problem)
    _use(assets)


def _tokenizer_json_seeds() -> list[bytes]:
    special = json.dumps({"pad_token": "<|im_end|>", "additional_special_tokens": ["<|begin|>"]}).encode()
    ends = json.dumps({"eos_token_id": [282]}).encode()
    made = seeds.tokenizer_json()
    found = [joined([made, seeds.TOKENIZER_CONFIG, special, ends, b""])]
    values = json.loads(made)
    for pre in (
        {"type": "Split", "pattern": {"Regex": r"\p{L}+|\d| ?[^\s]+"}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True},
        None,
    ):
        found.append(joined([json.dumps({**values, "pre_tokenizer": pre}).encode(), seeds.TOKENIZER_CONFIG]))
    unigram = {
        "type": "Unigram",
        "unk_id": 0,
        "vocab": [["<unk>", 0.0], ["a", -1.0], ["▁", -2.0]],
        "byte_fallback": False,
    }
    decoder = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    plain = {**values, "pre_tokenizer": None, "normalizer": None, "post_processor": None, "added_tokens": []}
    found.append(joined([json.dumps({**plain, "model": unigram, "decoder": decoder}).encode(), b"{}"]))
    return found


def _sentencepiece(data: bytes) -> None:
    model, config = files_in(data, 2)
    _use({"tokenizer.model": model, **({"tokenizer_config.json": config} if config else {})})


def _sentencepiece_seeds() -> list[bytes]:
    config = json.dumps({"add_bos_token": True, "chat_template": CHATML, "legacy": False}).encode()
    return [joined([seeds.sentencepiece_model(kind), config]) for kind in ("bpe", "unigram")]


def _gguf_vocabulary(data: bytes) -> None:
    _use({"gguf.json": data})


def _gguf_vocabulary_seeds() -> list[bytes]:
    return [seeds.gguf_vocabulary(model) for model in ("gpt2", "llama")]


_CONTROL = ControlTokens(
    [AddedToken(text, 290 + place, special=True) for place, text in enumerate(("<|im_start|>", "<|im_end|>"))]
)
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def _template(data: bytes) -> None:
    template = ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<s>", "eos_token": "</s>"})
    template.literals()
    template.closing(_CONTROL)
    template.parts(_MESSAGES, _CONTROL, tools=[_TOOL], options={"enable_thinking": True})


def _template_seeds() -> list[bytes]:
    texts = [
        CHATML,
        "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(a='x') %}{% for m in messages %}{% set ns.a = ns.a ~ ns.a * 3 %}{% endfor %}{{ ns.a }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
        "{{ '%5d' % 3 }}{{ '{:>7}'.format('a') }}{{ 'a'.ljust(9) }}{{ 'a' | center(9) }}{{ [1, 2] | join('a' * 4) }}",
        "{{ messages | tojson(indent=2) }}{{ strftime_now('%Y') }}{{ messages[-1].content.split('a') | list }}",
        "{% generation %}{{ raise_exception('no') }}{% endgeneration %}{% if tools is defined %}{{ tools }}{% endif %}",
        "{%- for message in messages recursive %}{{ loop.index0 }}{{ loop.previtem }}{% if false %}{{ loop(messages) }}"
        "{% endif %}{%- break -%}{% endfor %}",
    ]
    return [text.encode() for text in texts]


TARGETS = [
    Target("tokenizer-json", _tokenizer_json, _tokenizer_json_seeds, mutate_files(*[mutate_json] * len(_FILES))),
    Target("sentencepiece", _sentencepiece, _sentencepiece_seeds, mutate_files(mutate_bytes, mutate_json)),
    Target("gguf-vocabulary", _gguf_vocabulary, _gguf_vocabulary_seeds, mutate_json),
    Target("chat-template", _template, _template_seeds),
]
