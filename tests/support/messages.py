"""What a run says when it fails."""

from __future__ import annotations

import re

from tests.support.launch import Result


def assert_one_line(result: Result, pattern: str, code: int = 2) -> None:
    """Exactly one line of ours, with the exit code, and nothing that looks like a crash."""
    assert len(result.our_lines) == 1, result.err
    assert re.search(pattern, result.our_lines[0]), result.our_lines[0]
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    assert result.out == ""
