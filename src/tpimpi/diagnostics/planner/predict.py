"""How long a token takes, before anything is sliced: pure arithmetic on what was measured, a model and its shares.

A layer of a rank takes `fixed + per_byte * bytes` seconds, of the bytes of its tiles there (a `LinearCost`); half of
the fixed part belongs to attention and half to the MLP. The ranks wait for each other at each of the 2 * layers
allreduces, and for rank 0's head, which is its own; what rank 0 says next reaches the others half an allreduce later. So
of the time of a token

    path        sum over blocks of (the slowest rank's block + an allreduce) + head + allreduce / 2
    processor   of each rank: processor seconds of a token / processors that it gets in the long run
    disk        of each rank: bytes streamed / bytes a second

it takes the largest. A control group with half a core lets a rank run at full speed for some milliseconds and then stops
it: a rank that waits half of its time for the star is never stopped, so speed at work and in the long run are two figures.

The first token is the same for the positions of the prompt, DENSE_CHUNK at a time, and one head. Reading weights for the
first time is not counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from tpimpi.diagnostics.options import Workload
from tpimpi.engine.budget import Needs, allowances, make_budget
from tpimpi.engine.needs import needs_of_model
from tpimpi.engine.overlap import DENSE_CHUNK
from tpimpi.errors import InputError
from tpimpi.models.blocks import LAYER_KINDS
from tpimpi.models.config import ModelConfig
from tpimpi.models.weight_formats import LayerFormats, ModelFormats
from tpimpi.system.memory import Place
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Record, slice_records
from tpimpi.weights.slices.partition import Partition, Share, make_partition

# What was measured


@dataclass(frozen=True)
class LinearCost:
    """Seconds for so many bytes: fixed + per_byte * bytes."""

    fixed: float
    per_byte: float

    def at(self, nbytes: float) -> float:
        return self.fixed + self.per_byte * nbytes

    def between(self, other: LinearCost, part: float) -> LinearCost:
        """So far from this line (0) to the other (1)."""
        return LinearCost(
            self.fixed + (other.fixed - self.fixed) * part,
            self.per_byte + (other.per_byte - self.per_byte) * part,
        )

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> LinearCost:
        """Through two points (bytes, seconds), as far as neither the fixed part nor the slope is negative."""
        (x1, y1), (x2, y2) = sorted((first, second))
        if x2 <= x1 or y2 <= y1:
            return cls((y1 + y2) / 2, 0.0)
        slope = (y2 - y1) / (x2 - x1)
        if y1 < slope * x1:
            return cls(0.0, y2 / x2)
        return cls(y1 - slope * x1, slope)


@dataclass(frozen=True)
class LayerCost:
    """What a layer takes on a rank, with so many positions at once: seconds, and processor seconds, waiting included."""

    wall: LinearCost
    cpu: LinearCost

    def between(self, other: LayerCost, part: float) -> LayerCost:
        return LayerCost(self.wall.between(other.wall, part), self.cpu.between(other.cpu, part))


@dataclass(frozen=True)
class RankSpeed:
    """What one rank can do while the others are at work too. `processors` are those that it gets in the long run."""

    host: str
    token: LayerCost  # one position
    chunk: LayerCost  # `Measured.positions` at once
    processors: float
    base: int  # bytes that it has resident without a model
    places: tuple[Place, ...]  # memory that it shares
    threads: int = 1
    backend: str = "native"
    disk_bytes_per_s: float = 0.0  # 0 where it was not measured
    read_cpu_s_per_byte: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What was measured of ranks that were at work together, in rank order."""

    ranks: tuple[RankSpeed, ...]
    positions: int  # of a chunk
    allreduce_s: float  # of one position, from the slowest rank's partial to its sum
    allreduce_chunk_s: float
    head: LinearCost  # rank 0's, of one position
    head_cpu: LinearCost
    allreduce: str = "star"  # the rule by which a run makes its sums


# What a plan asks of a rank


@dataclass(frozen=True)
class Load:
    """What one rank has to go through for a token, in bytes of tiles."""

    layers: tuple[tuple[int, int, int], ...]  # layers of one kind: how many, attention of each, MLP of each
    head: int
    records: tuple[Record, ...]  # of a layer of each kind, and of the head

    @property
    def tiles(self) -> int:
        return self.head + sum(count * (attn + mlp) for count, attn, mlp in self.layers)


