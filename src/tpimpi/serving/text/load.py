"""Make a tokenizer of what a model brings: a dict of assets, file name to content.

A source hands them out, and rank 0's slice file keeps them:

- a Hugging Face directory: `tokenizer.json` (run by `tokenizers`) or else `tokenizer.model` (run by `sentencepiece`),
  and what stands beside it: `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
  `config.json`, `chat_template.jinja` and the other files of templates (see template_files.py);
- a GGUF file: `gguf.json` alone (see gguf_vocabulary.py).
"""

from __future__ import annotations

import json
from typing import Any

from tpimpi.errors import ModelError
from tpimpi.serving.text.added_tokens import AddedToken
from tpimpi.serving.text.checks import is_unicode
from tpimpi.serving.text.gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufVocabulary,
    build_byte_level,
    build_sentencepiece,
    read_gguf_vocabulary,
)
from tpimpi.serving.text.sentencepiece_vocabulary import Prefix, SentencePieceVocabulary
from tpimpi.serving.text.template_files import chat_template_of_directory
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.serving.text.vocabularies import TokenizersVocabulary, Vocabulary, parse_tokenizer_json

# The special tokens that tokenizer_config.json and chat templates name, beside those of a model's own.
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def tokenizer_of_slices(assets: dict[str, bytes], vocab: int, chat_template: str | None = None) -> Tokenizer | TokenIds:
    """The tokenizer that slices carry; TokenIds where they carry none, as those of `synth`. Otherwise as load_tokenizer."""
    return load_tokenizer(assets, vocab, chat_template) if assets else TokenIds(vocab)


def load_tokenizer(assets: dict[str, bytes], vocab: int, chat_template: str | None = None) -> Tokenizer | TokenIds:
    """The tokenizer in `assets` (file name → content), for a model with `vocab` rows in its embedding table; TokenIds for a
    GGUF file that says that it has none, as those of `synth`.

    A `chat_template` takes the place of the model's own. Raises ModelError where there is no tokenizer, or it is broken, or
    of a kind that is not known here.
    """
    if "gguf.json" in assets:
        gguf = read_gguf_vocabulary(assets["gguf.json"])
        return TokenIds(vocab, gguf=True) if gguf is None else _load_gguf(gguf, vocab, chat_template)
    if "tokenizer.json" not in assets and "tokenizer.model" not in assets:
        found = f"found only {', '.join(sorted(assets))}" if assets else "found no file of one"
        raise ModelError(f"no tokenizer beside the model: {found}; put tokenizer.json or tokenizer.model there")
    return _load_directory(assets, vocab, chat_template)


# A GGUF file


