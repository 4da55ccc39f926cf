"""The process in which tokenizers are tried, `python -m tpimpi.serving.text.trial_process`: what ends it ends no run.

A request (see system/helper_process) is MessagePack: assets as in `load`, and the rows of the model's embedding table. The
answer is text: why a run is not to load that tokenizer; empty where it may, and may then say itself what else is wrong with
it.
"""

from __future__ import annotations

import msgspec

from tpimpi.errors import ModelError
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.system.helper_process import grave, limit_cpu, limit_memory, serve

MAX_CPU_S = 60  # of one tokenizer: those of 30 MB take 2 s on a desktop
# The tokenizers that were seen take up to 20 times the size of their files.
MAX_BYTES, MAX_TIMES_FILES = 1 << 30, 40
MAX_PIECES = 1000
_WHAT = "any tokenizer of its size"
PROBES = (
    "Hello, world! The quick brown fox; 1234567 times.",
    " \t\r\n  leading and trailing   \n\n",
    "Gr\u00fc\u00dfe, \u4f60\u597d, \u0645\u0631\u062d\u0628\u0627, e\u0301, \U0001f642\u200d\U0001f468, \ufffd\u0000",
    '<|im_start|>user\n<s>[INST] {"a": [1, 2.5e-3]} </s><unk><0x0A>\u2581',
    "def f(x):\n\treturn [y ** 2 for y in x]  # " + "a" * 300,
)
_MESSAGES = [
    {"role": "user", "content": PROBES[0]},
    {"role": "assistant", "content": PROBES[2]},
    {"role": "user", "content": PROBES[3]},
]


def try_out(tokenizer: Tokenizer | TokenIds) -> None:
    """Do what a run does with a tokenizer, with some texts."""
    if isinstance(tokenizer, TokenIds):
        return
    for text in PROBES:
        ids = tokenizer.encode(text)
        tokenizer.encode_content(text)
        stream = tokenizer.answer_stream(ids, raw=True)
        for token in ids:
            stream.push(token)
        stream.flush()
    for token in range(0, tokenizer.sampled_ids, max(1, tokenizer.sampled_ids // MAX_PIECES)):
        tokenizer.piece(token)
    if tokenizer.has_chat_template:
        tokenizer.encode_messages(_MESSAGES)


def problem_of(assets: dict[str, bytes], vocab: int) -> str:
    """Why a run is not to load this tokenizer; "" where it may."""
    try:
        try_out(load_tokenizer(assets, vocab))
    except ModelError as error:
        return grave(error.__cause__ or error, _WHAT)
    except BaseException as error:
        return grave(error, _WHAT)
    return ""


def _answer(request: bytes) -> str:
    assets, vocab = msgspec.msgpack.decode(request, type=tuple[dict[str, bytes], int])
    del request
    limit_cpu(MAX_CPU_S)
    limit_memory(MAX_BYTES + MAX_TIMES_FILES * sum(map(len, assets.values())))
    return problem_of(assets, vocab)


if __name__ == "__main__":
    serve(_answer)
