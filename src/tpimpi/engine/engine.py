"""A rank's engine: what it holds for a run of one model (slice, window, model).

It is made in two steps: `OpenedEngine` is the slice, open and checked, with which memory can be planned; `Engine` has a
window that reads the tiles, and the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import load_backend
from tpimpi.engine.budget import Needs
from tpimpi.engine.cycle import records_of
from tpimpi.engine.eviction import ExpertKey
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.experts import Experts
from tpimpi.engine.model import Model, block_order
from tpimpi.engine.needs import needs_of_model
from tpimpi.engine.overlap import default_chunk
from tpimpi.engine.page_files import PageFiles
from tpimpi.engine.readers import Readers
from tpimpi.engine.trace import Recorder
from tpimpi.engine.window import Window
from tpimpi.errors import InputError, SliceError
from tpimpi.star import Rank, Star
from tpimpi.weights.cache import mark_used
from tpimpi.weights.locations import SliceLocation
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header

if TYPE_CHECKING:
    from tpimpi.weights.copies import TileCopies  # which other ranks than 0 do without, and what reads models

SEQUENCE_BYTES = 400_000  # of each sequence on rank 0: its ids and text, and the tables in which drafts are looked up
DEFAULT_CONTEXT = 2048  # positions that memory is planned for where no option or prompt says how many


@dataclass(frozen=True)
class EngineConfig:
    """What rank 0 tells every rank. `folder` is where the slices are, or None: the cache folder `cache_name` of each host.

    `memory` is what each rank may take, in bytes, None for auto; `window` 2 blocks or more, or "all", instead; None
    where `memory` says. `cores_shared_by[r]` is the number of ranks on the host of rank r that use the same cores. An
    empty `fingerprint`, `format` (see ModelFormats.key) or `shares` (see Partition.describe) is whatever the slices have.
    """

    folder: str | None
    cache_name: str | None
    fingerprint: str
    shares: str
    format: str
    backend: str  # one of BACKEND_NAMES
    threads: int | None  # None: as default_threads says
    allreduce: str  # a rule: see star.parse_rule
    timeout: float  # seconds
    cores_shared_by: list[int]
    memory: list[int] | None = None
    window: int | str | None = None
    kv_format: str = "auto"  # one of KV_FORMATS
    wire: str = "f32"  # one of WIRES
    trace: bool = False  # record what is done when
    chunk_logits: bool = False  # rank 0 computes the logits of a whole chunk at once, else of one position
    chunk: int | None = None  # positions of a prompt computed at once; None: as default_chunk and chunk.py say
    predict: int | None = None  # experts of a layer that are read before they are chosen; None: as many as a token uses
    kernels: str = "auto"  # or one of KERNEL_LEVELS
    draft: int | None = 0  # tokens of a draft at most, of which rank 0 has all logits; None: as many as memory says
    keep_cache: str | None = None  # the folder where each rank keeps a session's keys and values between runs
    audit: float | None = 0.0  # the part of the steps of which a sum is audited; None: as many as take little time
    parallel: int = 1  # sequences that are answered at once: rank 0 has the logits of so many positions

    def slice_path(self, rank: int, ranks: int) -> Path:
        return SliceLocation(self.folder, self.cache_name).path(rank, ranks)


def default_threads(cores: int, shared_by: int) -> int:
    """How many threads a rank computes with, of so many cores that so many ranks use, where nobody says."""
    return max(1, cores // shared_by)


def identity(header: Header) -> dict[str, str]:
    """What the slices of a run have in common."""
    return {"fingerprint": header.fingerprint, "format": header.formats.key(), "shares": header.partition.describe()}


class OpenedEngine:
    """A rank's slice, open and checked, and the backend that computes with it. `start` makes an engine of it.

    Raises SliceError where the slice is not the one that the settings want, InputError where an option cannot be had here
    (--backend, --kernels, --threads, --keep-cache, --allreduce), ImportError without the torch that --backend names.
    """

    def __init__(self, star: Star, settings: EngineConfig) -> None:
        self.star, self.settings = star, settings
        path = settings.slice_path(star.rank.index, star.rank.size)
        self.file = SliceFile(path)
        try:
            self.header = self.file.header
            _check_slice(self.header, path, star.rank, settings)
            mark_used(path)
            neighbours = settings.cores_shared_by[star.rank.index]
            threads = settings.threads or default_threads(len(os.sched_getaffinity(0)), neighbours)
            self.backend = load_backend(settings.backend, threads, settings.kernels)
            self.resident = self.file.load(self.file.records_of("resident")[0]).parts
            self.order = block_order(self.header)
            self.records = records_of(self.file, self.order)
            self.expert_records = {
                ExpertKey(record.block.layer, record.expert): record for record in self.file.records_of("experts")
            }
            self.recorder = Recorder() if settings.trace else None
            self.page_files = None
            if settings.keep_cache is not None:
                self.page_files = PageFiles.open(settings.keep_cache, star.rank.index, identity(self.header))
            # Positions of a prompt that are computed at once; rank 0 may say another number before memory is planned.
            self.chunk = settings.chunk or default_chunk(self.header.config)
            self.copies: TileCopies | None = None  # rank 0: of other ranks' tiles, to audit what they compute
        except BaseException:
            self.file.close()
            raise

    @property
    def tile_bytes(self) -> int:
        """Memory of all tiles that a token goes through."""
        return sum(record.nbytes for record in self.records)

    @property
    def chunk_follows_memory(self) -> bool:
        """Whether `chunk` is to be what mixture_chunk says."""
        settings = self.settings
        return bool(self.header.config.experts) and settings.chunk is None and not settings.chunk_logits

    def needs(self, base: int, context: int) -> Needs:
        """What this rank needs for `context` positions, if it has `base` bytes resident without."""
        parallel = self.settings.parallel
        needs = needs_of_model(
            self.header,
            self.records,
            tiles=self.tile_bytes,
            base=base,
            backend=self.backend.name,
            kv_format=self.settings.kv_format,
            allreduce=self.settings.allreduce,
            context=context,
            chunk=max(self.chunk, parallel + 1),  # a step has a row of each, and of a prompt
            logit_rows=self.chunk if self.settings.chunk_logits else parallel,
            experts=[record for key, record in self.expert_records.items() if key.expert == 0],
            expert_count=len(self.expert_records),
            draft=self.settings.draft,
        )
        if self.star.rank.is_hub and parallel > 1:
            needs = replace(needs, work=needs.work + parallel * SEQUENCE_BYTES)
        return replace(needs, work=needs.work + self._audit_bytes())

    def _audit_bytes(self) -> int:
        """Memory of an audit: a tile that is not pinned, or on rank 0 a copy of another rank's."""
        if not self.audits or (self.star.rank.is_hub and self.copies is None):
            return 0
        largest = max((record.nbytes for record in (*self.records, *self.expert_records.values())), default=0)
        return largest + (0 if self.copies is None else self.copies.work_bytes)

    @property
    def audits(self) -> bool:
        """Whether sums are audited."""
        return self.settings.audit != 0 and self.star.rank.size > 1

    def open_experts(self, *, nbytes: int | None, readers: Readers) -> ExpertCache:
        """The cache of the experts that there are; see ExpertCache for the parameters."""
        block_index = {block.layer: place for place, block in enumerate(self.order) if block.kind == "mlp"}
        return ExpertCache(
            *(self.file, self.expert_records),
            nbytes=nbytes,
            readers=readers,
            recorder=self.recorder,
            block_index=block_index,
        )

    def open_window(self, *, pinned: int | None, ring: int | None, blocks: int | None, readers: Readers) -> Window:
        """Start to read the tiles; see Window for the parameters."""
        return Window(
            self.file,
            self.order,
            readers,
            pinned_bytes=pinned,
            ring=ring,
            blocks=blocks,
            recorder=self.recorder,
        )

    def start(self, window: Window, experts: ExpertCache, make_room: Callable[[int, int], None]) -> Engine:
        """The engine whose tiles come from `window` and `experts`; see Model for `make_room`."""
        config = self.header.config
        model = Model(
            *(self.header, self.resident, window, self.star, self.backend, self.settings.kv_format),
            experts=Experts(config, self.resident, experts, self.backend) if config.experts else None,
            make_room=make_room,
            recorder=self.recorder,
            chunk=self.chunk,
            predict=config.experts_per_token if self.settings.predict is None else self.settings.predict,
        )
        if self.audits and self.star.rank.is_hub:
            from tpimpi.engine.auditor import Auditor  # which other ranks do without

            model.auditor = Auditor(model, self.header, self.copies, self.settings.audit)
        return Engine(self, window, experts, model)

    def close(self) -> None:
        self.file.close()
        if self.copies is not None:
            self.copies.close()


