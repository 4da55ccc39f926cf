"""Grammars that are not plain are compiled in a process of their own first (see grammar_process), so that what takes
minutes, or all memory, takes them there, and the run says one line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from tpimpi.errors import shorten
from tpimpi.serving.grammar_process import MAX_BYTES
from tpimpi.system.helper_process import MAX_REASON_CHARACTERS, EndedError, HelperProcess

MAX_CPU_S = 4  # of a processor, for one grammar: rank 0 takes as long again
MAX_WAIT_S = 20.0  # on a machine that does other things too
MAX_REMEMBERED = 1000  # verdicts, of 100 bytes each, or of an error's length


class CostlyError(Exception):
    """A grammar takes too much: one line of how, what is needed, and what to do."""


class GrammarTrial(HelperProcess):
    """A process in which grammars are tried, one after another, and what it has found."""

    def __init__(self) -> None:
        super().__init__("tpimpi.serving.grammar_process")
        self._found: OrderedDict[bytes, str | CostlyError] = OrderedDict()

    def problem(self, lark: str, names: Sequence[str], owner: str) -> str | None:
        """llguidance's error over the schema in this grammar; "" where rank 0 may compile it, and may then find another;
        None where there could be no process. `names` are those of the model's control tokens.

        The same grammar is not tried again for the same owner; another would else learn from the time that somebody has
        it. Raises CostlyError.
        """
        import hashlib  # with OpenSSL, 3 MB, which runs without such grammars do without

        key = hashlib.sha256(f"{owner}\0{lark}".encode("utf-8", "backslashreplace")).digest()
        found = self._found.get(key)
        if found is None:
            request = msgspec.msgpack.encode((lark, names, MAX_CPU_S))
            if not self.say(request, MAX_WAIT_S):
                return None
            try:
                found = self.hear(max_cpu_s=MAX_CPU_S, max_wait_s=MAX_WAIT_S).decode(errors="replace")
            except EndedError as error:
                found = _costly(error)
                if error.busy or error.from_outside:
                    raise found from error
            self._found[key] = found
            while len(self._found) > MAX_REMEMBERED:
                self._found.popitem(last=False)
        else:
            self._found.move_to_end(key)
        if isinstance(found, CostlyError):
            raise found
        return found


def _costly(error: EndedError) -> CostlyError:
    how, most = shorten(str(error), MAX_REASON_CHARACTERS // 2), f"{MAX_BYTES >> 20} MiB"
    if error.busy or error.from_outside:
        return CostlyError(
            f"a process that compiled it {how}, perhaps for what else this machine does; ask again later"
        )
    if "memory allocation" in how:
        how = f"took more than {most}"
    return CostlyError(
        f"a process that compiled it {how}; it may take {MAX_CPU_S} s of a processor and {most}: use shorter patterns, a "
        "smaller multipleOf, fewer alternatives"
    )
