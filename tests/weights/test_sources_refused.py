"""Model paths that are no model, or cannot be read."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.sources_cases import (
    fingerprint,
    refusal,
    write_tiny_gguf,
)
from tests.support.tiny_models import write_tiny_hf
from tpimpi.errors import ModelError
from tpimpi.weights.sources import TOKENIZER_FILES, open_source


@contextmanager
def at_once() -> Iterator[None]:
    """Fails what waits, instead of waiting with it."""

    def stop(*_: object) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_missing_model(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert refusal(path) == f"model not found: {path}; give a Hugging Face directory or a .gguf file"


def test_names_that_no_cache_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    message = refusal(Path("org/Model-1.5"))
    assert (
        f"org/Model-1.5 is neither a folder nor in the Hugging Face cache, {tmp_path}; download it (hf download"
        in message
    )
    for path in ("../x", "a/b/c/d", "org/m.gguf", "./org/name"):
        assert "model not found" in refusal(Path(path))


def test_paths_that_are_no_model(tmp_path: Path, pristine: Path) -> None:
    assert "holds no config.json and no .gguf" in refusal(tmp_path)
    assert "no GGUF file" in refusal(pristine / "config.json")
    assert "neither a directory nor a file" in refusal(Path("/dev/null"))
    assert "give a .gguf file" in refusal(pristine / "model.safetensors")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert "holds safetensors and no config.json; download" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    assert "holds an adapter" in refusal(tmp_path) and "merge it into its model" in refusal(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        write_tiny_gguf(tmp_path / name)
    assert "2 .gguf files (a.gguf, b.gguf" in refusal(tmp_path)
    (tmp_path / "b.gguf").unlink()
    with open_source(tmp_path) as source:
        assert source.path == tmp_path / "a.gguf"


def make_dangling(path: Path) -> None:
    path.symlink_to("../../blobs/gone")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


NO_FILES = [
    (Path.mkdir, "a directory"),
    (os.mkfifo, "a pipe"),
    (make_dangling, "a dangling link"),
    (make_loop, "a link that leads in a circle"),
    (lambda path: path.symlink_to("/dev/null"), "a device"),
]


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize("name", [*TOKENIZER_FILES, "model.safetensors", "model.safetensors.index.json"])
def test_what_is_there_and_no_file_does_not_count_as_absent(
    name: str, make: Callable[[Path], None], what: str, llama: Path
) -> None:
    """A download whose blobs are gone is all dangling links."""
    path = llama / name
    if name == "model.safetensors.index.json":
        (llama / "model.safetensors").unlink()
    path.unlink(missing_ok=True)
    make(path)
    with at_once(), pytest.raises(ModelError) as caught, open_source(llama) as source:
        with pytest.raises(ModelError) as again:
            source.tokenizer_assets()
        assert str(again.value).startswith(f"{path}: is {what}")
        source.fingerprint()
    assert str(caught.value) == f"{path}: is {what}, and a file is needed; download the model again"


@pytest.mark.parametrize(("make", "what"), NO_FILES)
@pytest.mark.parametrize("index", [True, False])
def test_shards_that_are_no_files(
    index: bool, make: Callable[[Path], None], what: str, pristine: Path, tmp_path: Path
) -> None:
    directory = write_tiny_hf(tmp_path / "m", "llama", max_shard_size="40KB")
    shard = min(directory.glob("*.safetensors"))
    shard.unlink()
    make(shard)
    if not index:
        (directory / "model.safetensors.index.json").unlink()
    with at_once():
        assert f"{shard}: is {what}, and a file is needed" in refusal(directory)


@pytest.mark.parametrize(("make", "what"), NO_FILES)
def test_gguf_files_that_are_no_files(make: Callable[[Path], None], what: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    make(path)
    with at_once():
        assert f"{path}: is {what}, and a file is needed" in refusal(tmp_path)
        if what == "a directory":
            assert "holds no config.json and no .gguf" in refusal(path)
        else:
            assert f"{path}: is {what}, neither a directory nor a file; give one of the two" in refusal(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 268435456\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "m.gguf", "other.gguf"])
def test_git_lfs_pointers_are_told_from_files(name: str, llama: Path) -> None:
    path = llama / name
    path.write_bytes(POINTER)
    with pytest.raises(ModelError) as caught, open_source(path if path.suffix == ".gguf" else llama) as source:
        source.tokenizer_assets()
    assert str(caught.value).startswith(f"{path}: is a Git LFS pointer") and "git lfs pull" in str(caught.value)


def test_links_to_files_are_files(llama: Path, tmp_path: Path) -> None:
    """A Hugging Face cache, whole."""
    first = fingerprint(llama)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in llama.iterdir():
        (snapshot / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(snapshot)
    assert fingerprint(tmp_path / "link") == first


@pytest.mark.parametrize("path", [Path("x" * 5000), Path("x/" * 3000), Path("a" * 300)])
def test_path_too_long(path: Path) -> None:
    message = refusal(path)
    assert "File name too long; give a shorter path" in message and len(message) < 400


@pytest.mark.parametrize("path", ["a\0b", "\0", "a\ud800"])
def test_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ModelError) as caught:
        open_source(path)
    message = str(caught.value)
    assert (
        message.isascii()
        and message.isprintable()
        and "is no path" in message
        and "give a Hugging Face directory" in message
    )


REMEDIES = [
    (errno.EACCES, "Permission denied; let your user read it"),
    (errno.EIO, "Input/output error; check its disk, or download the model again"),
    (errno.EMFILE, "Too many open files; allow more"),
    (errno.ENOENT, "No such file or directory; check its disk, or download the model again"),
]


@pytest.mark.parametrize(("number", "says"), REMEDIES)
@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "model.safetensors", "m.gguf"])
def test_unreadable_files_are_named_with_a_remedy(
    name: str, number: int, says: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = llama / name
    if name == "m.gguf":
        write_tiny_gguf(path)
    elif not path.exists():
        path.write_bytes(b"{}")
    plain = Path.open

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ModelError) as caught, open_source(path if name == "m.gguf" else llama) as source:
        source.fingerprint()
    assert str(caught.value).startswith(f"{path}: cannot be read: {says}")


@pytest.mark.parametrize("fails", range(3))
def test_gguf_header_that_the_disk_does_not_give(fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every one of the times that the file is opened: by the look at its magic, for its data, for its header."""
    path = write_tiny_gguf(tmp_path / "m.gguf")
    plain, count = Path.open, iter(range(100))

    def fail(self: Path, *args: Any, **options: Any) -> Any:
        if next(count) == fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    assert f"{path}: cannot be read: Input/output error; check its disk" in refusal(path)


def test_gguf_header_that_breaks_off_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpimpi.weights.sources.gguf_header import GgufHeader

    def fail(self: GgufHeader, count: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = write_tiny_gguf(tmp_path / "m.gguf")
    monkeypatch.setattr(GgufHeader, "take", fail)
    assert f"{path}: cannot be read: Input/output error; check its disk" in refusal(path)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, *_: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "scandir", fail)
    monkeypatch.setattr(os, "listdir", fail)
    assert f"{tmp_path}: cannot be read: Permission denied; let your user read it" in refusal(tmp_path)
