"""Files of lines that one run keeps while it works."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tpimpi.errors import InputError
from tpimpi.system import line_file as line_file_module
from tpimpi.system.line_file import LineFile


def test_a_file_is_replaced_by_one_that_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a run left that was killed while it did so goes."""
    path, forced = tmp_path / "lines", list[tuple[bytes, bytes]]()
    left = tmp_path / ".lines.partial"
    left.write_bytes(b"what another run did not end")
    fsync = os.fsync

    def force(descriptor: int) -> None:
        fsync(descriptor)
        forced.append((left.read_bytes(), path.read_bytes()))

    monkeypatch.setattr(os, "fsync", force)
    file = LineFile(path, InputError)
    file.append(b"old\n")
    file.replace(b"new\n")
    file.append(b"more\n")
    file.close()
    assert forced == [(b"new\n", b"old\n")]
    assert path.read_bytes() == b"new\nmore\n" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_replaced_meanwhile_is_one_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    try_lock = line_file_module.try_lock

    def lock(descriptor: int) -> OSError | None:
        path.unlink()
        path.write_bytes(b"new\n")
        return try_lock(descriptor)

    monkeypatch.setattr(line_file_module, "try_lock", lock)
    with pytest.raises(InputError, match="just now") as raised:
        LineFile(path, InputError)
    assert isinstance(raised.value.__cause__, BlockingIOError)
