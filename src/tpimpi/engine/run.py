"""One run, from joining the star to the report: rank 0 decides and speaks, the others follow.

The order of a run: every rank says who it is (host, version); rank 0 settles options, model and slices and tells the
others what they need (never the prompt); every rank opens its slice and says whether it can, and then what memory it
needs and what its host has; rank 0 tells each what it may take; then rank 0 generates and the others follow; at the end
each rank gives its figures. Whatever is wrong before generation begins is said once, by rank 0; after that, by the rank
that it befalls, which ends the job.
"""

from __future__ import annotations

import importlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, astuple, dataclass
from functools import partial
from typing import Any, TypeVar

import xxhash

from tpimpi import __version__
from tpimpi.compute.backends import NOT_INSTALLED, has_native
from tpimpi.engine.engine import CONTEXT, Furnished, RankMemory, Seat, Settings, identity
from tpimpi.engine.trace import RankTrace
from tpimpi.errors import InputError, SliceError
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.serving.generate import Sampler, follow, generate, to_text, until_stop
from tpimpi.serving.report import Answer, RankFigures, Report
from tpimpi.serving.session import Session, Turn
from tpimpi.serving.text.tokenizer import TokenIds, Tokenizer
from tpimpi.star import FINISH, Star
from tpimpi.star import settle as link_settle
from tpimpi.star.control import as_note, heard, or_tell, together
from tpimpi.system.memory import Needs, Place, allowances, places
from tpimpi.weights import distribute
from tpimpi.weights.slices.header import FORMAT_VERSION, Header
from tpimpi.weights.slices.partition import Plan
from tpimpi.weights.sources import Source

T = TypeVar("T")
_MOST_BYTES_A_TOKEN = 16  # of usual text; with more, a prompt is looked at twice
NO_WATCH = "this MPI has no MPI_THREAD_MULTIPLE, so there is no watch, and a rank that hangs is noticed only after"
LONGEST_NAME = 40  # characters of a model's name, and of the shares, in the name of its cache folder


def cache_name(source: Source, plan: Plan, formats: ModelFormats) -> str:
    """Folder, within the cache folder, of the slices of this model for this plan in these formats."""
    shares = plan.describe().replace(",", "-")
    if len(shares) > LONGEST_NAME:
        shares = f"{plan.ranks}-ranks-{xxhash.xxh3_64_hexdigest(shares.encode())}"
    before, after = cache_names(source, formats)
    return f"{before}{shares}{after}"


def cache_names(source: Source, formats: ModelFormats) -> tuple[str, str]:
    """What stands before and after the shares in such a name."""
    name = f"{source.path.stem[:LONGEST_NAME]}-{source.fingerprint()[:12]}"
    return f"{name}-{formats.key()}-", f"-v{FORMAT_VERSION}"


# Agreeing


@dataclass(frozen=True)
class Guest:
    """What a rank says of itself: its host, the cores it may use, how many that host has, whether it has native kernels."""

    host: str
    cores: frozenset[int]
    host_cores: int
    native: bool

    def shares_cores_with(self, other: Guest) -> bool:
        return self.host == other.host and bool(self.cores & other.cores)


def meet(star: Star) -> list[dict[str, Any]]:
    """Every rank says who it is. Rank 0 gets what they say in rank order, whatever their versions, the others nothing."""
    cores = sorted(os.sched_getaffinity(0))
    about = {"cores": cores, "host_cores": os.cpu_count() or 1, "native": has_native(), "tasks": sorted(TASKS)}
    notes = [json.loads(note) for note in star.collect(as_note(version=__version__, host=star.rank.host, **about))]
    if notes:
        star.introduce([note["host"] for note in notes])
    return notes


def greet(star: Star) -> list[Guest]:
    """Every rank says who it is. Rank 0 gets them in rank order; raises InputError where versions differ."""
    guests = []
    for rank, hello in enumerate(meet(star)):
        if hello["version"] != __version__:
            raise InputError(
                f"r{rank} {hello['host']} runs tpimpi {hello['version']}, rank 0 runs {__version__}; "
                "install the same version on every host"
            )
        guests.append(Guest(hello["host"], frozenset(hello["cores"]), hello["host_cores"], hello["native"]))
    return guests


def cores_shared_by(guests: Sequence[Guest]) -> list[int]:
    """For each rank how many there are on its host that use the same cores, itself among them."""
    return [sum(map(guest.shares_cores_with, guests)) for guest in guests]


