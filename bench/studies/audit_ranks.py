"""What a rank does in the study of audits (see audit): it computes with a fault, or answers while audits are counted.

Faults are put into the parts of the program that they would befall, on the last rank alone.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import load_quantizer
from tpimpi.compute.formats.packed import Matrix
from tpimpi.engine import protocol
from tpimpi.engine.audit import AuditRequest
from tpimpi.engine.auditor import Auditor, ChosenTile
from tpimpi.engine.engine import EngineConfig
from tpimpi.engine.figures import LiveFigures
from tpimpi.engine.model import Model
from tpimpi.engine.partials import Partials
from tpimpi.engine.pinned_check import PinnedCheck
from tpimpi.engine.rank_memory import MemoryPlanner, RankMemory
from tpimpi.engine.startup import open_engine
from tpimpi.engine.watch import Watch, sums_of
from tpimpi.errors import AuditError, DamagedMemoryError
from tpimpi.star import PartialWatch, Star, connect
from tpimpi.weights.copies import TileCopies, open_copies
from tpimpi.weights.slices.layout import Record
from tpimpi.weights.slices.tile import Tile

FACTOR = np.float32(1.01)
PROMPT_ROWS = 16
# Positions of a sequence. The number tells the ranks what begins: a round, the same round again, or a part of one without.
ROUND, AGAIN, WITHOUT = 512, 511, 510
POLL_TOKENS = 8
Undo = Callable[[], None]


# Faults. Each is put into a model, and returns what takes it out again.


def lies_in_sums(model: Model) -> Undo:
    """Partials are scaled as they are sent; audits are answered honestly."""
    start = model.star.start

    def scaled(array: F32, **named: Any) -> Any:
        array *= FACTOR
        return start(array, **named)

    model.star.start = scaled  # type: ignore[method-assign]

    def undo() -> None:
        del model.star.start

    return undo


class _Scaled(Partials):
    def of_tile(self, *arguments: Any) -> F32:
        return super().of_tile(*arguments) * FACTOR


def scales_partials(model: Model) -> Undo:
    """Partials are scaled, and the answers to audits with them."""
    honest = model.partials
    model.partials = _Scaled(honest.header, honest.layers, honest.resident, honest.backend)

    def undo() -> None:
        model.partials = honest

    return undo


def old_kernel(model: Model, fmt: str) -> Undo:
    """Of one format the first weight of each 32 is taken with the wrong sign."""
    linear = model.backend.linear

    def wrong(x: F32, weight: Matrix, bias: F32 | None = None) -> F32:
        if weight.format == fmt:
            x = x.copy()
            x[:, ::32] *= -1
        return linear(x, weight, bias)

    model.backend.linear = wrong  # type: ignore[method-assign]

    def undo() -> None:
        del model.backend.linear

    return undo


def flipped_bit(model: Model) -> Undo:
    """A bit of a pinned tile changes in memory."""
    tiles = [tile for tile in model.window._pinned.tiles if tile is not None]
    matrix = random.choice([matrix for tile in tiles for matrix in tile.matrices.values()])
    data = matrix.data.reshape(-1).view(np.uint8)
    place, bit = random.randrange(data.size), np.uint8(1 << random.randrange(8))
    data[place] ^= bit

    def undo() -> None:
        data[place] ^= bit
        model.window._damage = None

    return undo


FAULTS: dict[str, Callable[[Model], Undo]] = {
    "lies in sums, answers honestly": lies_in_sums,
    "scales partials by 1.01, in answers too": scales_partials,
    "flips a bit of a pinned tile": flipped_bit,
}


def rarest_format(model: Model) -> str:
    """Of the matrices of layers, the format that the fewest have."""
    formats = [fmt for layer in model.partials.header.formats.layers for fmt in layer.present().values()]
    return min(sorted(set(formats)), key=formats.count)


# Ranks


@dataclass(frozen=True)
class Job:
    """What all ranks are told. `kernels` is each rank's level; `rate` as EngineConfig.audit."""

    model: str
    slices: str
    kernels: list[str]
    rounds: int
    tokens: int
    what: str
    rate: float | None = None


def take_memory(star: Star, job: Job) -> RankMemory:
    """An engine whose tiles are all pinned, with audits."""
    settings = EngineConfig(
        *(job.slices, None, "", "", "", "native", 1, "star", 120.0),
        cores_shared_by=[star.rank.size] * star.rank.size,
        window="all",
        kernels=job.kernels[star.rank.index],
        audit=job.rate,
    )
    opened = open_engine(star, settings)
    if star.rank.is_hub:
        opened.copies = open_copies(opened.header, Path(job.model), None, load_quantizer(1))
    return MemoryPlanner([opened]).plan(ROUND, None, 0).take()


