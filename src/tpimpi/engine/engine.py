"""A rank's seat: what it holds for a run of one model (slice, window, model, cache), and the memory that this takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tpimpi.compute.backends import load_backend, load_quantizer
from tpimpi.engine.memory_guard import Keeper
from tpimpi.engine.model import Model, block_order, work_bytes
from tpimpi.engine.trace import RankTrace, Recorder
from tpimpi.engine.window import DEFAULT_READS, FEWEST_TILES, USUAL_TILES, Window, records_of, ring_bytes
from tpimpi.errors import InputError, SliceError
from tpimpi.models.kv.cache import cache_bytes, kv_dtype
from tpimpi.serving.report import RankFigures, disk_lines, peak_rss_bytes
from tpimpi.serving.text.tokenizer import TokenIds, Tokenizer, tokenizer_of_slices
from tpimpi.star import Star, Wire
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.direct_io import MEASURED, PIECE, Trial
from tpimpi.system.memory import RESERVE, Budget, Needs, make_budget, resident_bytes, show_size
from tpimpi.weights.slices.file import SliceFile, slice_name
from tpimpi.weights.slices.header import Header

MEASURING = 0.4  # seconds for which all ranks read at once, to find what the disk gives
CONTEXT = 2048  # positions that memory is planned for where nobody says how many there will be


@dataclass(frozen=True)
class Settings:
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
        folder = Path(self.folder) if self.folder is not None else cache_folder() / str(self.cache_name)
        return folder / slice_name(rank, ranks)


def cache_folder() -> Path:
    """Where slices that a run makes by itself are kept, on this host: $TPIMPI_CACHE, or the user's cache folder.

    Raises InputError where TPIMPI_CACHE cannot be a folder.
    """
    if chosen := os.environ.get("TPIMPI_CACHE"):
        try:
            folder = Path(chosen).expanduser()
        except RuntimeError as error:
            raise InputError(f"TPIMPI_CACHE is {chosen[:80]!r}: no such user; give the path of a folder") from error
        for there in (folder, *folder.parents):
            if there.is_file():
                raise InputError(f"TPIMPI_CACHE is {chosen!r}, but {there} is a file; give the path of a folder")
        return folder
    import platformdirs

    return platformdirs.user_cache_path("tpimpi")


def usual_threads(cores: int, shared_by: int) -> int:
    """How many threads a rank computes with, of so many cores that so many ranks use, where nobody says."""
    return max(1, cores // shared_by)


def wire_of(fmt: str) -> Wire:
    """The wire that `--wire` names."""
    return Wire(fmt, load_quantizer(1)) if fmt == "q8_0" else Wire(fmt)


def identity(header: Header) -> dict[str, str]:
    """What the slices of a run have in common."""
    return {"fingerprint": header.fingerprint, "format": header.formats.key(), "shares": header.plan.describe()}


class Seat:
    """What one rank holds for a run. Raises SliceError where its slice is not the one that the settings want.

    `furnish` (of all the seats that a rank has) is to be called before the model is used.
    """

    tokenizer: Tokenizer | TokenIds | None = None
    tokenizer_bytes = 0  # memory that it takes
    model: Model
    window: Window
    recorder: Recorder | None = None
    trial: Trial | None = None  # where something will be streamed
    reads = DEFAULT_READS

    def __init__(self, star: Star, settings: Settings, *, with_tokenizer: bool = False) -> None:
        self.star, self.settings = star, settings
        path = settings.slice_path(star.rank.index, star.rank.size)
        self.file = SliceFile(path)
        try:
            self.header = self.file.header
            self._check(path, settings)
            star.timeout, star.algorithm, star.wire = settings.timeout, settings.allreduce, wire_of(settings.wire)
            neighbours = settings.cores_shared_by[star.rank.index]
            threads = settings.threads or usual_threads(len(os.sched_getaffinity(0)), neighbours)
            self.backend = load_backend(settings.backend, threads)
            if with_tokenizer:
                self.tokenizer = self._load_tokenizer()
            self.resident = self.file.load(self.file.records_of("resident")[0]).parts
            self.order = block_order(self.header)
            self.records = records_of(self.file, self.order)
            if settings.trace:
                self.recorder = Recorder()
        except BaseException:
            self.file.close()
            raise

    def _check(self, path: Path, settings: Settings) -> None:
        rank, size, header = self.star.rank.index, self.star.rank.size, self.header
        if (header.rank, header.plan.ranks) != (rank, size):
            raise SliceError(
                f"slice file {path} is of rank {header.rank} of {header.plan.ranks}, needed is rank {rank} of {size}; "
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

    def _load_tokenizer(self) -> Tokenizer | TokenIds:
        """The tokenizer that rank 0's slice carries; what memory it takes is noted, so nothing else may be loading now."""
        before = resident_bytes()
        tokenizer = tokenizer_of_slices(self.file.tokenizer_assets(), self.header.config.vocab)
        self.tokenizer_bytes = max(0, resident_bytes() - before)
        return tokenizer

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