class Loads:
    """The loads of a model's shares, each worked out once."""

    def __init__(self, config: ModelConfig, formats: ModelFormats) -> None:
        self._config = config
        self._counts: Mapping[LayerFormats, int] = Counter(formats.layers)
        kinds = tuple(self._counts)
        self._formats = replace(formats, layers=kinds)
        self._small = config.with_layers(len(kinds))
        self._found: dict[tuple[Share, bool], Load] = {}

    def of(self, share: Share, rank: int) -> Load:
        key = (share, rank == 0)
        if key not in self._found:
            records = [
                record
                for record in slice_records(self._small, share, rank, self._formats, {})
                if record.block.kind in (*LAYER_KINDS, "head")
            ]
            sizes = {(kind, layer): 0 for kind in LAYER_KINDS for layer in range(len(self._counts))}
            for record in records:
                if record.block.kind != "head":
                    sizes[record.block] += record.nbytes
            layers = tuple(
                (count, sizes["qkv", layer] + sizes["attn", layer], sizes["mlp", layer])
                for layer, count in enumerate(self._counts.values())
            )
            head = sum(record.nbytes for record in records if record.block.kind == "head")
            self._found[key] = Load(layers, head, tuple(records))
        return self._found[key]


# What comes out


@dataclass(frozen=True)
class Prediction:
    """Of one plan: times in seconds, memory in bytes for each rank. Where it cannot work `problem` says why, and the times
    are infinite."""

    shares: str
    s_per_token: float
    first_token_s: float
    compute_s: float  # of a token, on the path: the slowest rank's blocks
    star_s: float
    head_s: float
    disk_s: float  # the longest that a rank's reading takes
    processor_s: float  # the same of its processor time over the processors that it gets
    limit: str  # "compute", "star", "processor", "disk" or "memory"
    limit_rank: int  # whose; of the star 0
    memory: tuple[int, ...]
    streamed: tuple[int, ...]  # for each token
    problem: str = ""


