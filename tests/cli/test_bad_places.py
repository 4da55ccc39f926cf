"""Places for slices that are none: what stands there is named, and stays."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import Result
from tests.support.messages import assert_one_line
from tpimpi.diagnostics.bench.disk import find_files
from tpimpi.diagnostics.inspect import inspect
from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.weights.cache import list_cache, remove_slices
from tpimpi.weights.make import choose_formats, make_header
from tpimpi.weights.slices.local import is_good
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.partition import make_partition
from tpimpi.weights.sources import open_source


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of each kind of thing that is no folder, one, by its name in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    os.mkfifo("fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("gone")
    Path("device").symlink_to("/dev/null")
    return ["file", "fifo", "socket", "loop", "dangling", "device"]


def test_a_place_that_is_no_folder(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, places: list[str]
) -> None:
    before = sorted(os.listdir())  # noqa: PTH208
    sliced = ["slice", "--model", str(tiny), "--ranks", "1", "--out"]
    synthesized = ["synth", "--shape", str(tiny / "config.json"), "--ranks", "1", "--out"]
    for number, place in enumerate(places):
        for command in (sliced, synthesized)[: 1 + (number == 0)]:
            result = tpimpi(*command, place, "--quiet", cwd=tmp_path)
            assert_one_line(result, f"--out {place} is there and is no folder; give another name, or remove it")
    result = tpimpi(*sliced, "file/in/it", "--quiet", cwd=tmp_path)
    assert_one_line(result, "--out file is there and is no folder, so file/in/it cannot be made")
    assert sorted(os.listdir()) == before  # noqa: PTH208
    for place in places[1:]:
        path = str(tmp_path / place)
        result = tpimpi("cache", env={"TPIMPI_CACHE": path})
        assert_one_line(result, f"TPIMPI_CACHE {path} is there and is no folder")
    result = tpimpi("cache", env={"TPIMPI_CACHE": f"/tmp/{'x' * 300}"})
    assert_one_line(result, "TPIMPI_CACHE …x*: File name too long; give a shorter path|TPIMPI_CACHE .*x: File name too")


@pytest.mark.parametrize("content", ["mine", b"\x89HDF\r\n\x1a\n" + bytes(2000)], ids=["text", "HDF5"])
def test_a_foreign_file_named_as_a_slice_stays(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path, content: str | bytes
) -> None:
    data = content.encode() if isinstance(content, str) else content
    path = tmp_path / slice_name(0, 1)
    path.write_bytes(data)
    result = tpimpi("slice", "--model", str(tiny), "--ranks", "1", "--out", str(tmp_path), "--quiet")
    assert_one_line(result, "rank-0-of-1.h5 is there and is no slice of tpimpi; choose another --out, or remove it")
    assert path.read_bytes() == data
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def test_a_slice_of_ours_that_is_broken_is_made_again(
    tpimpi: Callable[..., Result], tiny: Path, tmp_path: Path
) -> None:
    command = ("slice", "--model", str(tiny), "--ranks", "1", "--out", str(tmp_path), "--quiet")
    assert tpimpi(*command).code == 0
    path = tmp_path / slice_name(0, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    (tmp_path / slice_name(0, 2)).symlink_to(slice_name(0, 2))  # a loop beside it is in nobody's way
    result = tpimpi(*command)
    assert result.code == 0, result.err
    assert path.stat().st_size == len(whole)


# One entry that cannot be used beside others


def test_one_broken_set_is_listed_beside_the_others(
    tpimpi: Callable[..., Result], two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    (folder / "loop").mkdir(parents=True)
    (folder / "dangling").mkdir()
    (folder / "unfinished").mkdir()
    (folder / "loop" / slice_name(0, 1)).symlink_to(slice_name(0, 1))
    (folder / "dangling" / slice_name(0, 1)).symlink_to("gone")
    (folder / "unfinished" / f".{slice_name(0, 1)}.partial").mkdir()  # a folder: no slice at all
    two.rename(folder / "whole")
    (folder / "loop.lock").mkdir()
    monkeypatch.setenv("TPIMPI_CACHE", str(folder))
    found = {slices.name: slices for slices in list_cache(folder)}
    assert set(found) == {"loop", "dangling", "whole"}
    assert found["whole"].ranks == 2 and found["whole"].problem == ""
    assert found["loop"].slices == found["dangling"].slices == 1
    assert "symbolic links" in found["loop"].problem and "is missing" in found["dangling"].problem
    inspect(folder, verify=False)
    with pytest.raises(StorageError, match=r"cannot remove .*loop\.lock: Is a directory; remove it by hand"):
        remove_slices(folder, ["loop"])
    (folder / "loop.lock").rmdir()
    for name in ("loop", "dangling"):
        assert remove_slices(folder, [name]) == []
    with pytest.raises(InputError, match="there are no slices named 'unfinished'"):
        remove_slices(folder, ["unfinished"])
    assert sorted(path.name for path in folder.iterdir()) == ["unfinished", "whole"]
    assert tpimpi("cache", env={"TPIMPI_CACHE": str(folder)}).code == 0


def test_a_folder_that_cannot_be_searched_is_listed_as_broken(
    two: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names can be read, and no file in it can be looked at; simulated, as root may look at everything."""
    stat, lstat = Path.stat, Path.lstat

    def refused(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(path: Path, **options: bool) -> os.stat_result:
            if path.parent == two:
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, **options)

        return looked

    monkeypatch.setattr(Path, "stat", refused(stat))
    monkeypatch.setattr(Path, "lstat", refused(lstat))
    (found,) = list_cache(two.parent)
    assert (found.slices, found.ranks, found.nbytes) == (2, 0, 0)
    assert "Permission denied" in found.problem
    with open_source(tiny) as source:
        header = make_header(source, make_partition(source.config, [1, 1]), 0, choose_formats(source, "f32"))
    with pytest.raises(SliceError, match=r"rank-0-of-2\.h5 cannot be read: Permission denied; let this user read it"):
        is_good(two / slice_name(0, 2), header)


def test_links_to_nowhere_are_not_read_to_measure_a_disk(two: Path, tmp_path: Path) -> None:
    (two / slice_name(0, 3)).symlink_to("gone")
    assert [path.name for path in find_files(two, 3)] == [slice_name(0, 2), slice_name(1, 2)]
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / slice_name(0, 1)).symlink_to("gone")
    with pytest.raises(InputError, match="links has no slices in it"):
        find_files(tmp_path / "links", 1)
