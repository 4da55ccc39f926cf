"""What a rank can do, measured in about a second, while the others do the same: a layer of the model, with weights made up.

Nothing is read or sliced for it. The ranks run `Model.forward` together as in a run, over the star, on one layer whose
weights lie at another place in memory each time, as large together as their share of a model is, or larger than the caches.
That is done with two sizes of shares, so that what every block costs is told from what each byte costs, with one position
and with those of a prompt. The rank that computes longest does not wait for others; the rest of its time is the allreduce's.

A control group with a part of a core stops a rank only after it has computed for some milliseconds. So how much of a
processor a rank gets in the long run is measured by itself, in SUSTAINED_S seconds of nothing but computing.

Peak memory: MAX_WEIGHT_BYTES bytes or a third of what the rank may take; all is given back.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any, cast

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.compute.backends import Backend, load_backend
from tpimpi.compute.formats.packed import packed_bytes
from tpimpi.diagnostics.bench.kernels import CACHE_RATIO
from tpimpi.diagnostics.planner.made_up_weights import TRACE_POSITIONS, ExpertRing, WeightRing, made_up_resident
from tpimpi.engine.engine import default_threads
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.experts import Experts
from tpimpi.engine.model import Model
from tpimpi.engine.window import Window
from tpimpi.models.blocks import LAYER_KINDS
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import ModelFormats
from tpimpi.star import Rank, Star
from tpimpi.star.control import Note, receive_note, send_note
from tpimpi.system.cpu import last_level_cache
from tpimpi.system.memory import headroom, places, resident_bytes
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Record, slice_records
from tpimpi.weights.slices.partition import Partition, make_partition

SUSTAINED_S = 0.4  # seconds of nothing but computing
LAYERS_S = 0.15  # seconds of layers of one size, at least one layer in each turn
_TURNS = 3
MAX_LAYER_BYTES = 24 << 20  # bytes of the layer on a rank; a larger one is reckoned from this
MAX_WEIGHT_BYTES = 384 << 20  # bytes of made-up weights, of both sizes and the head
MIN_WEIGHT_BYTES = 8 << 20
_SIZE_RATIO = 4  # so many times smaller is the second size
_STALL_RATIO = 4.0  # times as long as usual: the rank was stopped


@dataclass(frozen=True)
class LayerBenchmarkConfig:
    """What rank 0 wants measured: of the first `ranks` ranks, with `positions` of a prompt at once, after `start` others."""

    config: dict[str, Any]
    formats: dict[str, Any]
    ranks: int
    positions: int
    start: int
    backend: str
    threads: int | None
    cores_shared_by: list[int]
    allreduce: str
    wire: str
    kv_format: str
    memory: list[int] | None  # of each rank, as --memory says
    kernels: str = "auto"


@dataclass(frozen=True)
class LayerTiming:
    """Some steps through one layer, in lockstep with the others: bytes of its tiles here, and seconds of a step."""

    positions: int
    nbytes: int
    wall: float
    compute: float
    cpu: float


class StepCount(Note, frozen=True):
    """Hub: every rank makes so many steps in a row, in lockstep."""

    count: int


class LayerBenchmark:
    """One rank's layers, ready to be run with the others. Raises InputError where its backend cannot be had, MemoryError."""

    used = 0.0  # processor seconds a second during the timings

    def __init__(self, rank: Rank, settings: LayerBenchmarkConfig) -> None:
        self.settings, self.rank = settings, rank
        config = ModelConfig.from_dict(settings.config)
        formats = ModelFormats.from_dict(settings.formats, config.layers)
        # Of a mixture: of the layers with experts.
        usual = Counter(here for here in formats.layers if here.expert_gate or not config.experts).most_common(1)[0][0]
        self.threads = settings.threads or default_threads(
            len(os.sched_getaffinity(0)), settings.cores_shared_by[self.rank.index]
        )
        self.backend: Backend = load_backend(settings.backend, self.threads, settings.kernels)
        most = _max_weights(settings.memory[self.rank.index] if settings.memory else None)
        vocab = _rows_within(config, formats.head, min(MAX_LAYER_BYTES, most // 4))
        trace = TRACE_POSITIONS if config.experts else 0
        self._config = replace(config.with_layers(1), vocab=vocab, trace_positions=trace, trace_predicted=1.0)
        self._formats = replace(formats, layers=(usual,))
        part = 1 / settings.ranks
        largest = self._token_bytes(self._records(part)[1])
        part *= min(1.0, MAX_LAYER_BYTES / max(1, largest))
        self._parts = [part, part / _SIZE_RATIO]
        # In a run a rank goes through all of its share for each token: the caches keep what is smaller than they are.
        room = min(config.layers * largest, CACHE_RATIO * last_level_cache(self.threads), most // 3)
        self._rings: list[WeightRing | ExpertRing] = []
        self._models = [self._model(part, room) for part in self._parts]

    def _records(self, part: float) -> tuple[Partition, list[Record]]:
        """The shares, all alike, of so large a part of the model; and a layer's tiles."""
        config, ranks = self._config, self.settings.ranks
        share = make_partition(config, [part, 1 - part]).shares[0]
        partition = Partition((1.0,) * ranks, (share,) * ranks)
        records = slice_records(config, share, self.rank.index, self._formats, {})
        return partition, [record for record in records if record.block.kind in (*LAYER_KINDS, "head", "experts")]

    def _token_bytes(self, records: Sequence[Record]) -> int:
        """What a position goes through in a layer of these tiles."""
        chosen = sum(record.nbytes for record in records if 0 <= record.expert < self._config.experts_per_token)
        return chosen + sum(record.nbytes for record in records if record.block.kind in LAYER_KINDS)

    def _model(self, part: float, room: int) -> _LayerModel:
        """A model of one layer."""
        partition, records = self._records(part)
        experts = [record for record in records if record.expert >= 0]
        # The head is measured once.
        records = [
            record for record in records if record.expert < 0 and not (self._rings and record.block.kind == "head")
        ]
        whole = sum(record.nbytes for record in records if record.block.kind != "head")
        of_experts = room - room * whole // max(1, whole + self._token_bytes(experts))
        ring, expert_ring = WeightRing(records, room - of_experts, room), ExpertRing(experts, of_experts)
        self._rings += [ring, expert_ring]
        header = Header(self.rank.index, self._formats, "", "", self._config, partition, tuple(records))
        config, resident = self._config, made_up_resident(self._config, self._formats.router)
        model = Model(
            *(header, resident, cast(Window, ring), Star(None), self.backend, self.settings.kv_format),
            experts=Experts(config, resident, cast(ExpertCache, expert_ring), self.backend) if config.experts else None,
            predict=config.experts_per_token,
        )
        model.begin(self.settings.start + self.settings.positions + 1)
        return _LayerModel(model, ring, expert_ring)

    def close(self) -> None:
        self._models.clear()
        for ring in self._rings:
            ring.release()

    # Measuring

    def processors(self) -> float:
        """Processor seconds a second, of nothing but computing; of whole periods, where the rank is stopped now and then."""
        model, x = self._models[0].model, self._vectors(1)
        model.forward(x, self.settings.start)
        marks = [(time.perf_counter(), time.process_time())]
        while marks[-1][0] < marks[0][0] + SUSTAINED_S or len(marks) < 4:
            model.forward(x, self.settings.start)
            marks.append((time.perf_counter(), time.process_time()))
        return sustained(marks)

    def timings(self, star: Star) -> list[LayerTiming]:
        """With each size, of one position and of the chunk, over the star `star` of those that take part; in turns, so that
        whatever else the machines do disturbs all of them alike."""
        kinds = [
            _Steps(layer, self._vectors(positions), self.settings.start if positions == 1 else self.settings.start // 2)
            for positions in dict.fromkeys((1, self.settings.positions))
            for layer in self._models
        ]
        for kind in kinds:
            kind.model.star = star
            kind.warm_up()
            took = kind.warm_up()
            if star.rank.is_hub:
                kind.count = max(1, math.ceil(LAYERS_S / _TURNS / max(took, 1e-6)))
                send_note(star, StepCount(kind.count))
            else:
                kind.count = receive_note(star, StepCount).count
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(_TURNS):
            for kind in kinds:
                kind.run()
        self.used = (time.process_time() - cpu) / (time.perf_counter() - began)
        return [kind.timing() for kind in kinds]

    def head(self) -> tuple[int, float, float]:
        """Rank 0's head, for one position: (bytes of its tiles, seconds, processor seconds)."""
        model, x = self._models[0].model, self._vectors(1)
        nbytes = sum(record.nbytes for record in self._records(self._parts[0])[1] if record.block.kind == "head")
        model.logits(x)
        count, began, cpu = 0, time.perf_counter(), time.process_time()
        while count < 3 or time.perf_counter() < began + LAYERS_S / 2:
            model.logits(x)
            count += 1
        return nbytes, (time.perf_counter() - began) / count, (time.process_time() - cpu) / count

    def _vectors(self, positions: int) -> F32:
        shape = (positions, self._config.hidden)
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class _LayerModel:
    """A model of one layer, and its weights."""

    model: Model
    ring: WeightRing
    experts: ExpertRing

    @property
    def step_bytes(self) -> int:
        """What the last step went through."""
        return self.ring.layer_bytes + self.experts.last_bytes


class _Steps:
    """Steps through one layer, timed."""

    count = 1  # of a turn

    def __init__(self, layer: _LayerModel, x: F32, start: int) -> None:
        self.model, self._layer, self._x, self._start = layer.model, layer, x, start
        self._bytes = 0
        self._walls: list[float] = []
        self._computes: list[float] = []
        self._cpu = 0.0

    def warm_up(self) -> float:
        """A step that does not count; returns the seconds it took."""
        began = time.perf_counter()
        self.model.forward(self._x, self._start)
        return time.perf_counter() - began

    def run(self) -> None:
        """A turn. The first step brings all ranks together, and does not count."""
        self.warm_up()
        cpu = time.process_time()
        for _ in range(self.count):
            began, before = time.perf_counter(), self.model.compute_seconds
            self.model.forward(self._x, self._start)
            self._walls.append(time.perf_counter() - began)
            self._computes.append(self.model.compute_seconds - before)
        self._cpu += time.process_time() - cpu
        self._bytes = self._layer.step_bytes

    def timing(self) -> LayerTiming:
        """Medians, which leave out the times when the rank was stopped, or another program ran; but all processor time."""
        cpu = self._cpu / len(self._walls)
        return LayerTiming(len(self._x), self._bytes, median(self._walls), median(self._computes), cpu)


def _max_weights(promise: int | None) -> int:
    """Bytes of made-up weights that this rank has room for."""
    free = headroom(places()) if promise is None else promise - resident_bytes()
    return min(MAX_WEIGHT_BYTES, max(MIN_WEIGHT_BYTES, free // 3))


def _rows_within(config: ModelConfig, fmt: str, nbytes: int) -> int:
    """Rows of the head, all or as many as fit into so many bytes."""
    whole = packed_bytes(fmt, config.vocab, config.hidden)
    return max(64, min(config.vocab, config.vocab * nbytes // whole))


def sustained(marks: Sequence[tuple[float, float]]) -> float:
    """Processor seconds a second, from (wall clock, processor clock) after each of many equal pieces of work.

    Where some took much longer than usual, since the rank was stopped, it is measured from the end of the first such piece
    to that of the last, which are whole periods of being stopped: what was saved up before does not count then.
    """
    lengths = [after[0] - before[0] for before, after in pairwise(marks)]
    usual = median(lengths)
    stalls = [number for number, length in enumerate(lengths, start=1) if length > max(_STALL_RATIO * usual, 1e-3)]
    first, last = (stalls[0], stalls[-1]) if len(stalls) > 2 else (0, len(marks) - 1)
    return (marks[last][1] - marks[first][1]) / max(marks[last][0] - marks[first][0], 1e-9)
