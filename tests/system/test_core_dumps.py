"""A process that crashes leaves nothing of its memory behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.support.launch import run_command

CRASH = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))
from tpimpi.system.core_dumps import turn_off_core_dumps
turn_off_core_dumps()
print(*resource.getrlimit(resource.RLIMIT_CORE), open("/proc/self/coredump_filter").read(), flush=True)
os.abort()
"""


@pytest.mark.parametrize("wanted", ["0", "1"])
def test_no_core_is_left(tmp_path: Path, wanted: str) -> None:
    """Where a traceback is wanted it is, if the kernel writes it into a file here at all."""
    done = run_command([sys.executable, "-c", CRASH], cwd=tmp_path, env={"TPIMPI_TRACEBACK": wanted})
    assert done.code == -6, done.err
    soft, hard, mask = done.out.split()
    if wanted == "0":
        assert soft == hard and int(hard) in (0, 1) and int(mask, 16) == 0
        assert list(tmp_path.iterdir()) == []
        return
    if soft == "0" or "/" in (pattern := Path("/proc/sys/kernel/core_pattern").read_text()) or pattern[0] == "|":
        pytest.skip("this machine writes no core into the folder of a process")
    assert len(list(tmp_path.iterdir())) == 1, "the test would not see one"