def _load_gguf(gguf: GgufVocabulary, vocab: int, chat_template: str | None) -> Tokenizer:
    vocabulary: Vocabulary
    if gguf.model == "gpt2":
        vocabulary = TokenizersVocabulary(build_byte_level(gguf))
    else:
        # llama.cpp: every stretch of text between special tokens gets the prefix space.
        pieces = SentencePieceVocabulary(build_sentencepiece(gguf), "the vocabulary of the GGUF file", "every")
        pieces.add(
            AddedToken(token, index, special=kind != USER_DEFINED, rstrip=token in gguf.swallowing)
            for index, (token, kind) in enumerate(zip(gguf.tokens, gguf.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        )
        vocabulary = pieces
    used = next((count for count in range(len(gguf.types), 0, -1) if gguf.types[count - 1] != UNUSED), 0)
    return Tokenizer(
        vocabulary,
        vocab,
        prefix=[gguf.bos_id] if gguf.add_bos and gguf.bos_id is not None else [],
        suffix=[gguf.eos_id] if gguf.add_eos and gguf.eos_id is not None else [],
        bos_id=gguf.bos_id,
        end_ids=gguf.end_ids,
        chat_template=gguf.chat_template if chat_template is None else chat_template,
        named={name: gguf.tokens[index] for name, index in gguf.named_ids.items()},
        used_ids=used,
    )


# A Hugging Face directory


def _load_directory(assets: dict[str, bytes], vocab: int, chat_template: str | None) -> Tokenizer:
    config = _read_json(assets, "tokenizer_config.json")
    special_map = _read_json(assets, "special_tokens_map.json")
    named = _named(config, special_map)
    add_bos, add_eos = _flag(config, "add_bos_token"), _flag(config, "add_eos_token")

    vocabulary: Vocabulary
    if "tokenizer.json" in assets:
        fast = TokenizersVocabulary(parse_tokenizer_json(assets["tokenizer.json"]))
        fast.add(_added_tokens(config))
        fast.mark_special([*named.values(), *_more_special(config), *_more_special(special_map)])
        prefix, suffix = fast.affixes()
        vocabulary = fast
    else:
        # Where the config does not say: legacy is false as in transformers 5, and BOS is added as Llama was trained.
        spaced: Prefix = "every" if _flag(config, "legacy") else "first"
        if _flag(config, "add_prefix_space") is False:
            spaced = "never"
        pieces = SentencePieceVocabulary(assets["tokenizer.model"], "tokenizer.model", spaced)
        pieces.add(_added_tokens(config))
        pieces.mark_special([*named.values(), *_more_special(config), *_more_special(special_map)])
        named = {**pieces.named(), **named}
        add_bos, prefix, suffix = True if add_bos is None else add_bos, [], []
        vocabulary = pieces

    bos_id, eos_id = (vocabulary.find(named[name]) if name in named else None for name in ("bos_token", "eos_token"))
    if add_bos is not None:
        prefix = [bos_id] if add_bos and bos_id is not None else []
    if add_eos is not None:
        suffix = [eos_id] if add_eos and eos_id is not None else []
    ends = set() if eos_id is None else {eos_id}
    for name in ("config.json", "generation_config.json"):
        ends |= _eos_ids(name, _read_json(assets, name).get("eos_token_id"))
    return Tokenizer(
        vocabulary,
        vocab,
        prefix=prefix,
        suffix=suffix,
        bos_id=bos_id,
        end_ids=ends,
        chat_template=chat_template_of_directory(assets, config) if chat_template is None else chat_template,
        named=named,
    )


def _read_json(assets: dict[str, bytes], name: str) -> dict[str, Any]:
    """The object in a JSON file; {} where there is no such file."""
    if name not in assets:
        return {}
    try:
        value = json.loads(assets[name])
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{name} is not valid JSON: {error}; download the model again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{name} holds a {type(value).__name__}, must hold an object; download the model again")
    return value


def _flag(config: dict[str, Any], name: str) -> bool | None:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ModelError(f"{name} in tokenizer_config.json is {value!r}, must be true or false")
    return value


def _token_text(name: str, value: object) -> str | None:
    """A special token as the configs write it: its text, or an object with its text as "content"."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str | None) or not is_unicode(text or ""):
        raise ModelError(f"{name} in tokenizer_config.json is {value!r}, must be a token's text")
    return text


def _named(config: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    """The special tokens by the names that a template has for them: the usual ones, and those of the model's own."""
    values = {name: config[name] if name in config else special_map.get(name) for name in _NAMED}
    values |= {
        name: value
        for name, value in config.items()
        if name.endswith("_token") and name not in values and isinstance(value, str | dict)
    }
    for name in ("model_specific_special_tokens", "extra_special_tokens"):
        more = config.get(name)
        values |= more if isinstance(more, dict) else {}
    texts = {name: _token_text(name, value) for name, value in values.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _more_special(config: dict[str, Any]) -> list[str]:
    """The special tokens beyond the named ones."""
    values: list[object] = []
    for name in ("additional_special_tokens", "extra_special_tokens"):
        value = config.get(name) or []
        values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
    texts = (_token_text("additional_special_tokens", value) for value in values)
    return [text for text in texts if text is not None]


def _added_tokens(config: dict[str, Any]) -> list[AddedToken]:
    """`added_tokens_decoder` of tokenizer_config.json, in the order of ids."""
    table = config.get("added_tokens_decoder") or {}
    tokens = []
    try:
        for token_id, entry in sorted(table.items(), key=lambda item: int(item[0])):
            flags = (bool(entry.get(flag)) for flag in ("special", "lstrip", "rstrip", "single_word"))
            tokens.append(AddedToken(entry["content"], int(token_id), *flags))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"added_tokens_decoder in tokenizer_config.json is no table of tokens: {reason}") from error
    for token in tokens:
        content = token.content
        if not (isinstance(content, str) and content and is_unicode(content) and 0 <= token.token_id < 2**31):
            raise ModelError(f"added_tokens_decoder in tokenizer_config.json holds {token.token_id}: {content!r}")
    return tokens


def _eos_ids(name: str, value: object) -> set[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise ModelError(f"eos_token_id in {name} is {value!r}, must be an id or a list of ids")
    return set(ids)