def bound_to_one_core(guests: Sequence[Guest]) -> str | None:
    """What to tell a user whose launcher gave some ranks a single core each, of several; None where it did not."""
    bound = [f"r{rank} {guest.host}" for rank, guest in enumerate(guests) if len(guest.cores) == 1 < guest.host_cores]
    if not bound:
        return None
    return (
        f"{', '.join(bound)}: bound to one core by the launcher, which computing and reading then share; "
        "mpirun --bind-to none frees all of them"
    )


def without_watch(star: Star, timeout: float) -> str | None:
    """What to tell a user whose MPI leaves no thread for the watch; None where there is one."""
    return None if star.watched else f"{NO_WATCH} {timeout:g} s (--timeout)"


def without_native(guests: Sequence[Guest]) -> str | None:
    """What to tell a user of --backend auto where some ranks have no native kernels; None where all do."""
    without = [f"r{rank} {guest.host}" for rank, guest in enumerate(guests) if not guest.native]
    slow = "computing with torch, which is slow with quantized weights (--format f32 helps, and takes more memory)"
    return f"{', '.join(without)}: {NOT_INSTALLED}; {slow}" if without else None


def settle(star: Star, settings: Settings, *, with_tokenizer: bool = True) -> Seat:
    """Rank 0: tell the others the settings, open our slice, and hear whether every rank could open its own.

    `furnish` is to follow. The seat has the slice's tokenizer unless another seat has it already.
    """
    star.tell(as_note(settings=asdict(settings)))
    opened: list[Seat] = []

    def take() -> Seat:
        opened.append(Seat(star, settings, with_tokenizer=with_tokenizer))
        return opened[0]

    try:
        seat, notes = together(star, take)
        for rank, note in enumerate(notes[1:], start=1):
            _check_alike(seat.header, rank, note)
    except BaseException:
        for seat in opened:
            seat.close()
        raise
    return seat


def furnish(star: Star, seats: Sequence[Seat], context: int) -> tuple[RankMemory, list[Furnished]]:
    """Rank 0: every rank takes memory for `context` positions in all of its seats, as far as its promise allows, and
    begins to read.

    Returns our own, and what every rank's memory buys, in rank order. Raises InputError where a rank's promise is too small.
    """
    star.tell(as_note(furnish=context))
    memory = RankMemory(seats)
    notes = [json.loads(note) for note in star.collect(_memory_note(memory, context))]
    settings = memory.settings
    promises: list[int | None] = [None] * star.rank.size
    watched = [0] * star.rank.size
    if settings.window is None and settings.memory is not None:
        promises = list(settings.memory)
    elif settings.window is None:
        hosts = {rank: note["host"] for rank, note in enumerate(notes)}
        needs = {rank: Needs(**note["needs"]) for rank, note in enumerate(notes)}
        found = allowances({r: [Place(*p) for p in note["places"]] for r, note in enumerate(notes)}, hosts, needs)
        promises = [found[rank] for rank in range(star.rank.size)]
        watched = [list(hosts.values()).count(hosts[rank]) for rank in range(star.rank.size)]
    star.tell(as_note(promises=promises, watched=watched))
    try:
        together(star, lambda: memory.plan(context, promises[0], watched[0]))
        star.tell(as_note(measure=True))  # all at the same time, as they will read
        furnished, notes = together(star, memory.furnish)
    except BaseException:
        memory.close()
        raise
    return memory, [furnished, *(Furnished(**note) for note in notes[1:])]


def _memory_note(memory: RankMemory, context: int) -> bytes:
    """What a rank needs, and what its host has."""
    found = [astuple(place) for place in places()]
    return as_note(host=memory.star.rank.host, needs=asdict(memory.needs(context)), places=found)


def go(star: Star) -> None:
    """Rank 0: all is well; from now on the others follow."""
    star.tell(as_note(go=True))


def finish(star: Star, memory: RankMemory) -> tuple[list[list[RankFigures]], list[RankTrace]]:
    """Rank 0: end the run on every rank. For each seat the figures of every rank, in rank order; and their traces."""
    star.command(FINISH)
    figures: list[list[RankFigures]] = [[] for _ in memory.seats]
    for note in star.collect(_figures_note(memory)):
        for found, values in zip(figures, json.loads(note), strict=True):
            found.append(RankFigures(**values))
    traces = []
    if memory.settings.trace:
        offsets = star.clock_offsets()
        notes = enumerate(star.collect(memory.trace().note()))
        traces = [RankTrace.from_note(rank, note, offsets[rank]) for rank, note in notes]
    memory.close()
    return figures, traces


def _figures_note(memory: RankMemory) -> bytes:
    return json.dumps([asdict(figures) for figures in memory.figures()]).encode()


