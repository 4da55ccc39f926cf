"""A tokenizer.json that this host has not seen yet is first tried in a process of its own (see text/trial_process).

What runs it is a package in Rust, which over some files does not fail but ends its whole process: two panics at once, a
stack that is full, memory without end. So that happens to a process that is there for it, and the run says one line. What
was tried is remembered in the cache folder, by an empty file with the name of its hash. (XXH3-128: who can make two files
with the same hash only gets as far as without a trial.)
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec
import xxhash

from tpimpi import __version__
from tpimpi.errors import InputError, ModelError, TpimpiError, shorten, shorten_path
from tpimpi.serving.text.checks import needing
from tpimpi.serving.text.trial_process import LENGTH, MAX_CPU_S
from tpimpi.system.launcher import environment_without_launcher
from tpimpi.weights.locations import cache_folder

FOLDER = "tokenizers"  # in the cache folder
MAX_WAIT_S = 300.0  # for one tokenizer, on a machine that does other things too
MAX_REASON_CHARACTERS = 200
_MAX_SAID_BYTES = 1 << 14
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)  # by a system that is short of memory, or by who administers it
# One thread: so many cores as there may be would each map memory of their own.
_VARIABLES = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}


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


class TokenizerTrial:
    """A process in which tokenizers are tried, one after another; where one has ended it, the next gets another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""  # the end of what it has written to standard error for this tokenizer

    def problem(self, assets: Mapping[str, bytes], vocab: int) -> str | None:
        """What became of the process when it used this tokenizer ("was ended by SIGABRT (…)"), where a run is not to do so;
        "" where it may; None where there could be no such process. Raises TpimpiError where it was ended from outside."""
        process = self._process or self._start()
        if process is None:
            return None
        assert process.stdin is not None
        self._hear_errors(process)
        self._said = b""
        request = msgspec.msgpack.encode((assets, vocab))
        try:
            process.stdin.write(LENGTH.pack(len(request)))
            process.stdin.write(request)
            process.stdin.flush()
            del request
            answer = self._answer(process).decode(errors="replace")
        except TimeoutError:
            self.close()
            return f"took more than {MAX_WAIT_S:.0f} s"
        except (BrokenPipeError, EOFError):
            return self._ending(process)
        return answer and f"failed ({shorten(answer, MAX_REASON_CHARACTERS)})"

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close()

    def _start(self) -> subprocess.Popen[bytes] | None:
        """None where there is no room for another process, or it does not begin."""
        with contextlib.suppress(OSError, EOFError):
            self._process = subprocess.Popen(
                # -P: the current folder may be that of a model, and has no say in what is imported.
                [sys.executable, "-P", "-m", "tpimpi.serving.text.trial_process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment_without_launcher(), **_VARIABLES},
                start_new_session=True,  # the signals of launcher and terminal are for rank 0
            )
            assert self._process.stderr is not None
            os.set_blocking(self._process.stderr.fileno(), False)
            self._answer(self._process)
            return self._process
        self.close()
        return None

    def _answer(self, process: subprocess.Popen[bytes]) -> bytes:
        """Raises EOFError, TimeoutError."""
        deadline = time.monotonic() + MAX_WAIT_S
        (nbytes,) = LENGTH.unpack(self._read(process, LENGTH.size, deadline))
        return self._read(process, nbytes, deadline)

    def _read(self, process: subprocess.Popen[bytes], nbytes: int, deadline: float) -> bytes:
        assert process.stdout is not None and process.stderr is not None
        data, answers, errors = b"", process.stdout.fileno(), process.stderr.fileno()
        heard = [answers, errors]
        while len(data) < nbytes:
            ready = select.select(heard, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise TimeoutError
            if errors in ready and not self._hear_errors(process):  # a full pipe would stop it
                heard.remove(errors)
            if answers in ready:
                piece = os.read(answers, nbytes - len(data))
                if not piece:
                    raise EOFError
                data += piece
        return data

    def _hear_errors(self, process: subprocess.Popen[bytes]) -> bool:
        """Take in what it has written to standard error; returns whether there may be more."""
        assert process.stderr is not None
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(process.stderr.fileno(), 1 << 16):
                self._said = (self._said + piece)[-_MAX_SAID_BYTES:]
            return False
        return True

    def _ending(self, process: subprocess.Popen[bytes]) -> str:
        """How it has ended. Raises TpimpiError where that was from outside."""
        code = process.wait()
        self._hear_errors(process)
        said = self._said.decode(errors="replace")
        self.close()
        if -code in _FROM_OUTSIDE:
            raise TpimpiError(
                f"the process in which tokenizer.json was tried was ended from outside, by {signal.Signals(-code).name}: "
                "perhaps memory is short here; end other programs, and start again"
            )
        if code == -signal.SIGXCPU:
            return f"took more than {MAX_CPU_S} s"
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith("note: ")]
        reason = f" ({shorten(lines[-1].strip(), MAX_REASON_CHARACTERS)})" if lines else ""
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return how + reason
