"""Which slices there are on the ranks' hosts."""

from __future__ import annotations

import contextlib
from pathlib import Path

from tpimpi.errors import TpimpiError
from tpimpi.star import Star
from tpimpi.star.control import Note, Task, TaskNote, gather_notes, send_note
from tpimpi.weights.locations import cache_folder
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.names import slice_name


def hidden_of_slices(folder: str, ranks: int) -> int:
    """The hidden size of the model whose slices for so many ranks are there; 0 where they cannot be read."""
    header = header_of_slices(folder, ranks)
    return 0 if header is None else header.config.hidden


def header_of_slices(folder: str, ranks: int) -> Header | None:
    """The header of rank 0's slice, of so many ranks' slices that are there; None where it cannot be read."""
    with (
        contextlib.suppress(TpimpiError),
        contextlib.closing(SliceFile(Path(folder) / slice_name(0, ranks))) as file,
    ):
        return file.header
    return None


class FindSlices(TaskNote, frozen=True, tag="find-slices"):
    """Hub: say of which cache folders between this prefix and this suffix you have your slice."""

    prefix: str
    suffix: str


class FoundSlices(Note, frozen=True):
    """What stands between prefix and suffix in the names of those folders."""

    shares: list[str]


def find_slices(star: Star, prefix: str, suffix: str) -> list[str]:
    """Rank 0: the shares, as they stand in the names of cache folders between `prefix` and `suffix`, of which every rank has
    its slice."""
    send_note(star, FindSlices(prefix, suffix))
    found = [note.shares for note in gather_notes(star, FoundSlices(_shares(star, prefix, suffix)))]
    return sorted(set(found[0]).intersection(*found[1:]))


def tell_slices(star: Star, task: Task) -> None:
    """Another rank's side of `find_slices`."""
    note = task.note(FindSlices)
    gather_notes(star, FoundSlices(_shares(star, note.prefix, note.suffix)))


def _shares(star: Star, prefix: str, suffix: str) -> list[str]:
    name = slice_name(star.rank.index, star.rank.size)
    try:
        folders = [path.name for path in cache_folder().iterdir() if (path / name).is_file()]
    except OSError:
        return []
    found = [folder for folder in folders if folder.startswith(prefix) and folder.endswith(suffix)]
    return [folder[len(prefix) : len(folder) - len(suffix)] for folder in found]
