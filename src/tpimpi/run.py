"""One run, from joining the star to the report: rank 0 decides and speaks, the others follow.

The order of a run: every rank says who it is (host, version); rank 0 settles options, model and slices and tells the
others what they need (never the prompt); every rank opens its slice and says whether it can; then rank 0 generates and
the others follow; at the end each rank gives its figures. Whatever is wrong before generation begins is said once, by
rank 0; after that, by the rank that it befalls, which ends the job.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from tpimpi import __version__
from tpimpi.backends import NOT_INSTALLED, has_native, load_backend
from tpimpi.errors import InputError, SliceError, TpimpiError, as_ours
from tpimpi.generate import Sampler, follow, generate, to_text, until_stop
from tpimpi.model import Model, block_order
from tpimpi.model_formats import ModelFormats
from tpimpi.plan import Plan
from tpimpi.report import Answer, RankFigures, Report, peak_rss_bytes
from tpimpi.slicefile import SliceFile, slice_name
from tpimpi.sliceheader import FORMAT_VERSION, Header
from tpimpi.sources import Source
from tpimpi.star import FINISH, Star
from tpimpi.tokenizer import Tokenizer, load_tokenizer
from tpimpi.window import SMALLEST_WINDOW, Window

LONGEST_NAME = 40  # characters of a model's name, and of the shares, in the name of its cache folder


@dataclass(frozen=True)
class Settings:
    """What rank 0 tells every rank. `folder` is where the slices are, or None: the cache folder `cache_name` of each host.

    `window` is a number of blocks, "all", or "auto": all of them if they fit. `cores_shared_by[r]` is the number of ranks
    on the host of rank r that use the same cores. An empty `fingerprint`, `format` or `shares` is whatever the slices have.
    """

    folder: str | None
    cache_name: str | None
    fingerprint: str
    shares: str
    format: str
    backend: str
    window: int | str
    threads: int | None
    allreduce: str
    timeout: float
    cores_shared_by: list[int]
    kv: str = "auto"  # one of KV_FORMATS
    models: int = 1  # held in memory at the same time

    def slice_path(self, rank: int, ranks: int) -> Path:
        folder = Path(self.folder) if self.folder is not None else cache_folder() / str(self.cache_name)
        return folder / slice_name(rank, ranks)


class Stopped(Exception):  # noqa: N818  (not an error of this rank)
    """Rank 0 ended the run before it began; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


def cache_folder() -> Path:
    """Where slices that a run makes by itself are kept, on this host: $TPIMPI_CACHE, or the user's cache folder."""
    if chosen := os.environ.get("TPIMPI_CACHE"):
        return Path(chosen).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("tpimpi")


def cache_name(source: Source, plan: Plan, formats: ModelFormats) -> str:
    """Folder, within the cache folder, of the slices of this model for this plan in these formats."""
    shares = plan.describe().replace(",", "-")
    if len(shares) > LONGEST_NAME:
        shares = f"{plan.ranks}-ranks-{xxhash.xxh3_64_hexdigest(shares.encode())}"
    name = f"{source.path.stem[:LONGEST_NAME]}-{source.fingerprint()[:12]}"
    return f"{name}-{formats.key()}-{shares}-v{FORMAT_VERSION}"


# Agreeing


def _note(**values: Any) -> bytes:
    return json.dumps(values).encode()


@dataclass(frozen=True)
class Guest:
    """What a rank says of itself: its host, the cores it may use, how many that host has, whether it has native kernels."""

    host: str
    cores: frozenset[int]
    host_cores: int
    native: bool

    def shares_cores_with(self, other: Guest) -> bool:
        return self.host == other.host and bool(self.cores & other.cores)


def greet(star: Star) -> list[Guest]:
    """Every rank says who it is. Rank 0 gets them in rank order; raises InputError where versions differ."""
    cores = sorted(os.sched_getaffinity(0))
    about = {"cores": cores, "host_cores": os.cpu_count() or 1, "native": has_native()}
    notes = star.collect(_note(version=__version__, host=star.rank.host, **about))
    guests = []
    for rank, note in enumerate(notes):
        hello = json.loads(note)
        if hello["version"] != __version__:
            raise InputError(
                f"rank {rank} on {hello['host']} runs tpimpi {hello['version']}, rank 0 runs {__version__}; "
                "install the same version on every host"
            )
        guests.append(Guest(hello["host"], frozenset(hello["cores"]), hello["host_cores"], hello["native"]))
    return guests


def bound_to_one_core(guests: Sequence[Guest]) -> str | None:
    """What to tell a user whose launcher gave some ranks a single core each, of several; None where it did not."""
    bound = [f"r{rank} {guest.host}" for rank, guest in enumerate(guests) if len(guest.cores) == 1 < guest.host_cores]
    if not bound:
        return None
    return (
        f"{', '.join(bound)}: bound to one core by the launcher, which computing and reading then share; "
        "mpirun --bind-to none frees all of them"
    )


