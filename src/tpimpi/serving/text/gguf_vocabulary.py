"""The vocabulary inside a GGUF file, as something that `tokenizers` or `sentencepiece` can run.

Source of the format: the GGUF specification (ggml, docs/gguf.md) for the `tokenizer.ggml.*` keys, and llama.cpp's
`llama-vocab.cpp` for what the file leaves unsaid: how text is cut before the merges (`tokenizer.ggml.pre`) and the
values that hold when a key is absent. It comes to us as `gguf.json`, one JSON object of all `tokenizer.*` keys.

Two models of tokenizer are known:

- `gpt2`: byte-level BPE. Tokens are spelled in the GPT-2 byte alphabet, merges are listed in order.
- `llama`: SentencePiece BPE. There are no merges: the scores of the tokens order them.

Only rank 0 ever reads this.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tpimpi.errors import ModelError
from tpimpi.serving.text.checks import is_unicode, needing, refusing
from tpimpi.serving.text.control_tokens import ends_of_generation
from tpimpi.serving.text.pre_tokenizers import PRE_TOKENIZERS

if TYPE_CHECKING:
    import tokenizers

# Token types; SentencePiece numbers its pieces in the same way.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_NO_VOCABULARY = ("none", "no_vocab")  # tokenizer.ggml.model of a file without one
_NO_TOKEN = 0xFFFFFFFF  # what converters write as the id of a special token that a model does not have

# Special tokens that templates name, beside those that every vocabulary has; the misspelling is GGUF's.
_NAMED_KEYS = {
    "pad": "padding_token_id",
    "sep": "seperator_token_id",
    "cls": "cls_token_id",
    "mask": "mask_token_id",
}
# Phi-3's vocabulary has these in places of their own; the flags of its tokens are in no GGUF file.
_PHI3_TOKENS = ("<|endoftext|>", "<|assistant|>", "<|placeholder1|>")
_PHI3_FIRST_ID = 32000
_PHI3_NOT_SWALLOWING = frozenset({"<unk>", "<s>", "<|endoftext|>"})


@dataclass(frozen=True)
class GgufVocabulary:
    """`gguf.json`, checked. Every list has one entry a token; ids are below `len(tokens)`."""

    model: str  # "gpt2" or "llama"
    pre: str  # a key of PRE_TOKENIZERS; "" with "llama"
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]  # empty with "gpt2"
    merges: tuple[tuple[str, str], ...]  # empty with "llama"
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    padding_id: int | None
    named_ids: dict[str, int]  # under the names that chat templates use
    end_ids: frozenset[int]
    swallowing: frozenset[str]  # the tokens that take the blanks behind them
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    remove_extra_whitespaces: bool
    chat_template: str | None


def read_gguf_vocabulary(data: bytes) -> GgufVocabulary | None:
    """Check `gguf.json` and fill in what llama.cpp assumes where a key is absent; None where it says that there is none.

    Raises ModelError for JSON that is broken, a key of the wrong kind, a tokenizer model or pre-tokenizer that is
    not known here.
    """
    keys = _read_keys(data)
    model = _get(keys, "model", str)
    if model in _NO_VOCABULARY:
        return None
    if model not in ("gpt2", "llama"):
        raise ModelError(
            f"tokenizer.ggml.model of the GGUF file is {model!r}, tpimpi knows 'gpt2' and 'llama'; use another model"
        )
    tokens, types = _read_tokens(keys)
    sentencepiece = model == "llama"
    pre, merges = ("", ()) if sentencepiece else _read_merges(keys)
    scores = _read_scores(keys, tokens) if sentencepiece else ()
    eos_id = _token_id(keys, "eos_token_id", len(tokens), 2 if sentencepiece else None)
    template = keys.get("tokenizer.chat_template")
    if not isinstance(template, str | None):
        raise ModelError(f"tokenizer.chat_template of the GGUF file is a {type(template).__name__}, must be text")
    bos_id = _token_id(keys, "bos_token_id", len(tokens), 1 if sentencepiece else None)
    unknown_id = _token_id(keys, "unknown_token_id", len(tokens), 0 if sentencepiece else None)
    named = {"bos": bos_id, "eos": eos_id, "unk": unknown_id}
    named |= {name: _token_id(keys, key, len(tokens), None) for name, key in _NAMED_KEYS.items()}
    return GgufVocabulary(
        model=model,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=merges,
        bos_id=bos_id,
        eos_id=eos_id,
        unknown_id=unknown_id,
        padding_id=named["pad"],
        named_ids={f"{name}_token": token_id for name, token_id in named.items() if token_id is not None},
        end_ids=_read_end_ids(keys, tokens, types, eos_id),
        swallowing=_swallowing(tokens, types),
        add_bos=_get(keys, "add_bos_token", bool, sentencepiece or PRE_TOKENIZERS[pre].add_bos),
        add_eos=_get(keys, "add_eos_token", bool, False),
        add_space_prefix=_get(keys, "add_space_prefix", bool, sentencepiece),
        remove_extra_whitespaces=_get(keys, "remove_extra_whitespaces", bool, False),
        chat_template=template,
    )


def _read_keys(data: bytes) -> dict[str, Any]:
    try:
        keys = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelError(
            f"the vocabulary of the GGUF file is not valid JSON: {error}; slice the model again"
        ) from error
    if not isinstance(keys, dict):
        raise ModelError(f"the vocabulary of the GGUF file is a {type(keys).__name__}, must be an object of keys")
    return keys


def _read_tokens(keys: dict[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The tokens, each once, and their types; where the file has no types all are normal."""
    texts = _get(keys, "tokens", list, [])
    # Bytes that are no UTF-8 come as surrogate escapes; no text is ever cut into such a token.
    if not all(type(text) is str for text in texts) or not is_unicode("".join(texts)):
        keys = {**keys, "tokenizer.ggml.tokens": [_readable(text) for text in texts]}
    tokens = _list(keys, "tokens", str)
    if not tokens:
        raise ModelError("tokenizer.ggml.tokens of the GGUF file is missing or empty; use a file with its vocabulary")
    tokens = tuple(token or f"[EMPTY_{index}]" for index, token in enumerate(tokens))
    if len(set(tokens)) != len(tokens):
        twice = Counter(tokens).most_common(1)[0][0]
        raise ModelError(f"tokenizer.ggml.tokens of the GGUF file holds {twice!r} twice; convert the model again")
    types = _list(keys, "token_type", int) or (NORMAL,) * len(tokens)
    _same_length("token_type", types, tokens)
    # Other numbers than these six (0 is "undefined") are, as in llama.cpp, tokens like any other.
    return tokens, tuple(kind if NORMAL <= kind <= BYTE else NORMAL for kind in types)


