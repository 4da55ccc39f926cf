"""What tests of faults share."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import pytest

from tests.support.launch import TIMEOUT, Launcher, Result, run_command

# 82 MB in q8_0: enough that a token takes a while where it is streamed.
SHAPE = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


MANY = 200  # tokens; more than are made before a fault is noticed


SOME = 24


PROMPT = ("--raw", "--prompt", "1 2 3", "--ignore-eos", "--context", "256", "--quiet")


SAMPLING = ("--temperature", "1", "--seed", "7")  # so that the text tells where the smallest thing differs


BEFORE = 3  # tokens that are there when a fault comes


RANKS = [1, pytest.param(2, marks=pytest.mark.mpi)]


class Running:
    """A run whose output is read as it comes."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._deadline = time.monotonic() + TIMEOUT
        self._found = [bytearray(), bytearray()]
        streams = (self.process.stdout, self.process.stderr)
        self._threads = [
            threading.Thread(target=self._gather, args=pair, daemon=True)
            for pair in zip(streams, self._found, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _gather(self, stream: IO[bytes], into: bytearray) -> None:
        while data := os.read(stream.fileno(), 1 << 16):
            into += data

    @property
    def texts(self) -> list[str]:
        """Standard output and standard error, as far as they have come."""
        return [bytes(found).decode(errors="replace") for found in self._found]

    def wait_until(self, what: str, reached: Callable[[str, str], bool]) -> None:
        while not reached(*self.texts):
            out, err = self.texts
            if self.process.poll() is not None or time.monotonic() > self._deadline:
                pytest.fail(f"no {what}; exit code {self.process.poll()}\nstdout: {out}\nstderr: {err}")
            time.sleep(0.005)

    def finish(self, timeout: float = TIMEOUT) -> Result:
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"it did not end\nstdout: {self.texts[0]}\nstderr: {self.texts[1]}")
        for thread in self._threads:
            thread.join()
        return Result(code, *self.texts)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for thread, stream in zip(self._threads, (self.process.stdout, self.process.stderr), strict=True):
            thread.join()
            if stream is not None:
                stream.close()


class Runs:
    """Runs of the model on one number of ranks."""

    def __init__(self, launcher: Launcher | None, ranks: int, slices: Path) -> None:
        self._launcher, self.ranks, self.slices = launcher, ranks, slices
        self.victim = ranks - 1  # the rank whose file the faults befall: not the one that prints
        self._least: int | None = None
        self._text: list[str] | None = None
        self._running: list[Running] = []

    def command(self, *options: str, slices: Path | None = None, tokens: int = SOME) -> list[str]:
        arguments = ["-m", "tpimpi", "--slices", str(slices or self.slices), *PROMPT, *SAMPLING]
        arguments += ["--max-tokens", str(tokens), *options]
        return [sys.executable, *arguments] if self._launcher is None else self._launcher.command(self.ranks, arguments)

    @property
    def env(self) -> dict[str, str]:
        return {"TPIMPI_MODEL": "", **(self._launcher.env if self._launcher else {})}

    def run(self, *options: str, slices: Path | None = None, tokens: int = SOME) -> Result:
        return run_command(self.command(*options, slices=slices, tokens=tokens), env=self.env)

    def start(self, command: Sequence[str]) -> Running:
        """Begin a run; it is going on when this returns."""
        running = Running(command, self.env)
        self._running.append(running)
        running.wait_until("tokens", lambda out, err: out.count(" ") >= BEFORE)
        return running

    def end(self) -> None:
        for running in self._running:
            running.kill()
        self._running.clear()

    @property
    def least(self) -> int:
        """The smallest --memory that a run says works, in MB."""
        if self._least is None:
            result = self.run("--memory", "1M")
            match = re.search(r"this rank needs at least (\d+) MB", result.err)
            assert match, result.err
            self._least = int(match[1])
        return self._least

    @property
    def little(self) -> tuple[str, str]:
        """--memory at about the smallest that works, so that nearly everything is streamed for each token."""
        return "--memory", f"{self.least + 2}M"

    @property
    def text(self) -> list[str]:
        """The tokens of a run to which nothing happens."""
        if self._text is None:
            result = self.run(tokens=MANY)
            assert result.code == 0, result.err
            self._text = result.out.split()
            assert len(self._text) == MANY and len(set(self._text)) > MANY // 4, "it would not tell a wrong answer"
        return self._text

    def slice_of_victim(self, folder: Path) -> Path:
        return folder / f"rank-{self.victim}-of-{self.ranks}.h5"

    @property
    def who(self) -> str:
        """How the victim's line begins."""
        return "tpimpi: " if self.ranks == 1 else rf"r{self.victim} \S+: "

    def check_ended(self, result: Result, line: str) -> None:
        """It ended with one line of ours, of this pattern, and printed nothing that is wrong."""
        assert result.code != 0
        assert len(result.our_lines) == 1, result.err
        assert re.fullmatch(self.who + line, result.our_lines[0]), result.our_lines[0]
        tokens = result.out.split()
        assert BEFORE <= len(tokens) < MANY
        assert tokens == self.text[: len(tokens)]


on_one_and_two_ranks = pytest.mark.parametrize("runs", RANKS, indirect=True)


on_one_rank = pytest.mark.parametrize("runs", [1], indirect=True)