def without_native(guests: Sequence[Guest]) -> str | None:
    """What to tell a user of --backend auto where some ranks have no native kernels; None where all do."""
    without = [f"r{rank} {guest.host}" for rank, guest in enumerate(guests) if not guest.native]
    slow = "computing with torch, which is slow with quantized weights (--format f32 helps, and takes more memory)"
    return f"{', '.join(without)}: {NOT_INSTALLED}; {slow}" if without else None


@contextmanager
def stopping_others(star: Star) -> Iterator[None]:
    """Rank 0: if what is inside fails, the other ranks, which wait for a note, end with the same exit code."""
    try:
        yield
    except BaseException as error:
        code = as_ours(error).exit_code if isinstance(error, Exception) else 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        star.tell(_note(stop=code))
        raise


def settle(star: Star, settings: Settings, *, with_tokenizer: bool = True) -> Seat:
    """Rank 0: tell the others the settings, open our slice, and hear whether every rank could open its own.

    The seat has the slice's tokenizer unless another seat has it already.
    """
    star.tell(_note(settings=asdict(settings)))
    seat: Seat | None = None
    problem: TpimpiError | None = None
    try:
        seat = Seat(star, settings, with_tokenizer=with_tokenizer)
    except Exception as error:
        problem = as_ours(error)
    notes = [json.loads(note) for note in star.collect(_note())]
    try:
        if problem is not None:
            raise problem
        for rank, note in enumerate(notes):
            if "error" in note:
                problem = (InputError if note["code"] == InputError.exit_code else TpimpiError)(note["error"])
                problem.where = f"r{rank} {note['host']}"
                raise problem
        assert seat is not None
        for rank, note in enumerate(notes[1:], start=1):
            _check_alike(seat.header, rank, note)
    except BaseException:
        if seat is not None:
            seat.close()
        raise
    return seat


def go(star: Star) -> None:
    """Rank 0: all is well; from now on the others follow."""
    star.tell(_note(go=True))


def finish(star: Star, seats: Sequence[Seat]) -> list[list[RankFigures]]:
    """Rank 0: end the run on every rank. For each seat the figures of every rank, in rank order."""
    star.command(FINISH)
    names = {field.name for field in fields(RankFigures)}
    figures = []
    for seat in seats:
        notes = star.collect(json.dumps(asdict(seat.figures())).encode())
        values = [json.loads(note) for note in notes]
        figures.append([RankFigures(**{name: value[name] for name in names}) for value in values])
        seat.close()
    return figures


def _identity(header: Header) -> dict[str, str]:
    """What the slices of a run have in common."""
    return {"fingerprint": header.fingerprint, "format": header.formats.key(), "shares": header.plan.describe()}


def _check_alike(header: Header, rank: int, note: dict[str, Any]) -> None:
    for name, value in _identity(header).items():
        if note[name] != value:
            raise SliceError(
                f"the slice of rank {rank} on {note['host']} has {name} {note[name]}, rank 0's has {value}; "
                "use slices that were made together"
            )


def take_part(star: Star) -> None:
    """Ranks other than 0: the whole run, with a seat for each model that rank 0 settles (a run has one).

    Raises Stopped where rank 0 called it off.
    """
    greet(star)
    with ExitStack() as stack:
        seats: list[Seat] = []
        while "settings" in (note := _heard(star)):
            seats.append(stack.enter_context(closing(_take_seat(star, Settings(**note["settings"])))))
        follow([seat.model for seat in seats], star)
        for seat in seats:
            star.collect(json.dumps(asdict(seat.figures())).encode())


def _take_seat(star: Star, settings: Settings) -> Seat:
    """Open our slice, and tell rank 0 whether we could."""
    try:
        seat = Seat(star, settings)
    except Exception as error:
        ours = as_ours(error)
        star.collect(_note(error=str(ours), code=ours.exit_code, host=star.rank.host))
        _heard(star)  # raises Stopped
        raise
    star.collect(_note(host=star.rank.host, **_identity(seat.header)))
    return seat


def _heard(star: Star) -> dict[str, Any]:
    note: dict[str, Any] = json.loads(star.hear())
    if "stop" in note:
        raise Stopped(note["stop"])
    return note


# A rank's seat: its slice, window and model