@dataclass(frozen=True)
class Engine:
    """What one rank holds for a run of one model: its slice, the window that reads its tiles, and the model."""

    opened: OpenedEngine
    window: Window
    expert_cache: ExpertCache
    model: Model

    def embed(self, ids: Iterable[int]) -> F32:
        """Rank 0: the hidden vectors that ids begin with, f32 [len(ids), hidden]."""
        rows = self.opened.file.embedding_rows(ids)
        scale = self.opened.header.config.embedding_scale
        return rows if scale == 1 else rows * np.float32(scale)

    def close(self) -> None:
        """Stop reading, and give the tiles' memory back."""
        self.window.close()
        self.expert_cache.close()
        self.opened.close()


def _check_slice(header: Header, path: Path, rank: Rank, settings: EngineConfig) -> None:
    if header.config.experts and "library" in settings.allreduce:
        raise InputError(
            "--allreduce is library, whose sums may differ in a bit from rank to rank, so that ranks would choose different "
            "experts; give another --allreduce with a mixture of experts"
        )
    if (header.rank, header.partition.ranks) != (rank.index, rank.size):
        raise SliceError(
            f"slice file {path} is of rank {header.rank} of {header.partition.ranks}, needed is rank {rank.index} of "
            f"{rank.size}; make slices for {rank.size} ranks with: python -m tpimpi slice --ranks {rank.size} --out DIR"
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
