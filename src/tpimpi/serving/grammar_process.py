"""How grammars are compiled; and the process in which those that are not plain are compiled before rank 0 does it,
`python -m tpimpi.serving.grammar_process`: some short ones take llguidance minutes, or all memory.

A request (see system/helper_process) is MessagePack: a grammar in llguidance's Lark, the names of the model's control
tokens, and seconds of a processor. The answer is text: why rank 0 is not to compile it; empty where it may, and may then say
itself what else is wrong with it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import msgspec

from tpimpi.system.helper_process import grave, limit_cpu, limit_memory, serve

if TYPE_CHECKING:
    import llguidance

MAX_BYTES = 400 << 20  # of one grammar: rank 0 keeps somewhat more of it, for a vocabulary of its own
MAX_ERROR_CHARACTERS = 2000
# llguidance's own is 200000: too few for a multiple of 1000000 where a token can be three digits. Of hostile grammars a mask
# takes up to 0.5 s with this.
STEP_FUEL = 400_000
# Of a number that goes on, each digit is many states: 200 digits of a multiple of 3600000 take 350 MB with llguidance's own
# limit, which long texts with a maxLength need.
MAX_STATES_OF_MULTIPLES = 50_000
_LARGE_MULTIPLE = re.compile(r'"multipleOf": *[0-9.]{6}')
_PRINTABLE = [bytes([byte]) for byte in range(0x20, 0x7F)]


class Pieces:
    """What llguidance is told of a vocabulary: the bytes of every token."""

    def __init__(self, eos: int, bos: int | None, pieces: list[bytes], special: list[int]) -> None:
        self.eos_token_id, self.bos_token_id, self.tokens, self.special_token_ids = eos, bos, pieces, special

    def __call__(self, text: bytes) -> list[int]:
        """The tokens of a text, which nothing asks for (see `no_forcing` in grammar.py)."""
        return []


def vocabulary_of(
    pieces: list[bytes], special: list[int], ends: Sequence[int], bos: int | None
) -> llguidance.LLTokenizer:
    """`special` are the ids of tokens that are no text, whose pieces are their names."""
    import llguidance

    told = Pieces(ends[0], bos, pieces, special)
    wrapper: Any = llguidance.TokenizerWrapper(told)
    found = llguidance.LLTokenizer(wrapper, n_vocab=len(pieces), eos_token=list(ends))
    told.tokens = wrapper.tokens = []  # which it has copied
    return found


def compile_lark(vocabulary: llguidance.LLTokenizer, lark: str) -> llguidance.LLMatcher:
    """What is too complex for a first token is in error, too."""
    import llguidance

    states = MAX_STATES_OF_MULTIPLES if _LARGE_MULTIPLE.search(lark) else None
    limits = llguidance.LLParserLimits(verbose_errors=False, step_lexer_fuel=STEP_FUEL, max_lexer_states=states)
    matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return matcher


# In the process


@lru_cache(maxsize=1)
def _small_vocabulary(names: tuple[str, ...]) -> llguidance.LLTokenizer:
    """One over which a grammar takes as much as over a model's: what llguidance computes ahead over all tokens it bounds by
    its own limits, which single bytes do not reach, but pairs of characters and numbers do. Measured beside the 128256
    tokens of Llama 3.1: of "a?" * 8000 149 MB with single bytes, 279 MB with these, 279 MB with Llama's."""
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [first + second for first, second in itertools.product(_PRINTABLE, repeat=2)]
    pieces += [f"{number:03}".encode() for number in range(1000)]
    special = range(len(pieces), len(pieces) + 1 + len(names))
    pieces += [b"</s>", *(name.encode("utf-8") for name in names)]
    return vocabulary_of(pieces, list(special), [special[0]], None)


def problem_of(lark: str, names: tuple[str, ...]) -> str:
    """Why this is not to be compiled; "" where it may be."""
    try:
        error = compile_lark(_small_vocabulary(names), lark).get_error()
    except BaseException as raised:
        return grave(raised, "a grammar")
    # What another vocabulary may be right for is left to rank 0.
    return error[:MAX_ERROR_CHARACTERS] if "JSON schema" in error or error.startswith("panic: ") else ""


def _answer(request: bytes) -> str:
    lark, names, max_cpu_s = msgspec.msgpack.decode(request, type=tuple[str, tuple[str, ...], int])
    limit_cpu(max_cpu_s)
    return problem_of(lark, names)


if __name__ == "__main__":
    limit_memory(MAX_BYTES)
    serve(_answer)