def main() -> None:
    """A rank of the study; its argument is a Job as JSON. Rank 0 prints what it found as JSON."""
    job, star = Job(**json.loads(sys.argv[1])), connect()
    star.measure_links()
    memory = take_memory(star, job)
    model = memory.engines[0].model
    leads = {"faults": lead_faults, "cost": lead_cost, "alarms": lead_alarms}[job.what]
    if star.rank.is_hub:
        found = leads(memory, job)
        protocol.finish(model, star)
        print(json.dumps(found), flush=True)
    else:
        follower = Follower(memory, job)
        protocol.follow([model], star, live=follower.live)
    memory.close()
    star.close()


def faults_of(model: Model) -> dict[str, Callable[[Model], Undo]]:
    """All faults, in the order in which they are tried."""
    fmt = rarest_format(model)
    return {**FAULTS, f"an old kernel of {fmt}": lambda model: old_kernel(model, fmt)}


class Follower:
    """Another rank, which the lengths of sequences tell what begins."""

    def __init__(self, memory: RankMemory, job: Job) -> None:
        self._memory, self._model, self._job = memory, memory.engines[0].model, job
        star = self._model.star
        self._faulty = star.rank.index == star.rank.size - 1 and job.what == "faults"
        self._round, self._steps, self._found = 0, 0, 0
        self._undo: Undo = lambda: None
        self._begin, self._check = self._model.begin, self._model.window.raise_damage
        self._model.begin = self.begin  # type: ignore[method-assign]
        self._model.window.raise_damage = self.raise_damage  # type: ignore[method-assign]

    def begin(self, context: int, keep: int = 0) -> None:
        set_pinned_check(self._memory, on=context != WITHOUT)
        if context == ROUND and self._faulty:
            self._undo()
            fault = list(faults_of(self._model).values())[self._round // self._job.rounds]
            self._undo = fault(self._model)
            self._round, self._steps, self._found = self._round + 1, 0, 0
        self._begin(context, keep)

    def raise_damage(self) -> None:
        """In place of the window's, before each step."""
        self._steps += 1
        try:
            self._check()
        except DamagedMemoryError:
            if not self._faulty:
                raise
            self._found = self._found or self._steps

    def live(self) -> LiveFigures:
        """After how many steps a flipped bit was found, 0 while it is not, in place of a number of bytes."""
        return LiveFigures(self._found, 0, 0.0, 0.0, 0.0)


def set_pinned_check(memory: RankMemory, *, on: bool) -> None:
    """Have pinned tiles checked again, or not."""
    if on and memory._pinned_check is None:
        memory._pinned_check = PinnedCheck([memory.engines[0].window])
    if not on and memory._pinned_check is not None:
        memory._pinned_check.close()
        memory._pinned_check = None


class Sequence:
    """A sequence of random tokens, on rank 0."""

    def __init__(self, memory: RankMemory, context: int) -> None:
        self._engine, self._context = memory.engines[0], context
        self.begin(context)

    def begin(self, context: int) -> None:
        """Begin it again."""
        model = self._engine.model
        protocol.begin(model, model.star, context)
        self.length = 0
        self.step(PROMPT_ROWS)

    def step(self, rows: int = 1) -> None:
        """So many tokens more. Raises AuditError."""
        model = self._engine.model
        if self.length + rows > WITHOUT:
            self.begin(AGAIN if self._context == ROUND else self._context)
        ids = [random.randrange(model.config.vocab) for _ in range(rows)]
        start, self.length = self.length, self.length + rows
        hidden = protocol.forward(model, model.star, self._engine.embed(ids), start)
        model.logits(hidden[-1:])


def lead_faults(memory: RankMemory, job: Job) -> dict[str, list[tuple[int, str]]]:
    """For each fault and round, after how many tokens it was found, and what was said; (tokens, "") where it was not."""
    model = memory.engines[0].model
    found: dict[str, list[tuple[int, str]]] = {}
    for fault in faults_of(model):
        for _ in range(job.rounds):
            found.setdefault(fault, []).append(one_round(memory, job, polls=FAULTS.get(fault) is flipped_bit))
            print(fault, *found[fault][-1], file=sys.stderr, flush=True)
    return found


def one_round(memory: RankMemory, job: Job, *, polls: bool) -> tuple[int, str]:
    """Tokens until a fault is found, and how."""
    model, tokens = memory.engines[0].model, 0
    assert model.auditor is not None
    model.auditor._again = None  # what the round before left
    try:
        sequence = Sequence(memory, ROUND)
        for tokens in range(1, job.tokens + 1):
            sequence.step()
            if polls and tokens % POLL_TOKENS == 0:
                figures = protocol.live_figures(model, model.star, memory.live())
                if figures[-1].resident_bytes:
                    return figures[-1].resident_bytes, "its rank compared the tile with its checksum"
    except AuditError as error:
        return max(1, tokens), str(error)
    return job.tokens, ""


def lead_cost(memory: RankMemory, job: Job) -> list[float]:
    """The time of a token with audits against without, in pairs of runs in turn, each of so many tokens."""
    model = memory.engines[0].model
    auditor, ratios = model.auditor, []
    for number in range(job.rounds + 1):
        seconds = {}
        for context in (AGAIN, WITHOUT) if number % 2 else (WITHOUT, AGAIN):
            model.auditor = auditor if context == AGAIN else None
            set_pinned_check(memory, on=context == AGAIN)
            sequence, began = Sequence(memory, context), time.monotonic()
            for _ in range(job.tokens):
                sequence.step()
            seconds[context] = time.monotonic() - began
        if number:  # the first pair warms up
            ratios.append(seconds[AGAIN] / seconds[WITHOUT])
    model.auditor = auditor
    assert auditor is not None
    print(auditor.figures, file=sys.stderr, flush=True)
    return ratios


class EveryWatch(Watch):
    """Watches all sums of a step, of one row."""

    def __init__(self, model: Model, row: int) -> None:
        over_all = model.config.qk_norm_over_all
        sums = sums_of(model.config, model.blocks)
        squares = {audited: audited.last - 1 for audited in sums if over_all}
        self.every = [
            Watch(audited, row, squares.get(audited) if model.blocks[audited.last].kind == "attn" else None)
            for audited in sums
        ]

    def of_run(self, run: slice) -> Watch | None:
        return self if all(watch.of_run(run) is not None for watch in self.every) else None

    def note(self, x: F32, place: int) -> None:
        for watch in self.every:
            watch.note(x, place)

    def partials_of(self, partial: F32, place: int) -> PartialWatch | None:
        seen = [watch.partials_of(partial, place) for watch in self.every]
        return next((one for one in seen if one is not None), None)


class KeptCopies:
    """Copies that are made once, and kept: what is measured here is not how long they take."""

    def __init__(self, copies: TileCopies) -> None:
        self._copies, self.what = copies, copies.what
        self._kept: dict[tuple[int, str], Tile] = {}

    def tile(self, records: list[Record], number: int, rank: int) -> Tile:
        key = (rank, records[number].path)
        if key not in self._kept:
            self._kept[key] = self._copies.tile(records, number, rank)
        return self._kept[key]

    def close(self) -> None:
        self._copies.close()


def lead_alarms(memory: RankMemory, job: Job) -> dict[str, float]:
    """Audit every sum of a row of each step, with all tiles of all ranks, until there were `tokens` audits of a rank's sum:
    how many, how many tiles, how many alarms, and the largest deviation of a tile."""
    engine = memory.engines[0]
    model, copies = engine.model, engine.opened.copies
    assert copies is not None
    auditor = Auditor(model, engine.opened.header, KeptCopies(copies), 1.0)  # type: ignore[arg-type]
    model.auditor = None
    audits = tiles = alarms = start = 0
    offs: list[float] = []
    while audits < job.tokens:
        rows = random.choice([1, 1, 1, 2, 5, 16, 40])
        if start == 0 or start + rows > WITHOUT:
            protocol.begin(model, model.star, ROUND)
            start = 0
        x = engine.embed([random.randrange(model.config.vocab) for _ in range(rows)])
        watch = EveryWatch(model, random.randrange(rows))
        header = protocol.StepHeader(protocol.Operation.FORWARD, rows, start, model.routing_hash)
        protocol.send_header(model.star, header)
        model.star.broadcast(x)
        model.forward(x, start, watch=watch)
        for one in watch.every:
            request = auditor.request(one, model.rows_of_sequence(start, rows))
            answers = ask(model, request)
            try:
                auditor.check(one, request, answers)
            except AuditError as error:
                alarms += 1
                print(error, file=sys.stderr, flush=True)
            for rank, answered in auditor.split(request, answers).items():
                audits += 1
                for number in range(len(answered.records)):
                    offs += auditor.deviations(ChosenTile(rank, number), request, answered).values()
                    tiles += 1
        start += rows
    ordered = np.sort(offs)
    quantiles = {f"deviation {q:g}": float(np.quantile(ordered, q)) for q in (0.5, 0.99, 0.9999)}
    return {"audits": audits, "tiles": tiles, "alarms": alarms, **quantiles, "largest deviation": float(ordered[-1])}


def ask(model: Model, request: AuditRequest) -> list[bytes]:
    """Every rank's answer."""
    header = protocol.StepHeader(protocol.Operation.AUDIT, routing_hash=model.routing_hash)
    protocol.send_header(model.star, header, request.words())
    request.send_row(model.star)
    return model.star.gather_notes(b"")


if __name__ == "__main__":
    main()
