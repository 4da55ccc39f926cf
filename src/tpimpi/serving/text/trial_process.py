"""The process in which tokenizers are tried, `python -m tpimpi.serving.text.trial_process`: what ends it ends no run.

It reads requests from standard input and answers each on standard output, until there are no more: a length (8 bytes,
little-endian), and so many bytes. An empty answer, before any request, says that it has begun. A request is MessagePack:
assets as in `load`, and the rows of the model's embedding table. The answer is text: why a run is not to load that
tokenizer; empty where it may, and may then say itself what else is wrong with it.
"""

from __future__ import annotations

import math
import os
import resource
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from tpimpi.errors import ModelError
from tpimpi.serving.text.load import load_tokenizer
from tpimpi.serving.text.token_ids import TokenIds
from tpimpi.serving.text.tokenizer import Tokenizer
from tpimpi.system.core_dumps import turn_off_core_dumps

LENGTH = struct.Struct("<Q")
MAX_CPU_S = 60  # of one tokenizer: those of 30 MB take 2 s on a desktop
# The tokenizers that were seen take up to 20 times the size of their files.
MAX_BYTES, MAX_TIMES_FILES = 1 << 30, 40
MAX_PIECES = 1000
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
        return _grave(error.__cause__ or error)
    except BaseException as error:
        return _grave(error)
    return ""


def _grave(error: BaseException) -> str:
    """What a run has to be kept from, or "": want of memory; and panics of Rust, which are no Exception, and of which two at
    once end a process."""
    if isinstance(error, MemoryError):
        return "takes more memory than any tokenizer of its size should"
    return "" if isinstance(error, Exception) else str(error)


def _limit(nbytes: int) -> None:
    """Bound what files of so many bytes may take from now on."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if _HAS_STATM else 0
    for what, limit in (
        (resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + MAX_CPU_S),
        (resource.RLIMIT_AS, mapped + MAX_BYTES + MAX_TIMES_FILES * nbytes),
    ):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


_HAS_STATM = Path("/proc/self/statm").exists()


def _requests(stream: BinaryIO) -> Iterator[tuple[dict[str, bytes], int]]:
    while head := stream.read(LENGTH.size):
        (nbytes,) = LENGTH.unpack(head)
        yield msgspec.msgpack.decode(stream.read(nbytes), type=tuple[dict[str, bytes], int])


def main() -> None:
    turn_off_core_dumps()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    answers.write(LENGTH.pack(0))
    answers.flush()
    for assets, vocab in _requests(sys.stdin.buffer):
        _limit(sum(map(len, assets.values())))
        answer = problem_of(assets, vocab).encode("utf-8", "backslashreplace")
        answers.write(LENGTH.pack(len(answer)) + answer)
        answers.flush()


if __name__ == "__main__":
    main()