class Predictor:
    """Predicts what a workload's plans take, with the ranks of `measured`."""

    def __init__(self, workload: Workload, measured: Measured) -> None:
        self.workload, self.measured = workload, measured
        self.loads = Loads(workload.config, workload.formats)
        self._found: dict[tuple[float, ...], Prediction] = {}

    def predict(self, weights: Sequence[float]) -> Prediction:
        """Of shares in these proportions, one a rank. Raises InputError for proportions that make_partition refuses."""
        key = tuple(weights)
        if key not in self._found:
            self._found[key] = self._predict(make_partition(self.workload.config, weights))
        return self._found[key]

    def _predict(self, plan: Partition) -> Prediction:
        loads = [self.loads.of(share, rank) for rank, share in enumerate(plan.shares)]
        try:
            memory, streamed = self.memory(plan, loads)
        except InputError as error:
            never = (math.inf,) * 7
            return Prediction(plan.describe(), *never, "memory", 0, (), (), str(error))
        compute, star = self.blocks(loads, 1)
        head = self.measured.head.at(loads[0].head)
        path = compute + star + head
        disk = [self._disk(rank, nbytes) for rank, nbytes in enumerate(streamed)]
        processor = [self._processor(rank, load, 1, streamed[rank]) for rank, load in enumerate(loads)]
        limit, whose = "compute", self._slowest(loads)
        if star > compute + head:
            limit, whose = "star", 0
        elif head > compute:
            whose = 0
        token = path
        for name, seconds in (("processor", processor), ("disk", disk)):
            if max(seconds) > token:
                token, limit, whose = max(seconds), name, seconds.index(max(seconds))
        return Prediction(
            shares=plan.describe(),
            s_per_token=token,
            first_token_s=self._first_token(loads, streamed, head),
            compute_s=compute,
            star_s=star,
            head_s=head,
            disk_s=max(disk),
            processor_s=max(processor),
            limit=limit,
            limit_rank=whose,
            memory=tuple(memory),
            streamed=tuple(streamed),
        )

    def _first_token(self, loads: Sequence[Load], streamed: Sequence[int], head: float) -> float:
        total = head
        for positions in chunks(self.workload.prompt):
            step = sum(self.blocks(loads, positions))
            for rank, load in enumerate(loads):
                rest = self._processor(rank, load, positions, streamed[rank], head=False)
                step = max(step, rest, self._disk(rank, streamed[rank]))
            total += step
        return total

    def _layer_cost(self, rank: int, positions: int) -> LayerCost:
        speed = self.measured.ranks[rank]
        return speed.token.between(speed.chunk, self._part(positions))

    def _part(self, positions: int) -> float:
        """Where so many positions lie between one (0) and the chunk that was measured (1)."""
        return (positions - 1) / (self.measured.positions - 1) if self.measured.positions > 1 else 0.0

    def allreduce(self, positions: int) -> float:
        measured = self.measured
        more = measured.allreduce_chunk_s - measured.allreduce_s
        return measured.allreduce_s + max(0.0, more) * self._part(positions)

    def blocks(self, loads: Sequence[Load], positions: int) -> tuple[float, float]:
        """What all layers take on the path: (the slowest ranks' blocks, star)."""
        costs = [self._layer_cost(rank, positions).wall for rank in range(len(loads))]
        compute = 0.0
        for kinds in zip(*(load.layers for load in loads), strict=True):
            for block in (1, 2):
                slowest = max(
                    cost.fixed / 2 + cost.per_byte * kind[block] for cost, kind in zip(costs, kinds, strict=True)
                )
                compute += kinds[0][0] * slowest
        if len(loads) == 1:
            return compute, 0.0
        return compute, self.allreduce(positions) * 2 * self.workload.config.layers + self.allreduce(positions) / 2

    def _slowest(self, loads: Sequence[Load]) -> int:
        """The rank that computes longest."""
        times = [
            sum(count * self.measured.ranks[rank].token.wall.at(attn + mlp) for count, attn, mlp in load.layers)
            for rank, load in enumerate(loads)
        ]
        return times.index(max(times))

    def _processor(self, rank: int, load: Load, positions: int, streamed: int, *, head: bool = True) -> float:
        """Processor time of a step on a rank, over the processors that it gets."""
        speed, cpu = self.measured.ranks[rank], self._layer_cost(rank, positions).cpu
        total = sum(count * cpu.at(attn + mlp) for count, attn, mlp in load.layers)
        if rank == 0 and head:
            total += self.measured.head_cpu.at(load.head)
        return (total + streamed * speed.read_cpu_s_per_byte) / max(speed.processors, 1e-6)

    def _disk(self, rank: int, streamed: int) -> float:
        rate = self.measured.ranks[rank].disk_bytes_per_s
        return streamed / rate if streamed and rate else 0.0

    # Memory

    def needs(self, plan: Partition, rank: int, load: Load) -> Needs:
        """What a rank would need, as an engine reckons it."""
        speed, workload = self.measured.ranks[rank], self.workload
        return needs_of_model(
            Header(rank, workload.formats, "", "", workload.config, plan, ()),
            load.records,
            tiles=load.tiles,
            base=speed.base,
            backend=speed.backend,
            kv=workload.kv,
            allreduce=self.measured.allreduce,
            context=workload.context,
        )

    def memory(self, plan: Partition, loads: Sequence[Load]) -> tuple[list[int], list[int]]:
        """What each rank takes, and what it streams for a token, in bytes. Raises InputError where it has too little."""
        needs = {rank: self.needs(plan, rank, load) for rank, load in enumerate(loads)}
        if (window := self.workload.window) is not None:
            return self._in_window(needs, loads, window)
        promises = self.promises(needs)
        taken, streamed = [], []
        for rank, need in needs.items():
            where = f"r{rank} {self.measured.ranks[rank].host}"
            budget = make_budget(need, promises[rank], f"{where} has {promises[rank] / 1e6:.0f} MB")
            left = need.tiles - budget.pinned
            streamed.append(left)
            taken.append(need.fixed + budget.pinned + (budget.buffers if left else 0))
        return taken, streamed

    def _in_window(
        self, needs: Mapping[int, Needs], loads: Sequence[Load], window: int | str
    ) -> tuple[list[int], list[int]]:
        """The same with `--window`: so many blocks in memory, or all."""
        taken, streamed = [], []
        for need, load in zip(needs.values(), loads, strict=True):
            held = load.tiles if window == "all" else int(window) * max(max(kind[1:]) for kind in load.layers)
            whole = held >= load.tiles
            taken.append(need.fixed + (load.tiles if whole else held))
            streamed.append(0 if whole else load.tiles)
        return taken, streamed

    def promises(self, needs: Mapping[int, Needs]) -> list[int]:
        """What each rank may take, in rank order."""
        ranks = self.measured.ranks[: len(needs)]
        if (sizes := self.workload.memory) is not None:
            return list(sizes[: len(needs)]) if len(sizes) > 1 else list(sizes) * len(needs)
        places = {rank: speed.places for rank, speed in enumerate(ranks)}
        found = allowances(places, {rank: speed.host for rank, speed in enumerate(ranks)}, needs)
        return [found[rank] for rank in range(len(needs))]


def chunks(prompt: int) -> Iterator[int]:
    """The positions that are computed at once, one after the other, of a prompt of so many."""
    for start in range(0, prompt, DENSE_CHUNK):
        yield min(DENSE_CHUNK, prompt - start)