@dataclass(frozen=True)
class Furnished:
    """What a rank's memory buys, as it tells rank 0: in bytes, but for `reads` in flight and a rate in bytes a second."""

    rank: int
    host: str
    promise: int | None  # of --memory, or what auto found; None where --window decides
    base: int
    cache: int
    work: int  # with the reserve
    buffers: int
    pinned: int
    streamed: int  # for each token
    reads: int
    disk_bytes_per_s: float  # while the others measured too; 0 where nothing is streamed
    device: int  # st_dev of the slice
    direct: bool  # reads go past the page cache
    most_context: int | None  # positions that the memory has room for, at most


class RankMemory:
    """All the seats of a rank, and the memory that they share: planned, taken, and kept within its bounds."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self.seats = list(seats)
        self.star, self.settings = seats[0].star, seats[0].settings
        self._base = resident_bytes()
        self._promise: int | None = None
        self._budget: Budget | None = None
        self._needs: Needs
        self._watched_by = self._context = self._rings = 0
        self.furnished: Furnished | None = None
        self.keeper: Keeper | None = None

    def needs(self, context: int) -> Needs:
        """What this rank needs to hold `context` positions of each model."""
        seats, logits_of = self.seats, self.settings.logits_of
        everywhere = {"all_partials": self.settings.allreduce.endswith("exchange")}  # also of long sums
        work = [work_bytes(s.header, s.records, s.backend.name, context, logits_of, **everywhere) for s in seats]
        return Needs(
            base=self._base,
            cache=sum(seat.cache_bytes(context) for seat in seats),
            work=max(work) + sum(seat.recorder.most_bytes for seat in seats if seat.recorder is not None),
            least_buffers=sum(ring_bytes(seat.records, FEWEST_TILES) for seat in seats),
            usual_buffers=sum(ring_bytes(seat.records, USUAL_TILES) for seat in seats),
            tiles=sum(seat.tile_bytes for seat in seats),
        )

    def plan(self, context: int, promise: int | None, watched_by: int) -> None:
        """Find out what `promise` bytes buy for `context` positions, and how many reads in flight the disk wants.

        `promise` is None where --window decides. `watched_by` is how many ranks of ours look after the host's free memory
        (--memory auto), 0 where none does. Raises InputError where the promise is too small.
        """
        self._needs = needs = self.needs(context)
        self._promise, self._context, self._watched_by = promise, context, watched_by
        if promise is not None:
            whose = f"--memory {'auto finds' if watched_by else 'is'} {show_size(promise)}"
            self._budget = make_budget(needs, promise, whose)
        for seat in self.seats:
            if self._streams(seat):
                seat.trial = trial = seat.file.trial(seat.records)
                seat.reads = seat.file.measure(partial(trial.depth, self._trial_buffer()))

    def _streams(self, seat: Seat) -> bool:
        blocks = isinstance(self.settings.window, int) and self.settings.window < len(seat.order)
        return blocks or (self._budget is not None and self._budget.pinned < self._needs.tiles)

    def _trial_buffer(self) -> Bytes:
        """Memory to measure with, not more than will be needed anyway."""
        room = self._needs.least_buffers if self._budget is None else self._budget.buffers
        return aligned_buffer(max(PIECE, min(MEASURED, room)))

    def furnish(self) -> Furnished:
        """Measure what the disk gives, while the other ranks do, and start reading for good."""
        needs, rates = self._needs, [0.0]
        for seat in self.seats:
            if seat.trial is not None:
                rates.append(seat.file.measure(partial(seat.trial.rate, self._trial_buffer(), seat.reads, MEASURING)))
        for seat in self.seats:
            self._open(seat)
        self._rings = sum(seat.window.ring_bytes for seat in self.seats)
        self.keeper = Keeper(
            [seat.window for seat in self.seats],
            promise=None if self._watched_by else self._promise,
            shared_by=self._watched_by,
            stalled=self._say,
            waiting=self._waiting_for_a_row,
        )
        if self._watched_by:
            self.keeper.plan(needs.tiles)  # if other programs end, there may be room for more
        per_position, room = sum(seat.cache_bytes(1) for seat in self.seats), None
        if self._promise is not None and per_position:
            room = (self._promise - needs.fixed - self._rings + needs.cache) // per_position
        file = self.seats[0].file
        self.furnished = Furnished(
            rank=self.star.rank.index,
            host=self.star.rank.host,
            promise=self._promise,
            base=needs.base,
            cache=needs.cache,
            work=needs.work + RESERVE,
            buffers=self._rings if any(map(self._streams, self.seats)) else 0,
            pinned=sum(seat.window.wanted_bytes for seat in self.seats),
            streamed=sum(seat.window.streamed_bytes for seat in self.seats),
            reads=max(seat.reads for seat in self.seats),
            disk_bytes_per_s=max(rates),
            device=file.device,
            direct=file.direct,
            most_context=room,
        )
        return self.furnished

    def _open(self, seat: Seat) -> None:
        """Start the window of one seat, with its part of the budget."""
        needs, window = self._needs, self.settings.window
        pinned, ring = None, None
        if self._budget is not None:
            pinned = self._budget.pinned * seat.tile_bytes // max(1, needs.tiles)
            least = ring_bytes(seat.records, FEWEST_TILES)
            ring = max(least, self._budget.buffers * least // max(1, needs.least_buffers))
        seat.start(pinned, ring, window if isinstance(window, int) else None, self.make_room)

    def make_room(self, context: int) -> None:
        """A longer sequence than was planned for begins: fewer tiles can be pinned. InputError where that is not enough."""
        if self._promise is None or context <= self._context or self.keeper is None:
            return
        self._context = context
        left = self._promise - self.needs(context).fixed - self._rings
        if left < 0:
            raise InputError(
                f"{context} positions need {show_size(-left)} more than the {show_size(self._promise)} of --memory; "
                "give more, or a smaller --context"
            )
        self.keeper.plan(left)

    def _say(self, line: str) -> None:
        rank = self.star.rank
        where = str(rank) if rank.size > 1 else "tpimpi"
        print(f"{where}: {line} ({self.seats[0].file.path})", file=sys.stderr, flush=True)

    def _waiting_for_a_row(self) -> tuple[float, str] | None:
        return next((seat.file.waiting for seat in self.seats if seat.file.waiting), None)

    @property
    def points(self) -> list[list[float]]:
        """The timeline: [time.monotonic(), resident, pinned, buffers]."""
        return [] if self.keeper is None else self.keeper.timeline.points

    def figures(self) -> list[RankFigures]:
        """What each seat did. Memory is the whole rank's."""
        peak = peak_rss_bytes()
        tokenizer = sum(seat.tokenizer_bytes for seat in self.seats)
        weights = sum(seat.window.most_bytes for seat in self.seats)
        caches = [seat.model.cache for seat in self.seats]
        cache = sum(cache.filled_bytes for cache in caches if cache is not None)
        began = self.points[0][0] if self.points else 0.0
        assert self.furnished is not None
        return [
            RankFigures(
                rank=self.star.rank.index,
                host=self.star.rank.host,
                heads=seat.header.share.heads.size,
                kv_heads=seat.header.share.kv_heads.size,
                columns=seat.header.share.columns.size,
                memory_bytes=self._promise,
                peak_rss_bytes=peak,
                weights_bytes=weights,
                cache_bytes=cache,
                tokenizer_bytes=tokenizer,
                base_bytes=peak - weights - cache - tokenizer,
                pinned_bytes=seat.window.pinned_bytes,
                buffer_bytes=seat.window.buffer_bytes,
                streamed_bytes_per_token=seat.window.streamed_bytes,
                device=self.furnished.device,
                disk_bytes_per_s=self.furnished.disk_bytes_per_s,
                bytes_read=seat.window.bytes_read,
                read_wait_s=seat.window.wait_seconds,
                compute_s=seat.model.compute_seconds,
                star_s=self.star.seconds,
                timeline=[[round(t - began, 3), *rest] for t, *rest in self.points],
            )
            for seat in self.seats
        ]

    def trace(self) -> RankTrace:
        """What was recorded; the clock's offset is for rank 0 to fill in."""
        recorder = self.seats[0].recorder or Recorder(0)
        rank = self.star.rank
        return RankTrace(rank.index, rank.host, 0.0, recorder.pack(), self.points, recorder.dropped)

    def close(self) -> None:
        """Stop, and give all memory back."""
        if self.keeper is not None:
            self.keeper.close()
        for seat in self.seats:
            seat.close()


