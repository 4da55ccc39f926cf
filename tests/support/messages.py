"""What a run says when it fails; and what is in the messages between its ranks."""

from __future__ import annotations

import re

import numpy as np

from tests.support.launch import Result


def assert_one_line(result: Result, pattern: str, code: int = 2) -> None:
    """Exactly one line of ours, with the exit code, and nothing that looks like a crash."""
    assert len(result.our_lines) == 1, result.err
    assert re.search(pattern, result.our_lines[0]), result.our_lines[0]
    assert result.code == code, (result.code, result.err)
    assert "Traceback" not in result.err
    assert result.out == ""


def patterns_in(searched: bytes, patterns: list[tuple[str, bytes]]) -> list[str]:
    """Which of the (name, bytes) are in `searched`: the names, in their order.

    Each pattern is looked for by 4 of its bytes, those with the fewest zeros: only few places have them. To search for
    hundreds of patterns one by one takes a minute.
    """
    anchors: dict[int, list[tuple[str, bytes, int]]] = {}
    found = {what for what, pattern in patterns if len(pattern) < 4 and pattern in searched}
    for what, pattern in patterns:
        if len(pattern) < 4:
            continue
        at = min(range(len(pattern) - 3), key=lambda start: pattern[start : start + 4].count(0))
        anchors.setdefault(int.from_bytes(pattern[at : at + 4], "little"), []).append((what, pattern, at))
    ordered = np.array(sorted(anchors), "<u4")
    for offset in range(min(4, len(searched) - 3) if anchors else 0):
        words = np.frombuffer(searched, "<u4", (len(searched) - offset) // 4, offset)
        nearest = ordered[np.searchsorted(ordered, words).clip(max=len(ordered) - 1)]
        for place in np.flatnonzero(nearest == words).tolist():
            for what, pattern, at in anchors[int(words[place])]:
                start = offset + 4 * place - at
                if start >= 0 and searched.startswith(pattern, start):
                    found.add(what)
    return [what for what, _ in patterns if what in found]
