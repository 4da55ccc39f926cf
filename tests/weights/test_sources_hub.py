"""Models in a Hugging Face cache, laid out as huggingface_hub lays it out: by name, and by each of its folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.sources_cases import fingerprint, refusal, write_tiny_gguf
from tpimpi.errors import ModelError
from tpimpi.weights.sources import open_source

OLD, NEW = "a" * 40, "b" * 40  # commits
NAME = "Some-Org/Tiny-Llama-3.1-8B"


def cached(hub: Path, name: str, files: Path, commit: str = NEW, main: str | None = NEW) -> Path:
    """Put files into a cache, as links from a snapshot to blobs. Returns the model's folder."""
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for number, file in enumerate(sorted(files.iterdir())):
        blob = folder / "blobs" / f"{commit[:8]}{number}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
    if main is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(main)
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that the environment names."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "home" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return folder


def test_huggingface_hub_has_it_in_the_same_place(hub: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle is huggingface_hub: what it finds without a network is what we open."""
    file_download = pytest.importorskip("huggingface_hub.file_download")
    folder = cached(hub, NAME, pristine, main=NEW)
    theirs = file_download.try_to_load_from_cache(NAME, "config.json", cache_dir=hub)
    assert Path(theirs) == folder / "snapshots" / NEW / "config.json"


def test_a_name_and_every_folder_of_the_cache_is_the_model(hub: Path, pristine: Path) -> None:
    first = fingerprint(pristine)
    folder = cached(hub, NAME, pristine)
    for given in (NAME, folder, folder / "snapshots", folder / "snapshots" / NEW):
        with open_source(given) as source:
            assert (source.name, source.fingerprint()) == ("Tiny-Llama-3.1-8B", first)
            assert np.isfinite(source.read("norm.weight")).all()


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HOME"])
def test_where_the_cache_is(
    variable: str, hub: Path, pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    root = tmp_path / "place"
    inside = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    cached(root / inside.get(variable, "."), NAME, pristine)
    monkeypatch.setenv(variable, str(root))
    assert fingerprint(Path(NAME)) == fingerprint(pristine)


def test_main_is_the_snapshot_that_is_taken(hub: Path, pristine: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    write_tiny_gguf(tmp_path / "old" / "old.gguf")
    folder = cached(hub, NAME, tmp_path / "old", OLD, main=None)
    with open_source(NAME) as source:  # the only one there is
        assert source.name == "old"
    cached(hub, NAME, pristine, NEW, main=None)
    message = refusal(Path(NAME))
    assert "holds 2 snapshots" in message and OLD in message and f"give --model {folder / 'snapshots' / OLD}" in message
    (folder / "refs").mkdir()
    for text, found in (
        (NEW, True),
        (f"{OLD}\n", True),
        ("", False),
        ("../../x", False),
        ("c" * 40, False),
        ("\0", False),
    ):
        (folder / "refs" / "main").write_text(text)
        if found:
            assert fingerprint(Path(NAME)) == fingerprint(folder / "snapshots" / text.strip())
        else:
            assert "holds 2 snapshots" in refusal(Path(NAME))


def test_files_of_a_cached_model_by_name(hub: Path, tmp_path: Path) -> None:
    """Repositories of GGUF files hold several of a model."""
    files = tmp_path / "files"
    files.mkdir()
    for name in ("m-Q8_0.gguf", "m-F16.gguf"):
        write_tiny_gguf(files / name)
    cached(hub, NAME, files)
    assert "2 .gguf files (m-F16.gguf, m-Q8_0.gguf" in refusal(Path(NAME))
    with open_source(f"{NAME}/m-Q8_0.gguf") as source:
        assert source.name == "m-Q8_0"
    assert f"{NAME}/m-Q4_0.gguf" in refusal(Path(f"{NAME}/m-Q4_0.gguf"))


def test_a_folder_of_that_name_goes_first(hub: Path, pristine: Path, tmp_path: Path) -> None:
    cached(hub, NAME, pristine)
    (tmp_path / NAME).mkdir(parents=True)
    write_tiny_gguf(tmp_path / NAME / "mine.gguf")
    with open_source(NAME) as source:
        assert source.name == "mine"


def test_a_whole_cache_is_named_with_what_it_holds(hub: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (NAME, "b/c", "gpt2"):
        cached(hub, name, pristine)
    for root in (hub, hub.parent):
        message = refusal(root)
        assert "is a Hugging Face cache, of 3 models" in message and NAME in message and "gpt2" in message
        assert f"give --model {hub}/models--Some-Org--Tiny-Llama-3.1-8B, or {NAME}" in message
    monkeypatch.setenv("HF_HOME", "/elsewhere")
    assert refusal(hub).endswith(f"give --model {hub}/models--Some-Org--Tiny-Llama-3.1-8B")


def test_a_download_that_broke_off(hub: Path, pristine: Path) -> None:
    folder = cached(hub, NAME, pristine)
    snapshot = folder / "snapshots" / NEW
    blob = (snapshot / "model.safetensors").resolve()
    blob.rename(blob.with_name(f"{blob.name}.incomplete"))
    assert f"{snapshot / 'model.safetensors'}: is a dangling link" in refusal(Path(NAME))
    for path in snapshot.iterdir():
        path.unlink()
    assert "holds no config.json and no .gguf" in refusal(Path(NAME))
    snapshot.rmdir()
    assert "holds no snapshot of the model; download it again" in refusal(Path(NAME))
    with pytest.raises(ModelError, match="holds no snapshot"):
        open_source(folder / "snapshots")
