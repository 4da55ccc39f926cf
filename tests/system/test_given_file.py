"""Files that options name: a pipe is read to its end, and one that nobody writes to is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.errors import InputError
from tpimpi.system.given_file import open_file, read_bytes, read_text

# Writes in two parts, so that a reader finds the pipe open and empty, twice.
SLOW = "import sys, time; [time.sleep(0.3) or print(part, end='', flush=True) for part in ('a' * 99_999, 'b\\n')]"
WHOLE = b"a" * 99_999 + b"b\n"


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(path := tmp_path / "pipe", 0o600)
    return path


@pytest.mark.timeout(30)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(pipe: Path) -> None:
    began = time.monotonic()
    wanted = rf"^--x {pipe} is a pipe that nobody writes to; start what writes to it, or give the name of a file$"
    with pytest.raises(InputError, match=wanted):
        read_bytes("--x", str(pipe), 99)
    with pytest.raises(InputError, match=rf"^--x {pipe} is no file; give another$"):
        open_file("--x", str(pipe), "give another")
    assert time.monotonic() - began < 5


@pytest.mark.timeout(30)
def test_a_pipe_is_read_to_its_end(pipe: Path) -> None:
    with subprocess.Popen(f"{sys.executable} -c {SLOW!r} > {pipe}", shell=True):
        assert read_bytes("--x", str(pipe), 1 << 20) == WHOLE
    with subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None  # as of <(…)
        assert read_bytes("--x", f"/dev/fd/{process.stdout.fileno()}", 1 << 20) == WHOLE
    with (
        subprocess.Popen([sys.executable, "-c", SLOW], stdout=subprocess.PIPE) as process,
        pytest.raises(InputError, match="has over 1000 bytes"),
    ):
        assert process.stdout is not None
        read_bytes("--x", f"/dev/fd/{process.stdout.fileno()}", 1000)


def test_what_is_neither_a_file_nor_a_pipe(tmp_path: Path) -> None:
    assert read_bytes("--x", "/dev/null", 9) == b""
    with pytest.raises(InputError, match=r"^--x /dev/zero has over 9 bytes"):
        read_bytes("--x", "/dev/zero", 9)
    for place, problem in ((tmp_path, "Is a directory"), (tmp_path / "none", "No such file or directory")):
        with pytest.raises(
            InputError, match=f"^--x {re.escape(str(place))}: {problem}; give a file that rank 0 can read$"
        ):
            read_text("--x", str(place))
    for place in (tmp_path, Path("/dev/zero")):
        with pytest.raises(InputError, match=f"^--x {re.escape(str(place))} is no file; give another$"):
            open_file("--x", str(place), "give another")
    for read in (read_bytes, open_file):
        with pytest.raises(InputError, match=r"^--x 'a\\x00b': embedded null byte; "):
            read("--x", "a\0b", 9)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--session", "s", "--session-key-file"), "is a pipe that nobody writes to"),
        (("serve", "--port", "0", "--api-key-file"), "is a pipe that nobody writes to"),
        (("serve", "--port", "0", "--tls-key", "none", "--tls-cert"), "is no file; give a certificate and its key"),
        (("doctor", "--hostfile"), "is no file; give a file with a host a line"),
        (("up", "--hostfile"), "is no file; give a file with a host a line"),
        (("plan", "--shape", "llama-3.2-1b", "--routing"), "is no file; give a trace of routing"),
    ],
    ids=lambda value: str(value[-1]),
)
def test_who_is_given_such_a_pipe_says_so(
    tpimpi: Callable[..., Result], pipe: Path, arguments: tuple[str, ...], problem: str
) -> None:
    result = tpimpi(*arguments, str(pipe), cwd=pipe.parent)
    assert_one_line(result, rf"{arguments[-1]} {pipe} {problem}")
    assert os.listdir(pipe.parent) == ["pipe"]  # noqa: PTH208


def test_the_key_of_a_kept_cache_is_not_waited_for(tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "s.cache")
    result = tpimpi("--model", str(tiny), "--prompt", "x", "--session", "s", "--keep-cache", "kept", cwd=tmp_path)
    assert_one_line(result, r"--keep-cache has its key in s\.cache is no file; mend that, or give another --session")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"a" * 1025, r"has over 1024 bytes, more than is read; give a shorter file"),
        (b"secret\n\n", r"has 2 lines, must be one; write the passphrase on one line"),
        (b"one\r\ntwo\r\n", r"has 2 lines, must be one"),
        (b"\xff\xfes\x00\n", r"not UTF-8 at byte 0; save it as UTF-8"),
        (b"\xef\xbb\xbf\r\n", r"is empty; write a passphrase into it"),
    ],
    ids=["long", "two line ends", "two lines", "UTF-16", "empty"],
)
def test_what_is_no_passphrase(tpimpi: Callable[..., Result], tmp_path: Path, content: bytes, problem: str) -> None:
    (key := tmp_path / "key").write_bytes(content)
    key.chmod(0o600)
    result = tpimpi("--prompt", "x", "--session", "s", "--session-key-file", "key", cwd=tmp_path)
    assert_one_line(result, f"--session-key-file key:? {problem}")
    assert not (tmp_path / "s").exists()
