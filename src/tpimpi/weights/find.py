"""Which slices there are on the ranks' hosts."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpimpi.errors import TpimpiError
from tpimpi.star import Star
from tpimpi.star.control import encode_note
from tpimpi.weights.locations import cache_folder
from tpimpi.weights.slices.file import SliceFile, slice_name


def hidden_of_slices(folder: str, ranks: int) -> int:
    """The hidden size of the model whose slices for so many ranks are there; 0 where they cannot be read."""
    with (
        contextlib.suppress(TpimpiError),
        contextlib.closing(SliceFile(Path(folder) / slice_name(0, ranks))) as file,
    ):
        return file.header.config.hidden
    return 0


def find_slices(star: Star, prefix: str, suffix: str) -> list[str]:
    """Rank 0: the shares, as they stand in the names of cache folders between `prefix` and `suffix`, of which every rank has
    its slice."""
    star.broadcast_note(encode_note(task="find-slices", prefix=prefix, suffix=suffix))
    notes = [
        json.loads(note)["shares"] for note in star.gather_notes(encode_note(shares=_shares(star, prefix, suffix)))
    ]
    return sorted(set(notes[0]).intersection(*notes[1:]))


def tell_slices(star: Star, note: Mapping[str, Any]) -> None:
    """Another rank's side of `find_slices`."""
    star.gather_notes(encode_note(shares=_shares(star, note["prefix"], note["suffix"])))


def _shares(star: Star, prefix: str, suffix: str) -> list[str]:
    name = slice_name(star.rank.index, star.rank.size)
    try:
        folders = [path.name for path in cache_folder().iterdir() if (path / name).is_file()]
    except OSError:
        return []
    found = [folder for folder in folders if folder.startswith(prefix) and folder.endswith(suffix)]
    return [folder[len(prefix) : len(folder) - len(suffix)] for folder in found]
