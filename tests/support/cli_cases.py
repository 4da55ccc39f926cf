"""What tests of cli share."""

from __future__ import annotations

import sys
import time
from pathlib import Path

PROMPT = ["--prompt", "the quick brown fox"]


def _assert_gone(mark: str) -> None:
    """The launcher may end before its last rank does, but soon there is none with this argument."""
    deadline = time.monotonic() + 20
    while (left := _with_argument(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"ranks are left: {left}"


def _with_argument(mark: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def slicing(model: Path, out: Path, *options: str) -> list[str]:
    """The command that slices a model for two ranks."""
    program = [sys.executable, "-m", "tpimpi", "slice"]
    return [*program, "--model", str(model), "--ranks", "2", "--out", str(out), *options]