def _check_alike(header: Header, rank: int, note: dict[str, Any]) -> None:
    for name, value in identity(header).items():
        if note[name] != value:
            raise SliceError(
                f"the slice of r{rank} {note['host']} has {name} {note[name]}, rank 0's has {value}; "
                "use slices that were made together"
            )


def _later(module: str, name: str) -> Callable[[Star, dict[str, Any]], None]:
    """A function of a module that most runs do without: it is loaded when it is called, for the memory that it takes."""

    def call(star: Star, note: dict[str, Any]) -> None:
        getattr(importlib.import_module(f"tpimpi.{module}"), name)(star, note)

    return call


# What rank 0 may ask for before a run, or instead of one: by a note with the `task` of that name, which the part gets.
TASKS: dict[str, Callable[[Star, dict[str, Any]], None]] = {
    distribute.TASK: distribute.take_slices,
    link_settle.TASK: link_settle.follow,
    "doctor": _later("examining", "take_part"),
    "bench allreduce": _later("allreduce_bench", "follow"),
    "measure": _later("measuring", "take_part_in_measuring"),
    "disk": _later("inquiries", "take_part_in_disks"),
    "find-slices": _later("inquiries", "tell_slices"),
}


def take_part(star: Star) -> None:
    """Ranks other than 0: the whole run, with a seat for each model that rank 0 settles (a run has one).

    Raises Stopped where rank 0 ended it before it began.
    """
    greet(star)
    with ExitStack() as stack:
        seats: list[Seat] = []
        while "furnish" not in (note := heard(star)):
            if "task" in note:
                TASKS[note["task"]](star, note)
                continue
            settings = Settings(**note["settings"])
            seat = or_tell(star, lambda settings=settings: Seat(star, settings))  # type: ignore[misc]
            seats.append(stack.enter_context(closing(seat)))
            star.collect(as_note(host=star.rank.host, **identity(seat.header)))
        memory = RankMemory(seats)
        stack.enter_context(closing(memory))
        context = note["furnish"]
        star.collect(_memory_note(memory, context))
        note = heard(star)
        rank = star.rank.index
        or_tell(star, lambda: memory.plan(context, note["promises"][rank], note["watched"][rank]))
        star.collect(as_note())
        heard(star)
        furnished = or_tell(star, memory.furnish)
        star.collect(as_note(**asdict(furnished)))
        heard(star)
        follow([seat.model for seat in seats], star)
        star.collect(_figures_note(memory))
        if memory.settings.trace:
            star.clock_offsets()
            star.collect(memory.trace().note())


# Rank 0's work


@dataclass(frozen=True)
class Wishes:
    """How prompts are to be answered. `context` None: as much as prompt and answer need."""

    sample: Callable[[int, int], Sampler]  # for each answer a fresh one: a seed, and how many draws were made before
    seed: int | None  # the same for each answer; None: each has its own
    max_tokens: int
    context: int | None
    raw: bool
    stops: list[str]
    ignore_eos: bool


