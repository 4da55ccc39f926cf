"""The notes by which ranks make slices together (see distribute)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tpimpi.star.control import Note, TaskNote

TASK = "distribute slices"


class DistributeSlices(TaskNote, frozen=True, tag=TASK):
    """Hub: look at what you have of your slice of this model; the reply is SliceFound. `config` and `formats` are what
    ModelConfig and ModelFormats make of themselves, `weights` the shares of the partition."""

    model: str
    fingerprint: str
    config: dict[str, Any]
    formats: dict[str, Any]
    weights: list[int | float]
    folder: str | None
    cache_name: str | None
    verify: bool


class SliceFound(Note, frozen=True):
    """What there is of the sender's slice: the fields of LocalSlice of that name. Sizes in bytes."""

    host: str
    folder: str
    elsewhere: str  # where it could lie instead
    tiles: int
    good: bool
    complaint: str
    needed: int
    free: int
    device: int
    to_look: int
    here: int
    broken: int


class CheckTiles(Note, frozen=True):
    """Hub: check your tiles, for a moment at a time, and answer each time with TilesFound; where `prepare` is false all
    slices are good."""

    prepare: bool


class TilesFound(Note, frozen=True):
    """What the sender looked at so far, and once it is `ready`, what it found: runs of tiles that are missing, [first,
    behind the last]."""

    looked: int
    found: SliceFound | None = None
    missing: Sequence[tuple[int, int]] = ()

    @property
    def ready(self) -> bool:
        return self.found is not None


class ContinueCheck(Note, frozen=True):
    """Hub: whether ranks go on checking tiles."""

    more: bool