def _readable(token: object) -> object:
    """A token whose bytes are no UTF-8 as a name of its own, "[BYTES_ff]"; anything else as it is."""
    if isinstance(token, str) and not is_unicode(token):
        with contextlib.suppress(UnicodeEncodeError):
            return f"[BYTES_{token.encode('utf-8', 'surrogateescape').hex()}]"
    return token


def _read_merges(keys: dict[str, Any]) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The name of the pre-tokenizer and the merges of a "gpt2" vocabulary."""
    pre = _get(keys, "pre", str, "default") or "default"
    if pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"tokenizer.ggml.pre of the GGUF file is {pre!r}, tpimpi knows {', '.join(sorted(PRE_TOKENIZERS))}; "
            f"use the model as a directory with its tokenizer.json"
        )
    return pre, tuple(_pair(merge) for merge in _list(keys, "merges", str))


def _read_scores(keys: dict[str, Any], tokens: tuple[str, ...]) -> tuple[float, ...]:
    """The scores of a "llama" vocabulary."""
    scores = _list(keys, "scores", (int, float))
    _same_length("scores", scores, tokens)
    if not all(abs(score) < 1e38 for score in scores):  # false for NaN as well
        raise ModelError("tokenizer.ggml.scores of the GGUF file holds a value that is no float32")
    return scores


def _read_end_ids(
    keys: dict[str, Any], tokens: tuple[str, ...], types: tuple[int, ...], eos_id: int | None
) -> frozenset[int]:
    """Every id that ends an answer: those that the file names, and the special tokens that are known to."""
    named = [_token_id(keys, key, len(tokens), None) for key in ("eot_token_id", "eom_token_id")]
    special = {token: i for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)}
    return ends_of_generation(special, [*named, eos_id])


def _swallowing(tokens: tuple[str, ...], types: tuple[int, ...]) -> frozenset[str]:
    """The tokens that, in the tokenizer.json of the same model, take the blanks behind them: Phi-3's have `rstrip`."""
    if tokens[_PHI3_FIRST_ID : _PHI3_FIRST_ID + len(_PHI3_TOKENS)] != _PHI3_TOKENS:
        return frozenset()
    special = (token for token, kind in zip(tokens, types, strict=True) if kind in (UNKNOWN, CONTROL, USER_DEFINED))
    return frozenset(special) - _PHI3_NOT_SWALLOWING


