"""Rank 0 checks what the other ranks compute: which sums it audits, and whether the answers are right (see audit).

Before a step it draws, from the system's random numbers, whether one of its sums will be audited, and of which row. It says
so to nobody until the sum is done. Then every rank's answer must end with what that rank had sent, to the bit; and one tile
of one rank, drawn when the answers are there, must give about what rank 0 computes with its own copy of the tile: processors
of other kernel levels add in other orders, and round to int8 or bf16 in between, so by TOLERANCE. What is a little beyond
that is looked at again: the same tile in the next steps, of other rows.

In a mesh rank 0 gets the partials of its own part of a sum alone. Of the other parts the sum that came must be that of what
all ranks answered, to the bit: else the rank that added it is wrong, or one that had sent it something else.

Not audited: the keys and values that a rank keeps of earlier positions (a tile's queries, keys and values of the row are,
and the output projection of what the rank says its attention gave), sums that are not added in rank order (see
Star.parts_of_sum), and rank 0 itself.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from random import SystemRandom

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.formats.blocks_of_32 import BLOCK_WEIGHTS
from tpimpi.engine.audit import PROJECTED, AuditRequest, needs_squares, one_row, split_answer
from tpimpi.engine.figures import AuditFigures
from tpimpi.engine.model import Model
from tpimpi.engine.watch import AuditedSum, Watch, sums_of
from tpimpi.errors import AuditError
from tpimpi.models.blocks import Block
from tpimpi.models.kv.cache import StepRows
from tpimpi.models.layers.mlp import mlp_partial
from tpimpi.models.layers.projections import Projections
from tpimpi.weights.copies import TileCopies, records_of_rank
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Record
from tpimpi.weights.slices.tile import Tile

MAX_RATE = 0.05  # of the steps, where nobody says how many: at most so many are audited
TIME_SHARE = 0.005  # and so many that they take this part of the time
MIN_RATE = 0.002  # but no fewer, or a rank that answers slowly would be asked no more
SHORT_AUDIT_S = 0.005  # that an audit takes, beside the making of a copy, until it was measured
# How far a tile's numbers may be from ours: the root of the mean square of the difference, against that of the numbers. What
# is beyond the first is looked at in so many further steps, and must not be again; nothing may be beyond the second. Of
# honest ranks the furthest was 0.0041 in 100,000 (python -m bench.studies.audit alarms).
TOLERANCE, GROSS, LOOKS = 0.008, 0.05, 3
ROUNDING = 2.0**-22  # of a partial, in the difference of two
TINY = 1e-30  # in place of a size of 0


@dataclass(frozen=True)
class ChosenTile:
    """A tile that rank 0 computes itself: `number` of a rank's records in the sum."""

    rank: int
    number: int


@dataclass(frozen=True)
class Answered:
    """A rank's answer: its tiles in the sum, and the parts that each has (see audit.answer_parts)."""

    records: list[Record]
    parts: list[dict[str, F32]]


