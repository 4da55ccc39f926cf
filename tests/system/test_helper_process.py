"""The process in which things are tried, beside what tests of tokenizers and grammars say of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tpimpi.system.helper_process import EndedError, HelperProcess

MODULE = "tpimpi.serving.grammar_process"
REQUEST = b"\x93\xa1?\x90\x01"  # MessagePack of ["?", [], 1]: a grammar that is none
# A Python that begins as such a process once, and has then been idle for too long.
IDLE_AT_FIRST = """#!{python}
import os, struct, sys
if not os.path.exists({marker!r}):
    open({marker!r}, "w").close()
    os.write(1, struct.pack("<Q", 0))
    sys.exit()
os.execv({python!r}, [{python!r}, *sys.argv[1:]])
"""


def test_it_ends_with_its_standard_input() -> None:
    trial = HelperProcess(MODULE)
    assert trial.say(REQUEST, 60) and trial.hear(max_cpu_s=1, max_wait_s=60) == b""
    process = trial._process
    assert process is not None and process.stdin is not None
    assert os.getsid(process.pid) == process.pid, "a signal to our group is none to it"
    process.stdin.close()
    assert process.wait(60) == 0
    trial.close()


def test_it_ends_when_nothing_is_asked() -> None:
    program = "from tpimpi.system.helper_process import serve; serve(lambda request: '', idle_s=0.01)"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # whose input stays open
        assert process.stdout is not None and process.stdout.read() == bytes(8)
        assert process.wait(60) == 0


def test_where_it_was_idle_another_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "python"
    path.write_text(IDLE_AT_FIRST.format(python=sys.executable, marker=str(tmp_path / "marker")))
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    with contextlib.closing(HelperProcess(MODULE)) as trial:
        first = trial._start(60)
        assert first is not None and first.wait(60) == 0
        assert trial.say(REQUEST, 60) and trial.hear(max_cpu_s=1, max_wait_s=60) == b""


def test_what_it_cannot_read_ends_it() -> None:
    with contextlib.closing(HelperProcess(MODULE)) as trial:
        assert trial.say(b"\xc1", 60)
        with pytest.raises(EndedError, match=r"ended with exit code 1 .*Decode"):
            trial.hear(max_cpu_s=1, max_wait_s=60)
