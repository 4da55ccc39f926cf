"""Grammars that are not plain are compiled in a process of their own first (see grammar_process), so that what takes
minutes, or all memory, takes them there, and the run says one line.

The process is started in 0.1 s when the first of them comes, and keeps 30 MB; what it is asked else it answers in as long as
rank 0 takes to compile it, 1 ms for an ordinary schema with a pattern.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from tpimpi.errors import shorten
from tpimpi.serving.grammar_process import MAX_BYTES
from tpimpi.system.helper_process import MAX_REASON_CHARACTERS, EndedError, HelperProcess

MAX_CPU_S = 4  # of a processor, for one grammar: rank 0 takes as long again
MAX_WAIT_S = 10.0  # on a machine that does other things too
MAX_REMEMBERED = 1000  # verdicts, of 2 KB at most


class CostlyError(Exception):
    """A grammar takes too much: one line of how, what is needed, and what to do."""


class GrammarTrial(HelperProcess):
    """A process in which grammars are tried, one after another, and what it has found."""

    def __init__(self) -> None:
        super().__init__("tpimpi.serving.grammar_process")
        self._found: OrderedDict[bytes, tuple[bool, str]] = OrderedDict()  # whether too costly, and why

    def problem(self, lark: str, names: Sequence[str], owner: str) -> str | None:
        """llguidance's error over the schema in this grammar; "" where rank 0 may compile it, and may then find another;
        None where there could be no process. `names` are those of the model's control tokens.

        The same grammar is not tried again for the same owner; another would else learn from the time that somebody has
        it. Raises CostlyError.
        """
        import hashlib  # with OpenSSL, 3 MB, which runs without such grammars do without

        key = hashlib.sha256(f"{len(owner)} {owner}{lark}".encode("utf-8", "backslashreplace")).digest()
        if key not in self._found:
            if not self.say(msgspec.msgpack.encode((lark, names, MAX_CPU_S)), MAX_WAIT_S):
                return None
            try:
                answer = self.hear(max_cpu_s=MAX_CPU_S, max_wait_s=MAX_WAIT_S)
            except EndedError as error:
                if error.busy or error.from_outside:
                    raise CostlyError(
                        f"{_how(error)}, perhaps for what else this machine does; ask again later"
                    ) from error
                self._found[key] = True, _too_much(error)
            else:
                self._found[key] = False, answer.decode(errors="replace")
            if len(self._found) > MAX_REMEMBERED:
                self._found.popitem(last=False)
        self._found.move_to_end(key)
        costly, text = self._found[key]
        if costly:
            raise CostlyError(text)
        return text


def _how(error: EndedError) -> str:
    return f"a process that compiled it {shorten(str(error), MAX_REASON_CHARACTERS // 2)}"


def _too_much(error: EndedError) -> str:
    most = f"{MAX_BYTES >> 20} MiB"
    how = f"a process that compiled it took more than {most}" if "memory allocation" in str(error) else _how(error)
    return (
        f"{how}; it may take {MAX_CPU_S} s of a processor and {most}: use shorter patterns, a smaller multipleOf, fewer "
        "alternatives"
    )
