"""GGUF files that were split, as the gguf package splits them: all parts, in any order, under any name, or what is wrong."""

from __future__ import annotations

import itertools
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.sources_cases import gguf_tensors, refusal, write_tiny_gguf
from tpimpi.weights.sources import open_source

COUNT = 3  # parts: 21 tensors, 7 of them in each


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model, whole and in parts."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "whole").mkdir()
    (folder / "parts").mkdir()
    write_tiny_gguf(folder / "whole" / "m.gguf")
    write_tiny_gguf(folder / "parts" / "m.gguf", split_max_tensors=7)
    assert sorted(path.name for path in (folder / "parts").iterdir()) == [part(number) for number in (1, 2, 3)]
    return folder


@pytest.fixture
def parts(originals: Path, tmp_path: Path) -> Path:
    """The parts, which a test may spoil."""
    return Path(shutil.copytree(originals / "parts", tmp_path / "parts"))


def part(number: int, model: str = "m") -> str:
    return f"{model}-{number:05}-of-{COUNT:05}.gguf"


def same_as_whole(path: Path, originals: Path) -> None:
    with open_source(originals / "whole" / "m.gguf") as whole, open_source(path) as source:
        assert source.config == whole.config and source.tokenizer_assets() == whole.tokenizer_assets()
        assert list(source.tensors()) == list(whole.tensors())
        for name in whole.tensors():
            np.testing.assert_array_equal(source.read_blocks(name), whole.read_blocks(name))
            np.testing.assert_array_equal(source.read(name, slice(3, 9)), whole.read(name, slice(3, 9)))


def test_any_part_and_the_folder_are_the_model(parts: Path, originals: Path) -> None:
    for path in (parts, *sorted(parts.iterdir())):
        same_as_whole(path, originals)
    with open_source(parts / part(2)) as source:
        assert source.name == "m"


def test_a_first_part_without_tensors(originals: Path, tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "m.gguf", split_max_tensors=11, small_first_shard=True)
    assert len(list(tmp_path.iterdir())) == COUNT
    same_as_whole(tmp_path / part(2), originals)


@pytest.mark.parametrize("order", list(itertools.permutations([1, 2, 3]))[1:])
def test_parts_under_each_others_names(order: tuple[int, ...], parts: Path, originals: Path) -> None:
    for number in order:
        (parts / part(number)).rename(parts / f"x{number}")
    for place, number in enumerate(order, start=1):
        (parts / f"x{number}").rename(parts / part(place))
    same_as_whole(parts / part(2), originals)


def test_parts_under_other_names(parts: Path, originals: Path) -> None:
    for number, name in enumerate(("b.gguf", "c.GGUF", "a (1).gguf"), start=1):
        (parts / part(number)).rename(parts / name)
        same_as_whole(parts / name, originals)
    same_as_whole(parts, originals)
    write_tiny_gguf(parts / "other.gguf")
    same_as_whole(parts / "c.GGUF", originals)
    assert "4 .gguf files" in refusal(parts)


def test_links_into_a_cache_are_parts(parts: Path, originals: Path, tmp_path: Path) -> None:
    """In a Hugging Face cache the names of the parts are those of links; the files have none."""
    (tmp_path / "snapshot").mkdir()
    for number in (1, 2, 3):
        (parts / part(number)).rename(parts / f"{number}")
        (tmp_path / "snapshot" / part(number)).symlink_to(f"../parts/{number}")
    same_as_whole(tmp_path / "snapshot" / part(3), originals)


def test_a_part_that_is_missing_is_named(parts: Path) -> None:
    (parts / part(2)).unlink()
    for path in (parts, parts / part(1), parts / part(3)):
        assert f"and part 2, {part(2)}, cannot be found in {parts}; download" in refusal(path)
    (parts / part(1)).unlink()
    message = refusal(parts / part(3))
    assert f"is part 3 of 3, and 2 parts, {part(1)}, {part(2)}, cannot be found" in message
    (parts / part(3)).rename(parts / "renamed.gguf")
    assert "renamed.gguf: is part 3 of 3, and 2 parts" in refusal(parts)


def test_a_part_of_another_model_is_named(parts: Path, tmp_path: Path) -> None:
    tensors = gguf_tensors("qwen2")
    (tmp_path / "other").mkdir()
    write_tiny_gguf(tmp_path / "other" / "m.gguf", "qwen2", tensors, split_max_tensors=9)
    shutil.copy(tmp_path / "other" / part(2), parts)
    message = refusal(parts / part(1))
    assert f"{part(2)}: is part 2 of 3, of 27 tensors, and {part(1)} is part 1 of 3, of 21 tensors" in message
    write_tiny_gguf(parts / "whole.gguf")
    (parts / "whole.gguf").replace(parts / part(2))
    assert f"{part(2)}: is no part of a split file, and {part(1)} is part 1 of 3" in refusal(parts)


