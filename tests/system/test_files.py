"""Files that are written whole or not at all, for whom they are written, and locks."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from pathlib import Path

import pytest

from tpimpi.errors import StorageError
from tpimpi.system.files import locked_file, replacing, try_lock, whole_file, write_json


@pytest.mark.parametrize("there", [False, True])
def test_a_private_file_is_its_owners_whatever_the_umask(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "report.json"
    if there:
        path.write_text("{}")
        path.chmod(0o644)
    before = os.umask(0)
    try:
        write_json(path, {"text": "mine"}, private=True)
        with replacing(tmp_path / "trace.json", "--trace", private=True) as file:
            file.write(b"{}")
        write_json(tmp_path / "public.json", {}, "--json")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "trace.json").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "public.json").stat().st_mode) == 0o666
    assert path.read_text() == '{\n "text": "mine"\n}\n'


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), whole_file(path) as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208
    with (
        pytest.raises(
            StorageError, match=r"cannot write .*/nowhere/file: No such file or directory; choose another --x"
        ),
        replacing(tmp_path / "nowhere" / "file", "--x"),
    ):
        pass


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path, waits = tmp_path / "lock", threading.Event()
    with locked_file(path, waits.set) as problem:
        assert problem is None
        assert not waits.is_set()
        got: list[OSError | None] = []

        def wait() -> None:
            with locked_file(path, waits.set) as other:
                got.append(other)

        thread = threading.Thread(target=wait)
        thread.start()
        assert waits.wait(10)
        assert got == []
    thread.join(10)
    assert got == [None]


def test_a_lock_file_that_was_removed_meanwhile_locks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked_file(path, lambda: None):
        thread_has = threading.Event()

        def wait() -> None:
            with locked_file(path, path.unlink):
                if path.exists():
                    thread_has.set()

        thread = threading.Thread(target=wait)
        thread.start()
    thread.join(10)
    assert thread_has.is_set()


def test_where_there_are_no_locks_the_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked_file(tmp_path / "lock", lambda: pytest.fail("it waits")) as problem:
        assert problem is not None
        assert problem.errno == errno.ENOSYS
        descriptor = os.open(tmp_path, os.O_RDONLY)
        assert try_lock(descriptor) is not None
        os.close(descriptor)