class Seat:
    """What one rank holds for a run. Raises SliceError where its slice is not the one that the settings want."""

    tokenizer: Tokenizer | None = None
    tokenizer_bytes = 0  # memory that it takes

    def __init__(self, star: Star, settings: Settings, *, with_tokenizer: bool = False) -> None:
        self.star = star
        path = settings.slice_path(star.rank.index, star.rank.size)
        self.file = SliceFile(path)
        try:
            self.header = self.file.header
            self._check(path, settings)
            star.timeout, star.algorithm = settings.timeout, settings.allreduce
            neighbours = settings.cores_shared_by[star.rank.index]
            threads = settings.threads or max(1, len(os.sched_getaffinity(0)) // neighbours)
            backend = load_backend(settings.backend, threads)
            if with_tokenizer:
                self.tokenizer = self._load_tokenizer()
            resident = self.file.load(self.file.records_of("resident")[0]).parts
            order = block_order(self.header)
            self.window = Window(self.file, order, self._blocks(settings.window, neighbours * settings.models))
            self.model = Model(self.header, resident, self.window, star, backend, settings.kv)
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
        for name, value in _identity(header).items():
            if wanted[name] and wanted[name] != value:
                what = {
                    "fingerprint": "it is of another model: choose its --slices, or leave --slices out",
                    "format": "leave --format out, or make slices in that format",
                    "shares": "leave --shares out, or make slices with those",
                }[name]
                raise SliceError(f"slice file {path} has {name} {value}, this run needs {wanted[name]}; {what}")

    def _blocks(self, wanted: int | str, neighbours: int) -> int | None:
        """Blocks to hold, None for all. "auto": all where this rank's slice takes no more than its part of half the memory
        that is free on its host, else the smallest window."""
        if isinstance(wanted, int):
            return wanted
        if wanted == "all":
            return None
        import psutil

        weights = sum(record.nbytes for record in self.file.records)
        return None if weights < psutil.virtual_memory().available / 2 / neighbours else SMALLEST_WINDOW

    def _load_tokenizer(self) -> Tokenizer:
        """The tokenizer that rank 0's slice carries; what memory it takes is noted, so nothing else may be loading now."""
        import psutil

        before = psutil.Process().memory_info().rss
        tokenizer = load_tokenizer(self.file.tokenizer_assets(), self.header.config.vocab)
        self.tokenizer_bytes = max(0, psutil.Process().memory_info().rss - before)
        return tokenizer

    def figures(self) -> RankFigures:
        share, peak = self.header.share, peak_rss_bytes()
        weights, cache = self.window.held_bytes(), 0 if self.model.cache is None else self.model.cache.filled_bytes
        return RankFigures(
            rank=self.star.rank.index,
            host=self.star.rank.host,
            heads=share.heads.size,
            kv_heads=share.kv_heads.size,
            columns=share.columns.size,
            peak_rss_bytes=peak,
            weights_bytes=weights,
            cache_bytes=cache,
            tokenizer_bytes=self.tokenizer_bytes,
            base_bytes=peak - weights - cache - self.tokenizer_bytes,
            bytes_read=self.window.bytes_read,
            read_wait_s=self.window.wait_seconds,
            compute_s=self.model.compute_seconds,
            star_s=self.star.seconds,
        )

    def close(self) -> None:
        self.window.close()
        self.file.close()


# Rank 0's work


@dataclass(frozen=True)
class Wishes:
    """How prompts are to be answered. `context` None: as much as prompt and answer need."""

    sample: Callable[[], Sampler]  # a fresh sampler for each prompt, so that a seed means the same for each
    max_tokens: int
    context: int | None
    raw: bool
    stops: list[str]
    ignore_eos: bool


class Hub:
    """Rank 0 once every rank has its slice: checks prompts and answers them, one after the other."""

    def __init__(self, seat: Seat, tokenizer: Tokenizer, wishes: Wishes, report: Report) -> None:
        """Raises InputError where the context that is wished for is beyond the model's."""
        self.seat, self.tokenizer, self.wishes, self.report = seat, tokenizer, wishes, report
        self._most = seat.header.config.context
        if wishes.context is not None and wishes.context > self._most:
            raise InputError(f"--context is {wishes.context}, this model has {self._most} positions; give at most that")
        self._limit = wishes.context or self._most

    def check(self, prompt: str) -> list[int]:
        """Token ids of a prompt as the model gets it. Raises InputError where it is empty or too long."""
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        raw = self.wishes.raw or not self.tokenizer.has_chat_template
        ids = self.tokenizer.encode(prompt) if raw else self.tokenizer.encode_chat(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give some text")
        if len(ids) >= self._limit:
            remedy = "shorten it" + (f", or raise --context (up to {self._most})" if self._limit < self._most else "")
            raise InputError(f"the prompt has {len(ids)} tokens, the context is {self._limit} positions; {remedy}")
        return ids

    def answer(self, ids: list[int]) -> Iterator[str]:
        """Text that follows the prompt `ids`, as it comes; the report has its figures when it is done."""
        wishes, model = self.wishes, self.seat.model
        max_tokens = min(wishes.max_tokens, self._limit - len(ids))
        made: list[int] = []
        times: list[float] = []
        ready = time.monotonic()

        def noted(tokens: Iterator[int]) -> Iterator[int]:
            for token in tokens:
                times.append(time.monotonic())
                made.append(token)
                yield token

        tokens = generate(
            model,
            self.seat.star,
            self.seat.file.embedding_rows,
            ids,
            wishes.sample(),
            max_tokens=max_tokens,
            context=wishes.context or len(ids) + max_tokens,
            end_ids=() if wishes.ignore_eos else self.tokenizer.end_ids,
        )
        text = ""
        for piece in until_stop(to_text(noted(tokens), self.tokenizer.stream()), wishes.stops):
            text += piece
            yield piece
        self.report.add(Answer.timed(text, made, len(ids), ready, times))

    def finish(self) -> None:
        """End the run on every rank and gather the figures."""
        self.report.ranks += finish(self.seat.star, [self.seat])[0]
