"""A rank's engine: what it holds for a run of one model (slice, window, model, cache), and the memory that this takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tpimpi.compute.backends import load_backend
from tpimpi.engine.model import Model, block_order
from tpimpi.engine.trace import Recorder
from tpimpi.engine.window import DEFAULT_READS, Window, records_of
from tpimpi.errors import SliceError
from tpimpi.models.kv.cache import cache_bytes, kv_dtype
from tpimpi.star import Star
from tpimpi.system.direct_io import Trial
from tpimpi.weights.locations import SliceLocation
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header

CONTEXT = 2048  # positions that memory is planned for where nobody says how many there will be


@dataclass(frozen=True)
class EngineConfig:
    """What rank 0 tells every rank. `folder` is where the slices are, or None: the cache folder `cache_name` of each host.

    `memory` is what each rank may take, in bytes, None for auto; `window` a number of blocks, or "all", instead; None
    where `memory` says. `cores_shared_by[r]` is the number of ranks on the host of rank r that use the same cores. An
    empty `fingerprint`, `format` or `shares` is whatever the slices have.
    """

    folder: str | None
    cache_name: str | None
    fingerprint: str
    shares: str
    format: str
    backend: str
    threads: int | None
    allreduce: str  # a rule: see star.parse_rule
    timeout: float
    cores_shared_by: list[int]
    memory: list[int] | None = None
    window: int | str | None = None
    kv: str = "auto"  # one of KV_FORMATS
    wire: str = "f32"  # one of WIRES
    trace: bool = False  # record what is done when
    logits_of: int = 1  # positions whose logits rank 0 holds at once

    def slice_path(self, rank: int, ranks: int) -> Path:
        return SliceLocation(self.folder, self.cache_name).path(rank, ranks)


def usual_threads(cores: int, shared_by: int) -> int:
    """How many threads a rank computes with, of so many cores that so many ranks use, where nobody says."""
    return max(1, cores // shared_by)


def identity(header: Header) -> dict[str, str]:
    """What the slices of a run have in common."""
    return {"fingerprint": header.fingerprint, "format": header.formats.key(), "shares": header.partition.describe()}


class Engine:
    """What one rank holds for a run. Raises SliceError where its slice is not the one that the settings want.

    `allot_memory` (of all the engines that a rank has) is to be called before the model is used.
    """

    model: Model
    window: Window
    recorder: Recorder | None = None
    trial: Trial | None = None  # where something will be streamed
    reads = DEFAULT_READS

    def __init__(self, star: Star, settings: EngineConfig) -> None:
        self.star, self.settings = star, settings
        path = settings.slice_path(star.rank.index, star.rank.size)
        self.file = SliceFile(path)
        try:
            self.header = self.file.header
            self._check(path, settings)
            neighbours = settings.cores_shared_by[star.rank.index]
            threads = settings.threads or usual_threads(len(os.sched_getaffinity(0)), neighbours)
            self.backend = load_backend(settings.backend, threads)
            self.resident = self.file.load(self.file.records_of("resident")[0]).parts
            self.order = block_order(self.header)
            self.records = records_of(self.file, self.order)
            if settings.trace:
                self.recorder = Recorder()
        except BaseException:
            self.file.close()
            raise

    def _check(self, path: Path, settings: EngineConfig) -> None:
        rank, size, header = self.star.rank.index, self.star.rank.size, self.header
        if (header.rank, header.partition.ranks) != (rank, size):
            raise SliceError(
                f"slice file {path} is of rank {header.rank} of {header.partition.ranks}, needed is rank {rank} of {size}; "
                f"make slices for {size} ranks with: python -m tpimpi slice --ranks {size} --out DIR"
            )
        wanted = {"fingerprint": settings.fingerprint, "format": settings.format, "shares": settings.shares}
        for name, value in identity(header).items():
            if wanted[name] and wanted[name] != value:
                what = {
                    "fingerprint": "it is of another model: choose its --slices, or leave --slices out",
                    "format": "leave --format out, or make slices in that format",
                    "shares": "leave --shares out, or make slices with those",
                }[name]
                raise SliceError(f"slice file {path} has {name} {value}, this run needs {wanted[name]}; {what}")

    def cache_bytes(self, context: int) -> int:
        """Memory of the keys and values of so many positions."""
        dtype = kv_dtype(self.settings.kv, (fmt for layer in self.header.formats.layers for fmt in layer))
        config = self.header.config
        return cache_bytes(config.layers, self.header.share.kv_heads.size, context, config.head_dim, dtype)

    @property
    def tile_bytes(self) -> int:
        """Memory of all tiles that a token goes through."""
        return sum(record.nbytes for record in self.records)

    def start(self, pinned: int | None, ring: int | None, blocks: int | None, make_room: Callable[[int], None]) -> None:
        """Start reading; see Window and Model for the parameters."""
        self.window = Window(
            self.file,
            self.order,
            pinned_bytes=pinned,
            ring=ring,
            blocks=blocks,
            reads=self.reads,
            recorder=self.recorder,
        )
        self.model = Model(
            *(self.header, self.resident, self.window, self.star, self.backend, self.settings.kv),
            make_room=make_room,
            recorder=self.recorder,
        )

    def close(self) -> None:
        if hasattr(self, "window"):
            self.window.close()
        self.file.close()