class Auditor:
    """Rank 0's: `watch` before a step, `request` and `check` after it where that gave something."""

    def __init__(self, model: Model, header: Header, copies: TileCopies | None, rate: float | None) -> None:
        """`copies` are the tiles of other ranks, None where there are none: then answers are only compared with what was
        sent. `rate` is the part of the steps that are audited, None for as many as TIME_SHARE allows."""
        self._model, self._header, self._copies, self._rate = model, header, copies, rate
        self._random = SystemRandom()
        self._sums = sums_of(model.config, model.blocks)
        self._steps = self._audits = self._tiles = 0
        self._seconds = self._step_seconds = 0.0  # of audits, and of steps without them
        self._began = 0.0
        self._again: tuple[AuditedSum, int, str] | None = None  # a sum, rank and tile that are to be looked at again
        self._looks = 0  # so many times

    # Which sums

    def watch(self, rows: int) -> Watch | None:
        """Before a step of so many rows: what is to be kept of it; None where it is not audited."""
        self._steps += 1
        self._began = time.monotonic()
        if self._again is None and self._random.random() >= self.chance:
            return None
        audited = self._random.choice(self._sums) if self._again is None else self._again[0]
        row = self._random.randrange(rows)
        block = self._model.blocks[audited.last]
        wire = self._model.star.wire.format
        width = 2 if block.kind == "qkv" else self._model.config.hidden
        aligned = wire != "q8_0" or width == 2 or width % BLOCK_WEIGHTS == 0  # or a row would not be packed by itself
        bounds = self._model.star.parts_of_sum(self._model.rows_of_sum(rows, row), width)
        if bounds is None or not aligned:
            return None
        return Watch(audited, row, audited.last - 1 if needs_squares(self._model, audited) else None, bounds)

    @property
    def chance(self) -> float:
        """The part of the steps that are audited now."""
        if self._rate is not None:
            return self._rate
        steps = max(1, self._steps - 1)
        audit_s = (SHORT_AUDIT_S + self._seconds) / (1 + self._audits)
        affordable = TIME_SHARE * (self._step_seconds / steps) / audit_s
        return max(MIN_RATE, min(MAX_RATE, affordable))

    def stepped(self) -> None:
        """The step of the last `watch` is done."""
        self._step_seconds += time.monotonic() - self._began
        if self._steps == 1 and self._rate is None:
            self._seconds += self._copy_seconds()  # by which audits are as few as they should be from the first on

    def _copy_seconds(self) -> float:
        """How long it takes to make a copy of a tile: here one of another rank's last tiles of the first layer."""
        found = [(rank, records_of_rank(self._header, rank, 0)) for rank in range(1, self._header.partition.ranks)]
        rank, records = max(found, key=lambda of: len(of[1]))
        began = time.monotonic()
        if self._copies is not None and records:
            alike = [record for record in records if record.block == records[-1].block]
            self._copies.tile(alike, len(alike) - 1, rank)
        return time.monotonic() - began

    @property
    def figures(self) -> AuditFigures:
        """What was done so far."""
        against = "nothing but what was sent" if self._copies is None else self._copies.what
        return AuditFigures(
            rate=self._rate,
            steps=self._steps,
            audits=self._audits,
            tiles=self._tiles,
            seconds=self._seconds,
            step_seconds=self._step_seconds,
            against=against,
        )

    # Answers

    def request(self, watch: Watch, rows: StepRows) -> AuditRequest:
        """What to ask for, of what a step of these rows left in `watch`."""
        self._began = time.monotonic()
        assert watch.x is not None, "a row that did not go through the layers"
        return AuditRequest(watch.audited, one_row(rows, watch.row), watch.x, watch.squares)

    def check(self, watch: Watch, request: AuditRequest, answers: Sequence[bytes]) -> None:
        """Compare what every rank answered, in rank order; the first is ours, and empty. Raises AuditError, which names host
        and tile."""
        found = self.split(request, answers)
        for rank, answered in found.items():
            self._check_sent(rank, watch, request, answered)
        self._check_sums(watch, request, found)
        candidates = [ChosenTile(rank, number) for rank, of in found.items() for number in range(len(of.records))]
        if self._copies is not None and candidates:
            chosen = self._choose(candidates, found)
            self._check_tile(chosen, request, found[chosen.rank])
            self._tiles += 1
        self._audits += 1
        self._seconds += time.monotonic() - self._began

    def split(self, request: AuditRequest, answers: Sequence[bytes]) -> dict[int, Answered]:
        """The answers of the other ranks, by rank, tile by tile. Raises StarError for one of another size."""
        found = {}
        for rank in range(1, len(answers)):
            records = self._records(rank, request)
            name = self._model.star.rank_name(rank)
            found[rank] = Answered(records, split_answer(answers[rank], records, self._width(request), name))
        return found

    def _width(self, request: AuditRequest) -> int:
        return 2 if self._model.blocks[request.audited.last].kind == "qkv" else self._model.config.hidden

    def _records(self, rank: int, request: AuditRequest) -> list[Record]:
        """A rank's tiles that the answer has, in order."""
        blocks = self._model.blocks[request.audited.first : request.audited.last + 1]
        every = records_of_rank(self._header, rank, blocks[0].layer)
        records = [record for block in blocks for record in every if record.block == block]
        if blocks[-1].kind == "mlp" and self._model.config.router(blocks[0].layer) is not None:
            experts = self._experts(request, blocks)
            records += [record for record in every if record.expert in experts]
        return records

    def _experts(self, request: AuditRequest, blocks: Sequence[Block]) -> set[int]:
        assert self._model.experts is not None
        h = self._model.partials.normed(request.x, blocks[0])
        return set(self._model.experts.chosen(h, blocks[0].layer, request.rows.position).experts.ravel().tolist())

    def _check_sent(self, rank: int, watch: Watch, request: AuditRequest, answered: Answered) -> None:
        """What a rank had sent into the sum must be what its tiles give, to the bit."""
        star, records, shown = self._model.star, answered.records, watch.parts()[0]
        expected = self._travelled(self._partial(request, answered), request)[shown]
        sent = watch.sent.partials.get(rank)
        if expected.size == 0 or (sent is not None and sent[shown].tobytes() == expected.tobytes()):
            return
        block = self._model.blocks[request.audited.last]
        tiles = f"its tiles {records[0].path} to {records[-1].path}" if len(records) > 1 else "its tile"
        tiles = tiles if len(records) != 1 else f"its tile {records[0].path}"
        raise AuditError(
            f"audit: what {star.rank_name(rank)} sent into the sum of {block} (position {request.rows.position[0]}) is not "
            f"what {tiles} gives when it computes the row again; {REMEDY}"
        )

    def _check_sums(self, watch: Watch, request: AuditRequest, found: Mapping[int, Answered]) -> None:
        """The parts of the row that other ranks have added must be the sums of what all give, to the bit."""
        assert watch.own is not None and watch.total is not None
        partials = [watch.own[0], *(self._partial(request, found[rank]) for rank in sorted(found))]
        for hub, part in enumerate(watch.parts()):
            if hub == 0 or part.start == part.stop:
                continue
            came = [self._travelled(partial[part], request) for partial in partials]
            came[hub] = partials[hub][part]  # which it has
            total = functools.reduce(np.add, came)
            if watch.total[0][part].tobytes() == self._travelled(total, request).tobytes():
                continue
            star, others = self._model.star, [rank for rank in found if rank != hub]
            sent = f", or {' or '.join(map(star.rank_name, others))} sent it something else" if others else ""
            raise AuditError(
                f"audit: what {star.rank_name(hub)} sent as its part of the sum of "
                f"{self._model.blocks[request.audited.last]} (position {request.rows.position[0]}) is not the sum of what "
                f"all ranks' tiles give when they compute the row again: it added wrongly{sent}; {REMEDY}"
            )

    def _partial(self, request: AuditRequest, answered: Answered) -> F32:
        """What a rank's tiles give of the sum, [width]."""
        return answered.parts[-1]["partial"] if answered.parts else np.zeros(self._width(request), np.float32)

    def _travelled(self, numbers: F32, request: AuditRequest) -> F32:
        """What comes of numbers that are sent in the sum."""
        wire = self._model.star.wire_of_sum(exact=self._width(request) == 2)
        return wire.unpack(wire.pack(np.ascontiguousarray(numbers)), numbers.size)

    def _choose(self, candidates: Sequence[ChosenTile], found: Mapping[int, Answered]) -> ChosenTile:
        """The tile that we compute: one that is to be looked at again, if it is there, or any."""
        if self._again is not None:
            for chosen in candidates:
                if (chosen.rank, found[chosen.rank].records[chosen.number].path) == self._again[1:]:
                    return chosen
        return self._random.choice(candidates)

    def _check_tile(self, chosen: ChosenTile, request: AuditRequest, answered: Answered) -> None:
        """One tile of a rank must give about what we compute with our copy of it."""
        assert self._copies is not None
        path = answered.records[chosen.number].path
        looked_at = self._again is not None and self._again[1:] == (chosen.rank, path)
        self._looks -= self._again is not None
        if self._looks <= 0:
            self._again = None
        for name, off in self.deviations(chosen, request, answered).items():
            if off <= TOLERANCE:  # not so where one is no number
                continue
            if off <= GROSS and not looked_at:
                self._again, self._looks = (request.audited, chosen.rank, path), LOOKS
                continue
            what = {"partial": "what it adds to the sum"}.get(name, f"its {name}")
            host, position = self._model.star.rank_name(chosen.rank), request.rows.position[0]
            raise AuditError(
                f"audit: tile {path} of {host} gives other numbers there than rank 0 "
                f"computes from {self._copies.what} ({what}, position {position}, differs by {off:.2g} of its size, must be "
                f"at most {TOLERANCE:g}); {REMEDY}"
            )

    def deviations(self, chosen: ChosenTile, request: AuditRequest, answered: Answered) -> dict[str, float]:
        """How far what a tile gave is from what our copy of it gives, by the names of the answer's parts: the root of the
        mean square of the difference, against that of ours."""
        assert self._copies is not None
        records, parts = answered.records, answered.parts
        record, answer = records[chosen.number], parts[chosen.number]
        alike = [other for other in records if other.block == record.block]
        tile = self._copies.tile(alike, alike.index(record), chosen.rank)
        before = parts[chosen.number - 1]["partial"] if chosen.number else np.zeros_like(answer["partial"])
        found = {}
        for name, ours in self._own(chosen.rank, tile, request, answer).items():
            theirs, noise = answer[name], 0.0
            if name == "partial":
                noise = ROUNDING * max(_size(before), _size(theirs))
                theirs = theirs - before
            off = _size(theirs - ours)
            found[name] = 0.0 if off <= noise else off / max(_size(ours), TINY)
        return found

    def _own(self, rank: int, tile: Tile, request: AuditRequest, answer: dict[str, F32]) -> dict[str, F32]:
        """What a tile of another rank gives for the row, by the names of the answer's parts; [numbers] each."""
        model, record, x = self._model, tile.record, request.x
        backend = model.backend
        block = model.blocks[request.audited.last] if record.expert >= 0 else record.block
        first = model.blocks[request.audited.first]  # whose norm a parallel layer's MLP reads too
        h = model.partials.normed(x, first if model.config.layer(block.layer).parallel else block)
        if record.expert >= 0:
            return {"partial": self._own_expert(tile, h, request)}
        if block.kind == "mlp":
            spec = model.config.layer(block.layer)
            return {"partial": mlp_partial(backend, h, tile, spec.activation, spec.activation_limit)[0]}
        own = {}
        for name in PROJECTED:
            if name in tile.matrices:
                own[name] = backend.linear(h, tile.matrices[name], tile.parts.get(f"{name}_bias"))[0]
        if block.kind == "qkv":
            header = replace(self._header, rank=rank)
            partials = replace(model.partials, header=header)
            own["partial"] = partials.squares(h, tile, Projections(backend, model.config.head_dim))[0]
        elif "o" in tile.matrices:
            own["partial"] = backend.linear(answer["o"][None].copy(), tile.matrices["o"])[0]
        else:
            own["partial"] = np.zeros_like(answer["partial"])
        return own

    def _own_expert(self, tile: Tile, h: F32, request: AuditRequest) -> F32:
        model, total = self._model, np.zeros_like(h)
        assert model.experts is not None
        layer = tile.record.block.layer
        users = model.experts.chosen(h, layer, request.rows.position).rows_by_expert()
        use = ExpertUse(tile.matrices, tile.parts, *users[tile.record.expert])
        model.backend.experts(h, [use], model.config.activation, model.config.activation_limit, total)
        return total[0]


REMEDY = (
    "that machine's memory or processor fails, its tpimpi or its slices are not the same, or its owner changes the answer: "
    "take it out of the run, or test it (memtest86+, python -m tpimpi inspect --verify); the run ends here"
)


def _size(values: F32) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))) if values.size else 0.0