class Hub:
    """Rank 0 once every rank has its slice: checks prompts and answers them, one after the other."""

    memory: RankMemory | None = None

    def __init__(
        self,
        seat: Seat,
        tokenizer: Tokenizer | TokenIds,
        wishes: Wishes,
        report: Report,
        session: Session | None = None,
    ) -> None:
        """`furnish` is to follow. With a session all prompts are turns of its conversation, else each stands for itself.

        Raises InputError for a context beyond the model's, for wishes that need a tokenizer where there is none, and for a
        session that was begun with another model."""
        self.seat, self.tokenizer, self.wishes, self.report = seat, tokenizer, wishes, report
        self.session = session
        if session is not None:
            session.check_model(seat.header.model, seat.header.fingerprint, seat.header.config.vocab)
        self._most = seat.header.config.context
        if wishes.context is not None and wishes.context > self._most:
            raise InputError(f"--context is {wishes.context}, this model has {self._most} positions; give at most that")
        self._limit = wishes.context or self._most
        if isinstance(tokenizer, TokenIds):
            tokenizer.check_wishes(raw=wishes.raw, stops=wishes.stops)

    def furnish(self, prompt: list[int] | None) -> list[Furnished]:
        """Have every rank take memory: for this prompt and its answer, or for what may come. What each has, in rank order.

        Raises InputError where a rank's promise is too small.
        """
        wishes = self.wishes
        context = wishes.context or min(self._limit, CONTEXT if prompt is None else len(prompt) + wishes.max_tokens)
        self.memory, furnished = furnish(self.seat.star, [self.seat], context)
        rooms = [rank.most_context for rank in furnished if rank.most_context is not None]
        self._limit = min([self._limit, *rooms])
        return furnished

    def check(self, prompt: str) -> Turn:
        """A prompt as the model gets it, with what was said before; or the turn that the session ends with, if that has the
        same prompt and was interrupted. Raises InputError where the prompt is empty or too long, or is not that turn's."""
        if not prompt.strip():
            raise InputError("the prompt is empty; give some text")
        if (turn := self.interrupted()) is not None:
            if turn.prompt != prompt:
                raise InputError(
                    "the session ends with an interrupted answer to another prompt; run without a prompt to go on with it "
                    "(with --max-tokens 1 it ends where it is), then give this one"
                )
            return turn
        encode = self._encoding()
        # Encoding takes 150 bytes of memory for each of the text, so what is far too long is not encoded whole to see that.
        beginning = prompt[: self._limit * _MOST_BYTES_A_TOKEN]
        if beginning != prompt and (found := len(encode(beginning))) > self._limit:
            raise self._too_long(f"over {found}")
        ids = encode(prompt)
        if not ids:
            raise InputError("the prompt has no tokens; give some text")
        if len(ids) >= self._limit:
            raise self._too_long(str(len(ids)))
        return Turn(
            prompt, ids, int.from_bytes(os.urandom(8), "little") >> 1 if self.wishes.seed is None else self.wishes.seed
        )

    def _encoding(self) -> Callable[[str], list[int]]:
        """How a prompt becomes ids, what was said before included."""
        said = [] if self.session is None else self.session.turns
        if not self.wishes.raw and self.tokenizer.has_chat_template:
            return partial(self.tokenizer.encode_chat, said=[(turn.prompt, turn.text) for turn in said])
        if not said:
            return self.tokenizer.encode
        before = [*said[-1].ids, *said[-1].tokens]
        return lambda prompt: [*before, *self.tokenizer.encode(prompt, special=False)]

    def interrupted(self) -> Turn | None:
        """The turn that the session ends with, if it was interrupted. Raises InputError where there is no room for it."""
        turn = None if self.session is None else self.session.unfinished
        if turn is not None and len(turn.ids) >= self._limit:
            raise self._too_long(str(len(turn.ids)))
        return turn

    def _too_long(self, tokens: str) -> InputError:
        remedy = "shorten it"
        if self.session is not None and self.session.turns:
            remedy = "begin another --session"
        if self.wishes.context is not None and self._limit < self._most:
            remedy += f", or raise --context (up to {self._most})"
        elif self._limit < self._most:
            remedy += ", or raise --memory"
        what = "the prompt" if self.session is None or not self.session.turns else "the conversation"
        return InputError(f"{what} has {tokens} tokens, the context is {self._limit} positions; {remedy}")

    def answer(self, turn: Turn) -> Iterator[str]:
        """Text of the answer, as it comes, first what there is of it; the report has its figures when it is done."""
        wishes, model, session = self.wishes, self.seat.model, self.session
        if session is not None:
            session.begin(turn)
        room = self._limit - len(turn.ids)
        max_tokens = min(wishes.max_tokens, room)
        made = list(turn.tokens)
        why = "stop"  # unless the tokens come to an end
        times: list[float] = []
        ready = time.monotonic()

        def noted() -> Iterator[int]:
            nonlocal why
            yield from turn.tokens[: len(made)]
            history = [*turn.ids, *made]
            tokens = generate(
                model,
                self.seat.star,
                self.seat.file.embedding_rows,
                history,
                wishes.sample(turn.seed, len(made)),
                max_tokens=max_tokens - len(made),
                context=wishes.context or len(turn.ids) + max_tokens,
                end_ids=() if wishes.ignore_eos else self.tokenizer.end_ids,
            )
            for token in tokens if len(made) < max_tokens else ():
                times.append(time.monotonic())
                made.append(token)
                if session is not None:
                    session.add(token)
                yield token
            why = "end" if len(made) < max_tokens else "max_tokens" if max_tokens < room else "context"

        text = ""
        for piece in until_stop(to_text(noted(), self.tokenizer.stream()), wishes.stops):
            text += piece
            yield piece
        if session is not None:
            session.end(why, text)
        self.report.add(Answer.timed(text, made, len(turn.ids), ready, times))

    def finish(self) -> list[RankTrace]:
        """End the run on every rank and gather the figures; the traces, if they were wanted, are returned."""
        assert self.memory is not None, "furnish before finish"
        figures, traces = finish(self.seat.star, self.memory)
        self.report.ranks += figures[0]
        return traces

    def close(self) -> None:
        """Stop reading, however the run ends."""
        if self.memory is not None:
            self.memory.close()
        self.seat.close()
