"""What tests of session share."""

from __future__ import annotations

from pathlib import Path


def cut(path: Path, lines: int) -> None:
    """As if the run had been killed when so many lines, and half of one, were written."""
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole[:lines]) + whole[lines][:-5])
