"""Find and open all parts of a GGUF file that was split, as llama-gguf-split and Hugging Face uploads have them.

Each part is a GGUF file with the keys split.no (from 0), split.count and split.tensors.count (of all parts together); the
first has the model's metadata too. Their names end in -00001-of-00003.gguf. What counts is what the parts say of themselves:
they may have other names, or each other's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpimpi.errors import ModelError
from tpimpi.weights.sources.gguf_header import MAGIC, GgufFile, GgufTensor, alignment, read_header
from tpimpi.weights.sources.weight_file import DOWNLOAD_AGAIN, WeightFile, is_file, listed, shown

_NAME = re.compile(r"(?P<model>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)
_MAX_PARTS = 4096


@dataclass(frozen=True)
class _Split:
    """What a part says of itself: its number, from 0, and how many parts and tensors there are in all."""

    number: int
    parts: int
    tensors: int

    @property
    def whole(self) -> tuple[int, int]:
        """What all parts of a file have in common."""
        return self.parts, self.tensors

    def __str__(self) -> str:
        return f"part {self.number + 1} of {self.parts}, of {self.tensors} tensors"


def model_of(name: str) -> str:
    """The name of a model by that of its GGUF file: without .gguf, and without the number of a part."""
    match = _NAME.fullmatch(name)
    if match:
        return match["model"]
    return name[: -len(".gguf")] if name.lower().endswith(".gguf") else name


def read_parts(path: Path, files: list[WeightFile]) -> list[GgufFile]:
    """The file at `path`, or where it is part of a split file all of its parts, in order; each is appended to `files`.

    Reads headers alone. ModelError where a part is missing, or is of another model.
    """
    given = _open(path, files)
    split = _split(given)
    if split is None:
        return [given]
    parts = [given, *_others(given, split, files)]
    found = {part.file.path: _split(part) for part in parts}
    by_number: dict[int, GgufFile] = {}
    for part in parts:
        other = found[part.file.path]
        if other is None or other.whole != split.whole:
            raise ModelError(
                f"{part.file.path}: is {other or 'no part of a split file'}, and {path.name} is {split}: they are not of "
                f"one file; download both again, from the same place"
            )
        if other.number in by_number:
            missing = set(range(split.parts)) - {each.number for each in found.values() if each is not None}
            lacking = f", and part {min(missing) + 1} is not there" if missing else ""
            raise ModelError(
                f"{part.file.path}: says that it is {other} (split.no is {other.number}), as "
                f"{by_number[other.number].file.path.name} does{lacking}; keep the parts of one model in a folder of their "
                f"own, and download again what is missing"
            )
        by_number[other.number] = part
    _refuse_missing(path, split, by_number)
    return [by_number[number] for number in range(split.parts)]


def tensors_of_parts(parts: Sequence[GgufFile]) -> dict[str, tuple[GgufTensor, WeightFile]]:
    """Every tensor by its name, and the file that holds it. ModelError where one is there twice, or some are not there."""
    found: dict[str, tuple[GgufTensor, WeightFile]] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in found:
                raise ModelError(
                    f"{part.file.path}: tensor {shown(name)} is also in {found[name][1].path.name}: the two are not parts "
                    f"of one file; download both again, from the same place"
                )
            found[name] = tensor, part.file
    split = _split(parts[0])
    if split is not None and len(found) != split.tensors:
        raise ModelError(
            f"{parts[0].file.path}: its {len(parts)} parts hold {len(found)} tensors, and split.tensors.count is "
            f"{split.tensors}; they are not parts of one file, download all again, from the same place"
        )
    return found


def one_model(found: Sequence[Path]) -> Path | None:
    """The .gguf file to open of those in a folder: the only one, or one of the parts of the only model; else None.

    Files for images (mmproj) beside a model do not count.
    """
    models = [path for path in found if "mmproj" not in path.name.lower()] or list(found)
    if len({_set_of(path.name) for path in models}) == 1:
        return models[0]
    alike = set()
    for path in models:
        files: list[WeightFile] = []
        try:
            split = _split(_open(path, files))
        except ModelError:
            split = None
        finally:
            for file in files:
                file.file.close()
        if split is None:
            return None
        alike.add(split.whole)
    return models[0] if len(alike) == 1 else None


def _set_of(name: str) -> tuple[str, str]:
    match = _NAME.fullmatch(name)
    return (match["model"], match["count"]) if match else (name, "")


def _open(path: Path, files: list[WeightFile]) -> GgufFile:
    file = WeightFile(path)
    files.append(file)
    read = read_header(file)
    if _split(read) is not None:
        _refuse_joined(read)
    return read


def _split(part: GgufFile) -> _Split | None:
    """What a file says of its part; None for one that is whole."""
    values = [part.metadata.get(f"split.{key}", 0) for key in ("no", "count", "tensors.count")]
    if values[1] in (0, 1):
        return None
    number, count, tensors = values
    numbers = all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)
    if not numbers or not number < count <= _MAX_PARTS:
        raise ModelError(
            f"{part.file.path}: says that it is part {number!r} of {count!r} (split.no, from 0, and split.count), of "
            f"{tensors!r} tensors; {DOWNLOAD_AGAIN}"
        )
    return _Split(number, count, tensors)


def _others(given: GgufFile, split: _Split, files: list[WeightFile]) -> list[GgufFile]:
    """The other parts: by their names, or where names do not say it by what the files of the folder say of themselves."""
    path = given.file.path
    match = _NAME.fullmatch(path.name)
    if match and int(match["count"]) == split.parts:
        names = [
            f"{match['model']}-{number:05}-of-{split.parts:05}{path.suffix}" for number in range(1, split.parts + 1)
        ]
        parts = [
            _open(path.with_name(name), files) for name in names if name != path.name and is_file(path.with_name(name))
        ]
        if len(parts) + 1 == split.parts:
            return parts
        # Of those that are missing, some may be there under names of their own.
        rest = [other for other in listed(path.parent, ".gguf") if not _NAME.fullmatch(other.name)]
        numbers = {found.number for part in (given, *parts) if (found := _split(part)) is not None}
        return parts + [part for part, found in _fitting(rest, split, files) if found.number not in numbers]
    rest = [other for other in listed(path.parent, ".gguf") if other.name != path.name]
    return [part for part, _ in _fitting(rest, split, files)]


def _fitting(paths: Iterable[Path], split: _Split, files: list[WeightFile]) -> list[tuple[GgufFile, _Split]]:
    """Those files that say they are parts of as many parts and tensors. What cannot be read is none of them."""
    fitting = []
    for path in paths:
        before = len(files)
        try:
            part = _open(path, files)
            found = _split(part)
        except ModelError:
            found = None
        if found is not None and found.whole == split.whole:
            fitting.append((part, found))
        else:
            for file in files[before:]:
                file.file.close()
            del files[before:]
    return fitting


def _refuse_missing(path: Path, split: _Split, found: dict[int, GgufFile]) -> None:
    missing = [number for number in range(split.parts) if number not in found]
    if not missing:
        return
    match = _NAME.fullmatch(path.name)
    model = match["model"] if match else model_of(path.name)
    names = [f"{model}-{number + 1:05}-of-{split.parts:05}.gguf" for number in missing[:3]]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    what = f"part {missing[0] + 1}" if len(missing) == 1 else f"{len(missing)} parts"
    raise ModelError(
        f"{path}: is part {split.number + 1} of {split.parts}, and {what}, {', '.join(names)}{more}, cannot be found in "
        f"{path.parent}; download what is missing into this folder"
    )


def _refuse_joined(part: GgufFile) -> None:
    """Parts written one behind the other look like the first, with more behind it."""
    file = part.file
    unit = alignment(part.metadata, file.path)
    end = file.header_end + max((tensor.offset + tensor.nbytes for tensor in part.tensors.values()), default=0)
    for place in {end, -(-end // unit) * unit}:
        if place + len(MAGIC) <= file.size and file.read(place, len(MAGIC)).tobytes() == MAGIC:
            raise ModelError(
                f"{file.path}: is parts of a split GGUF file joined with cat (the next begins at byte {place}), which no "
                f"program reads; give --model the first part as it was downloaded, or join them with "
                f"llama-gguf-split --merge FIRST-PART OUT"
            )