def print_memory(ranks: Sequence[Furnished], *, always: bool) -> None:
    """A table on stderr of what each rank's memory buys; unless `always`, only where something is streamed."""
    from rich.console import Console
    from rich.table import Table

    if not always and not any(rank.streamed for rank in ranks):
        return
    table = Table(box=None, pad_edge=False, header_style="none")
    table.add_column("rank host")
    for name in ("memory", "program", "cache", "work", "buffers", "pinned", "streamed a token"):
        table.add_column(name, justify="right")
    for r in ranks:
        sizes = (r.base, r.cache, r.work, r.buffers, r.pinned, r.streamed)
        promise = "-" if r.promise is None else show_size(r.promise)
        table.add_row(f"r{r.rank} {r.host}", promise, *map(show_size, sizes))
    console = Console(file=sys.stderr, width=140, highlight=False, color_system=None)
    console.print(table)
    for line in disk_lines([(r.host, r.device, r.streamed, r.disk_bytes_per_s) for r in ranks], alone=True):
        print(f"expected: {line}", file=sys.stderr)
    if any(rank.streamed and not rank.direct for rank in ranks):
        names = ", ".join(f"r{rank.rank} {rank.host}" for rank in ranks if not rank.direct)
        print(f"{names}: this file system has no O_DIRECT, so reads go through the page cache, slower", file=sys.stderr)
    sys.stderr.flush()