def build_byte_level(vocabulary: GgufVocabulary) -> tokenizers.Tokenizer:
    """A byte-level BPE of `tokenizers` from a "gpt2" vocabulary. Raises ModelError if the merges do not fit."""
    with needing("tokenizers"):
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers

    pre = PRE_TOKENIZERS[vocabulary.pre]
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    with refusing("tokenizer.ggml.merges of the GGUF file do not fit its tokens"):
        model = models.BPE(vocab=ids, merges=list(vocabulary.merges), ignore_merges=pre.ignore_merges)
    tokenizer = tokenizers.Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated") for regex in pre.regexes]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()

    control = {vocabulary.bos_id, vocabulary.unknown_id, *vocabulary.end_ids}
    special, plain = [], []
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind in (CONTROL, UNKNOWN) or index in control:
            special.append(tokenizers.AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            plain.append(tokenizers.AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(plain)
    return tokenizer


def build_sentencepiece(vocabulary: GgufVocabulary) -> bytes:
    """A serialized SentencePiece ModelProto (type BPE) from a "llama" vocabulary."""
    with needing("sentencepiece protobuf"):
        from sentencepiece import sentencepiece_model_pb2

    pb2: Any = sentencepiece_model_pb2  # its classes are made at import, unseen by mypy
    proto = pb2.ModelProto()
    unknown = vocabulary.unknown_id or 0
    for index, token in enumerate(vocabulary.tokens):
        kind = vocabulary.types[index]
        # SentencePiece wants exactly one unknown piece.
        kind = UNKNOWN if index == unknown else UNUSED if kind == UNKNOWN else kind
        proto.pieces.add(piece=token, score=vocabulary.scores[index], type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type = pb2.TrainerSpec.BPE
    trainer.vocab_size = len(vocabulary.tokens)
    trainer.byte_fallback = BYTE in vocabulary.types
    trainer.unk_id, trainer.unk_piece = unknown, vocabulary.tokens[unknown]
    for name, token_id in (("bos", vocabulary.bos_id), ("eos", vocabulary.eos_id), ("pad", vocabulary.padding_id)):
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(trainer, f"{name}_piece", vocabulary.tokens[token_id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocabulary.add_space_prefix
    normalizer.remove_extra_whitespaces = vocabulary.remove_extra_whitespaces
    normalizer.escape_whitespaces = True
    serialized: bytes = proto.SerializeToString()
    return serialized


def _get(keys: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = keys.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, kind):
        found = "missing" if value is None else repr(value)
        raise ModelError(f"tokenizer.ggml.{name} of the GGUF file is {found}, must be of type {kind.__name__}")
    return value


def _list(keys: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> tuple[Any, ...]:
    values = _get(keys, name, list, [])
    if all(type(value) is kind for value in values) and (kind is not str or is_unicode("".join(values))):
        return tuple(values)
    for index, value in enumerate(values):
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ModelError(f"tokenizer.ggml.{name}[{index}] of the GGUF file is {value!r}, of the wrong type")
        if isinstance(value, str) and not is_unicode(value):
            raise ModelError(f"tokenizer.ggml.{name}[{index}] of the GGUF file is {value!r}, must be Unicode text")
    return tuple(values)


def _same_length(name: str, values: tuple[Any, ...], tokens: tuple[str, ...]) -> None:
    if len(values) != len(tokens):
        raise ModelError(
            f"tokenizer.ggml.{name} of the GGUF file has {len(values)} entries, must have {len(tokens)}, one a token"
        )


def _pair(merge: str) -> tuple[str, str]:
    cut = merge.find(" ", 1)  # a token may itself begin with a space
    if cut < 0 or cut + 1 == len(merge):
        raise ModelError(f"tokenizer.ggml.merges of the GGUF file holds {merge!r}, must be two tokens and a space")
    return merge[:cut], merge[cut + 1 :]


def _token_id(keys: dict[str, Any], name: str, count: int, default: int | None) -> int | None:
    value = keys.get(f"tokenizer.ggml.{name}", default)
    if value is None or value == _NO_TOKEN:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
        raise ModelError(f"tokenizer.ggml.{name} of the GGUF file is {value!r}, must be an id below {count}")
    return value