def test_a_part_twice_is_named(parts: Path) -> None:
    shutil.copy(parts / part(1), parts / part(2))
    message = refusal(parts / part(3))
    assert (
        f"{part(2)}: says that it is part 1 of 3" in message
        and f"as {part(1)} does, and part 2 is not there" in message
    )


def test_parts_cut_in_other_places_are_not_one_file(parts: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    write_tiny_gguf(tmp_path / "other" / "m.gguf", split_max_tensors=8)  # 8, 8 and 5 tensors
    shutil.copy(tmp_path / "other" / part(2), parts)
    assert f"is also in {part(2)}: the two are not parts of one file" in refusal(parts)
    shutil.copy(tmp_path / "other" / part(3), parts)
    shutil.copy(tmp_path / "other" / part(1), parts / "first")
    (parts / part(2)).unlink()
    write_tiny_gguf(tmp_path / "other" / "n.gguf", split_max_tensors=10)  # 10, 10 and 1
    shutil.copy(tmp_path / "other" / part(3, "n"), parts / part(3))
    shutil.copy(tmp_path / "other" / part(2), parts / part(2))
    assert "hold 16 tensors, and split.tensors.count is 21" in refusal(parts)


@pytest.mark.parametrize("given", [(1, 2, 3), (1, 2), (2, 3)])
def test_parts_joined_with_cat_are_refused_with_the_remedy(given: tuple[int, ...], parts: Path, tmp_path: Path) -> None:
    path = tmp_path / "joined.gguf"
    path.write_bytes(b"".join((parts / part(number)).read_bytes() for number in given))
    message = refusal(path)
    first = (parts / part(given[0])).stat().st_size
    assert f"joined with cat (the next begins at byte {first})" in message and "llama-gguf-split --merge" in message


@pytest.mark.parametrize(
    ("key", "kind", "value"), [("split.no", "<H", 3), ("split.count", "<H", 60000), ("split.tensors.count", "<i", -1)]
)
def test_parts_that_say_what_cannot_be(key: str, kind: str, value: int, parts: Path) -> None:
    path = parts / part(2)
    data = bytearray(path.read_bytes())
    struct.pack_into(kind, data, data.index(key.encode()) + len(key) + 4, value)
    path.write_bytes(data)
    assert f"{part(2)}: says that it is part" in refusal(path)


def test_a_part_cut_short_is_named(parts: Path) -> None:
    path = parts / part(2)
    path.write_bytes(path.read_bytes()[:-100])
    message = refusal(parts / part(1))
    assert message.startswith(f"{path}: tensor ") and "cut short" in message


def test_reading_holds_one_tensor_and_reads_its_part_alone(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tpimpi.weights.sources.weight_file import WeightFile

    seen: list[tuple[str, int]] = []
    plain: Callable[..., Any] = WeightFile.read

    def noted(file: WeightFile, offset: int, count: int) -> Any:
        seen.append((file.path.name, count))
        return plain(file, offset, count)

    with open_source(parts) as source:
        monkeypatch.setattr(WeightFile, "read", noted)
        for name in source.tensors():
            seen.clear()
            blocks = source.read_blocks(name)
            assert [count for _, count in seen] == [blocks.nbytes]
        source.read("layers.1.mlp.down_proj.weight")
        assert seen[-1][0] == part(3)


def test_pieces_of_a_file_are_told_from_parts(originals: Path, tmp_path: Path) -> None:
    """Cut anywhere, as by split(1), and not into files that are whole in themselves."""
    data = (originals / "whole" / "m.gguf").read_bytes()
    for names in (
        ("m.gguf.part00", "m.gguf.part01", "m.gguf.part02"),
        ("m.gguf-split-a", "m.gguf-split-b", "m.gguf-split-c"),
    ):
        for name, cut in zip(names, (data[:500], data[500:50_000], data[50_000:]), strict=True):
            (tmp_path / name).write_bytes(cut)
            assert "one of several pieces of a file: join them all, in order (cat PIECES > m.gguf)" in refusal(
                tmp_path / name
            )
        (tmp_path / names[0]).write_bytes(data[:50_000])  # the header whole, its tensors not
        assert "one of several pieces of a file" in refusal(tmp_path / names[0])
