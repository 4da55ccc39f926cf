"""A tokenizer.json that this host has not seen yet is first tried in a process of its own (see text/trial_process).

What runs it is a package in Rust, which over some files does not fail but ends its whole process: two panics at once, a
stack that is full, memory without end. So that happens to a process that is there for it, and the run says one line. What
was tried is remembered in the cache folder, by an empty file with the name of its hash. (XXH3-128: who can make two files
with the same hash only gets as far as without a trial.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec
import xxhash

from tpimpi import __version__
from tpimpi.errors import InputError, ModelError, TpimpiError, shorten, shorten_path
from tpimpi.serving.text.checks import needing
from tpimpi.serving.text.trial_process import MAX_CPU_S
from tpimpi.system.helper_process import MAX_REASON_CHARACTERS, EndedError, HelperProcess
from tpimpi.weights.locations import cache_folder

FOLDER = "tokenizers"  # in the cache folder
MAX_WAIT_S = 300.0  # for one tokenizer, on a machine that does other things too


def try_tokenizer(assets: Mapping[str, bytes], vocab: int, where: Path) -> None:
    """Before a run loads the tokenizer in `assets` (see load), which came from `where`: see that this does not end it.

    Takes no time where there is no tokenizer.json, or where it was tried before on this host; else somewhat longer than to
    load it, and of this process's memory a copy of the files, until the other has them. Raises ModelError, and TpimpiError
    where the system ended the other.
    """
    if "tokenizer.json" not in assets:
        return
    seen = _seen(assets, vocab)
    with contextlib.suppress(OSError):  # as below
        if seen is not None and seen.exists():
            return
    with contextlib.closing(TokenizerTrial()) as trial:
        problem = trial.problem(assets, vocab)
    if problem:
        raise ModelError(
            f"tokenizer.json of {shorten_path(where)} cannot be used: a process that loaded it {problem}; download the "
            "model again, from a publisher that you trust"
        )
    if problem is not None and seen is not None:
        with contextlib.suppress(OSError):  # then it is tried again the next time
            seen.parent.mkdir(parents=True, exist_ok=True)
            seen.touch()


def _seen(assets: Mapping[str, bytes], vocab: int) -> Path | None:
    """The file that says that these were tried, with these versions; None where there is no place for it."""
    with needing("tokenizers"):
        import tokenizers
    digest = xxhash.xxh3_128(f"{__version__} {tokenizers.__version__} {vocab}".encode())
    for name, content in sorted(assets.items()):
        digest.update(f"\0{name}\0{len(content)}\0".encode())
        digest.update(content)
    try:
        return cache_folder() / FOLDER / digest.hexdigest()
    except InputError:
        return None


class TokenizerTrial(HelperProcess):
    """A process in which tokenizers are tried, one after another; where one has ended it, the next gets another."""

    def __init__(self) -> None:
        super().__init__("tpimpi.serving.text.trial_process")

    def problem(self, assets: Mapping[str, bytes], vocab: int) -> str | None:
        """What became of the process when it used this tokenizer ("was ended by SIGABRT (…)"), where a run is not to do so;
        "" where it may; None where there could be no such process. Raises TpimpiError where it was ended from outside."""
        if not self.say(msgspec.msgpack.encode((assets, vocab)), MAX_WAIT_S):
            return None
        try:
            answer = self.hear(max_cpu_s=MAX_CPU_S, max_wait_s=MAX_WAIT_S).decode(errors="replace")
        except EndedError as error:
            if error.from_outside:
                raise TpimpiError(
                    f"the process in which tokenizer.json was tried was ended from outside, by {error.from_outside}: "
                    "perhaps memory is short here; end other programs, and start again"
                ) from error
            return str(error)
        return answer and f"failed ({shorten(answer, MAX_REASON_CHARACTERS)})"
