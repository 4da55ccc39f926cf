"""The slices in the cache folder: what is listed, when they were last used, and what is removed."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tpimpi.errors import InputError
from tpimpi.weights.cache import list_cache, remove_slices
from tpimpi.weights.locations import cache_name
from tpimpi.weights.make import choose_formats, slice_model
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.slices.writer import partial_path
from tpimpi.weights.sources import open_source


@pytest.fixture
def folder(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with two sets of slices, a folder that is none of ours, and a lock."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("TPIMPI_CACHE", str(folder))
    with open_source(tiny) as source:
        for shares, form in (([1.0], "q8_0"), ([3.0, 1.0], "f32")):
            formats, partition = choose_formats(source, form), make_partition(source.config, shares)
            slice_model(source, partition, formats, folder / cache_name(source, partition, formats))
    (folder / "notes").mkdir()
    (folder / "notes" / "mine.txt").write_text("mine")
    (folder / "some.lock").touch()
    return folder


def test_the_list(folder: Path) -> None:
    old, new = sorted(path for path in folder.iterdir() if (path / slice_name(0, 2)).exists() or "q8_0" in path.name)
    if "q8_0" not in old.name:
        old, new = new, old
    os.utime(old, (1e9, 1e9))
    (new / slice_name(1, 2)).unlink()
    first, second = list_cache(folder)
    assert (first.name, first.ranks, first.shares, first.format, first.slices) == (new.name, 2, "3,1", "f32", 1)
    assert (second.name, second.ranks, second.shares, second.format, second.slices) == (old.name, 1, "1", "q8_0", 1)
    assert (second.model, second.last_used, second.problem) == ("tiny", 1e9, "")
    assert second.nbytes == (old / slice_name(0, 1)).stat().st_blocks * 512
    (old / slice_name(0, 1)).write_bytes(b"no HDF5")
    assert "broken" in next(slices.problem for slices in list_cache(folder) if slices.name == old.name)
    assert list_cache(folder / "nowhere") == []


def test_only_slices_are_removed(folder: Path) -> None:
    names = [slices.name for slices in list_cache(folder)]
    for wrong in ("../cache", "notes", "", "nowhere", f"{names[0]}/"):
        with pytest.raises(InputError, match="there are no slices named"):
            remove_slices(folder, [names[0], wrong])
    assert len(list_cache(folder)) == 2
    lock = os.open(folder / f"{names[0]}.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another tpimpi is slicing into"):
        remove_slices(folder, names[:1])
    os.close(lock)
    remove_slices(folder, names)
    assert sorted(path.name for path in folder.iterdir()) == ["notes", "some.lock"]


def test_a_slice_that_a_rank_is_writing_is_not_removed(folder: Path) -> None:
    """Only rank 0 locks the file beside the folder; another rank has nothing but the lock of its own unfinished slice."""
    first, second = (folder / slices.name for slices in list_cache(folder))
    partial = partial_path(second / slice_name(2, 3))
    partial.write_bytes(b"some tiles")
    lock = os.open(partial, os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match=f"another tpimpi is slicing into {second}"):
        remove_slices(folder, [first.name, second.name])
    assert sorted(folder.rglob("*")) == before, "something was removed, or a lock was left"
    os.close(lock)
    assert remove_slices(folder, [first.name, second.name]) == []
    assert list_cache(folder) == []


def test_links_are_not_of_the_cache(folder: Path, tmp_path: Path) -> None:
    one, other = (slices.name for slices in list_cache(folder))
    (folder / one).rename(tmp_path / "slices")
    (folder / "link").symlink_to(tmp_path / "slices")
    there = sorted((tmp_path / "slices").iterdir())
    assert [slices.name for slices in list_cache(folder)] == [other]
    with pytest.raises(InputError, match="there are no slices named 'link'"):
        remove_slices(folder, [other, "link"])
    remove_slices(folder, [other])
    assert sorted((tmp_path / "slices").iterdir()) == there
    assert sorted(path.name for path in folder.iterdir()) == ["link", "notes", "some.lock"]


def test_what_else_is_in_a_folder_stays_and_the_others_go(folder: Path, tpimpi: Callable[..., Result]) -> None:
    one, other = (slices.name for slices in list_cache(folder))
    (folder / one / "mine.txt").write_text("mine")
    result = tpimpi("cache", "--remove", one, other, "--yes", env={"TPIMPI_CACHE": str(folder)})
    assert result.code == 0, result.err
    assert f"{folder / one} stays, as there is something besides slices in it" in result.err
    assert [path.name for path in (folder / one).iterdir()] == ["mine.txt"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([one, "notes", "some.lock"])
    assert list_cache(folder) == []


def test_the_command(folder: Path, tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path) -> None:
    """One after the other: list, use, refuse without a terminal, remove what is old, remove by name."""
    env = {"TPIMPI_CACHE": str(folder)}
    names = {slices.format: slices.name for slices in list_cache(folder)}
    for name in names.values():
        os.utime(folder / name, (time.time() - 40 * 86400,) * 2)
    run = tpimpi("--model", str(tiny), "--format", "q8_0", "--prompt", "hi", "--max-tokens", "1", "--quiet", env=env)
    assert run.code == 0, run.err
    listed = tpimpi("cache", "--json", str(tmp_path / "cache.json"), env=env)
    assert listed.code == 0, listed.err
    assert all(name in listed.out for name in names.values())
    found = json.loads((tmp_path / "cache.json").read_text())
    used = {slices["name"]: slices["last_used"] for slices in found["slices"]}
    assert used[names["q8_0"]] > time.time() - 3600 > used[names["f32"]], "a run says when it uses slices"
    refused = tpimpi("cache", "--older-than", "30d", env=env)
    assert (refused.code, len(list_cache(folder))) == (2, 2)
    assert "there is no terminal to ask on" in refused.err
    assert tpimpi("cache", "--older-than", "30d", "--yes", env=env).code == 0
    assert [slices.name for slices in list_cache(folder)] == [names["q8_0"]]
    shown = tpimpi("inspect", str(folder), env=env)
    assert shown.code == 0, shown.err
    assert "python -m tpimpi cache" in shown.out
    assert tpimpi("cache", "--remove", names["q8_0"], "--yes", env=env).code == 0
    assert list_cache(folder) == []


@pytest.mark.parametrize("given", ["30", "d", "1y", "-3d", "30 d"])
def test_an_age_that_is_none(tpimpi: Callable[..., Result], given: str) -> None:
    result = tpimpi("cache", f"--older-than={given}")
    assert result.code == 2
    assert "must be a number of hours, days or weeks" in result.err
