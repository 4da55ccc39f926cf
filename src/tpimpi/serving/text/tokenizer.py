"""Text to token ids and back, and the chat template. Only rank 0 has any of it.

What a model brings is a dict of assets, file name to content, as a source hands it out and as rank 0's slice file
keeps it:

- a Hugging Face directory: `tokenizer.json` (run by `tokenizers`) or else `tokenizer.model` (run by `sentencepiece`),
  and what stands beside it: `tokenizer_config.json`, `special_tokens_map.json`, `generation_config.json`,
  `config.json`, `chat_template.jinja`;
- a GGUF file: `gguf.json` alone (see gguf_vocabulary.py).

Ids become text through the bytes of each token and an incremental UTF-8 decoder, so an answer streams at a constant
cost a token and never shows half a character.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from tpimpi.errors import InputError, ModelError
from tpimpi.serving.text.gguf_vocabulary import (
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    GgufVocabulary,
    build_byte_level,
    build_sentencepiece,
    is_unicode,
    needing,
    read_gguf_vocabulary,
)
from tpimpi.serving.text.vocabularies import (
    AddedToken,
    Leading,
    Prefix,
    SentencePieceVocabulary,
    TokenizersVocabulary,
    Vocabulary,
    parse_tokenizer_json,
)

_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


class TextStream:
    """Turns ids, one at a time, into text that is certain: the pieces joined equal `decode` of all ids."""

    def __init__(self, piece: Callable[[int], bytes], leading: Leading) -> None:
        self._piece = piece
        self._leading: Leading = leading
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; "" while a character is incomplete."""
        return self._trim(self._decoder.decode(self._piece(token_id)))

    def flush(self) -> str:
        """What is left at the end: a character that stays incomplete, as U+FFFD."""
        return self._trim(self._decoder.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if self._leading == "keep" or not text:
            return text
        kept = text.removeprefix(" ") if self._leading == "drop one" else text.lstrip(" ")
        if kept or self._leading == "drop one":
            self._leading = "keep"
        return kept


class Tokenizer:
    """One model's text ↔ ids.

    vocab_size: number of ids the tokenizer knows (the model's table may have more rows, or fewer).
    bos_id: the token that begins a text, or None.
    end_ids: every id that ends an answer.
    has_chat_template: whether `encode_chat` can be used; an empty template, which would leave the prompt out, is none.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        vocab: int,
        *,
        prefix: list[int],
        suffix: list[int],
        bos_id: int | None,
        end_ids: Iterable[int],
        chat_template: str | None,
        named: dict[str, str],
    ) -> None:
        self.vocab_size = vocabulary.size
        self.bos_id = bos_id
        self.end_ids = frozenset(end for end in end_ids if 0 <= end < vocab)
        self._chat_template = chat_template if chat_template and chat_template.strip() else None
        self.has_chat_template = self._chat_template is not None
        self._vocabulary = vocabulary
        self._vocab = vocab
        self._prefix, self._suffix = prefix, suffix
        self._named = named

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text as it is; with `special`, BOS and EOS where the model's own tokenizer adds them.

        Raises InputError for text that has no UTF-8 form, ModelError for an id that the model has no row for.
        """
        _check_prompt(text)
        ids = self._vocabulary.encode(text)
        if special:
            ids = [*self._prefix, *ids, *self._suffix]
        return self._checked(ids)

    def encode_chat(self, prompt: str, said: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids of a user message in the model's own chat template, up to where the answer begins; before it are the prompts
        and answers of `said`.

        The rendered template is complete: BOS is there if and only if the template writes it, as in transformers.
        Raises InputError for text that has no UTF-8 form, ModelError where the template is missing or fails.
        """
        _check_prompt(prompt)
        if self._chat_template is None:
            raise ModelError("the model has no chat template; use --raw to complete the prompt as it is")
        messages = []
        for asked, answered in said:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        messages.append({"role": "user", "content": prompt})
        text = _render(self._chat_template, messages, self._named)
        if not is_unicode(text):
            raise ModelError("the model's chat template writes text that is not Unicode; use --raw to do without it")
        return self._checked(self._vocabulary.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens skipped; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(map(stream.push, ids)) + stream.flush()

    def stream(self) -> TextStream:
        """A fresh TextStream, for one answer."""
        return TextStream(self._vocabulary.piece, self._vocabulary.leading)

    def _checked(self, ids: list[int]) -> list[int]:
        if max(ids, default=0) >= self._vocab:
            raise ModelError(
                f"the tokenizer gives id {max(ids)}, the model's vocabulary has {self._vocab}; "
                f"put the tokenizer that belongs to the model beside it"
            )
        return ids


class TokenIds:
    """Stands in for a Tokenizer where slices have none (those of `synth`): text is ids in decimal, one after another."""

    bos_id = None
    end_ids: frozenset[int] = frozenset()
    has_chat_template = False

    def __init__(self, vocab: int) -> None:
        self.vocab_size = vocab

    def check_params(self, *, raw: bool, stops: Sequence[str]) -> None:
        """Raise InputError for what has no meaning without a tokenizer: a chat, and texts to stop before."""
        if not raw:
            raise InputError(
                "these slices have no tokenizer (synth made them), so a prompt is token ids; give --raw, and ids such as "
                '--prompt "1 15043 29871"'
            )
        if stops:
            raise InputError("these slices have no tokenizer, so there is no text to stop before; leave --stop out")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The ids that a text holds, with blanks or commas between them. InputError for anything else."""
        words = text.replace(",", " ").split()
        for word in words:
            if not (word.isascii() and word.isdecimal() and len(word) <= 10 and int(word) < self.vocab_size):
                raise InputError(
                    f"{word[:40]!r} is no token id; these slices have no tokenizer, so give whole numbers below "
                    f"{self.vocab_size} with blanks or commas between them"
                )
        return [int(word) for word in words]

    def encode_chat(self, prompt: str, said: Sequence[tuple[str, str]] = ()) -> list[int]:
        """InputError always: there is no chat template."""
        self.check_params(raw=False, stops=())
        return []

    def stream(self) -> IdStream:
        """A fresh IdStream, for one answer."""
        return IdStream()


class IdStream:
    """Ids as text, with blanks between them; like TextStream."""

    def __init__(self) -> None:
        self._between = ""

    def push(self, token_id: int) -> str:
        """The id, after a blank unless it is the first."""
        text = f"{self._between}{token_id}"
        self._between = " "
        return text

    def flush(self) -> str:
        """Nothing is ever left."""
        return ""


def _check_prompt(prompt: str) -> None:
    if not is_unicode(prompt):
        raise InputError("the prompt holds bytes that are not UTF-8; write it in UTF-8")


def tokenizer_of_slices(assets: dict[str, bytes], vocab: int) -> Tokenizer | TokenIds:
    """The tokenizer that slices carry; TokenIds where they carry none, as those of `synth`. Errors as load_tokenizer."""
    return load_tokenizer(assets, vocab) if assets else TokenIds(vocab)


def load_tokenizer(assets: dict[str, bytes], vocab: int) -> Tokenizer:
    """The tokenizer in `assets` (file name → content), for a model with `vocab` rows in its embedding table.

    Raises ModelError where there is none, or it is broken, or of a kind that is not known here.
    """
    if "gguf.json" in assets:
        return _load_gguf(read_gguf_vocabulary(assets["gguf.json"]), vocab)
    if "tokenizer.json" not in assets and "tokenizer.model" not in assets:
        found = f"found only {', '.join(sorted(assets))}" if assets else "found no file of one"
        raise ModelError(f"no tokenizer beside the model: {found}; put tokenizer.json or tokenizer.model there")
    return _load_directory(assets, vocab)


# --- a GGUF file -----------------------------------------------------------------------------------------------------


def _load_gguf(gguf: GgufVocabulary, vocab: int) -> Tokenizer:
    vocabulary: Vocabulary
    if gguf.model == "gpt2":
        vocabulary = TokenizersVocabulary(build_byte_level(gguf))
    else:
        # llama.cpp: every stretch of text between special tokens gets the prefix space.
        pieces = SentencePieceVocabulary(build_sentencepiece(gguf), "the vocabulary of the GGUF file", "every")
        pieces.add(
            AddedToken(token, index, special=kind != USER_DEFINED)
            for index, (token, kind) in enumerate(zip(gguf.tokens, gguf.types, strict=True))
            if kind in (UNKNOWN, CONTROL, USER_DEFINED)
        )
        vocabulary = pieces
    ids = {"bos_token": gguf.bos_id, "eos_token": gguf.eos_id, "unk_token": gguf.unknown_id}
    ids["pad_token"] = gguf.padding_id
    return Tokenizer(
        vocabulary,
        vocab,
        prefix=[gguf.bos_id] if gguf.add_bos and gguf.bos_id is not None else [],
        suffix=[gguf.eos_id] if gguf.add_eos and gguf.eos_id is not None else [],
        bos_id=gguf.bos_id,
        end_ids=gguf.end_ids,
        chat_template=gguf.chat_template,
        named={name: gguf.tokens[index] for name, index in ids.items() if index is not None},
    )


# --- a Hugging Face directory ----------------------------------------------------------------------------------------


def _load_directory(assets: dict[str, bytes], vocab: int) -> Tokenizer:
    config = _read_json(assets, "tokenizer_config.json")
    special_map = _read_json(assets, "special_tokens_map.json")
    named = {}
    for name in _NAMED:
        token = _token_text(name, config[name] if name in config else special_map.get(name))
        if token is not None:
            named[name] = token
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
        chat_template=_chat_template(assets, config),
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


def _chat_template(assets: dict[str, bytes], config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in assets:
        try:
            return assets["chat_template.jinja"].decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"chat_template.jinja is not UTF-8: {error}; download the model again") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        by_name = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = by_name.get("default")
    if not isinstance(template, str | None):
        raise ModelError(f"chat_template in tokenizer_config.json is a {type(template).__name__}, must be text")
    return template


# --- the chat template -----------------------------------------------------------------------------------------------


def _render(template: str, messages: list[dict[str, str]], named: dict[str, str]) -> str:
    """The chat template around the messages of a conversation, in the environment that transformers gives templates.

    A template is a program that came with the model, so it runs in Jinja's sandbox. Raises ModelError if it fails.
    """
    with needing("jinja2"):
        import jinja2
        import jinja2.ext
        from jinja2.exceptions import SecurityError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the answer for training; here it is only its content."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:  # raised at once, not printed as nothing
            raise SecurityError(f"access to {attribute!r} of a {type(obj).__name__}")

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=messages,
            tools=None,
            documents=None,
            add_generation_prompt=True,
            **named,
        )
    except Exception as error:  # whatever a program can raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise ModelError(f"the model's chat template fails: {reason}; use --raw to do without it") from error
