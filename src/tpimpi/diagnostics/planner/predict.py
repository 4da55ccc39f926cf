"""How long a token takes, before anything is sliced: pure arithmetic on what was measured, a model and its shares.

A layer of a rank takes `fixed + per_byte * bytes` seconds, of the bytes of its tiles there (a `LinearCost`); half of
the fixed part belongs to attention and half to the MLP. The ranks wait for each other at each allreduce (two a layer as a
rule, see engine.watch.sums_of; one that is of sums of squares takes as long as that of one position), and for rank 0's head,
which is its own; what rank 0 says next reaches the others half an allreduce later. So of the time of a token

    path        sum over blocks of (the slowest rank's block + an allreduce) + head + allreduce / 2
    processor   of each rank: processor seconds of a token / processors that it gets in the long run
    disk        of each rank: bytes streamed / bytes a second

it takes the largest. A control group with half a core lets a rank run at full speed for some milliseconds and then stops
it: a rank that waits half of its time for the star is never stopped, so speed at work and in the long run are two figures.

The first token is the same for the positions of the prompt, a chunk at a time, and one head. Reading weights for the
first time is not counted. A step of several sequences (`Workload.parallel`) is the same for a position of each, with the
keys and values of all of them in memory, full.

Of a mixture a token goes through the experts that it chooses: their bytes compute as all others do, and those that are not
in the expert cache (see HitCurve) are read. A run also reads some that are expected and not chosen then, which is not
counted; nor that reads may wait for the router, as a run reads ahead what it expects.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpimpi.diagnostics.options import Workload
from tpimpi.diagnostics.planner.costs import LayerCost, Measured
from tpimpi.diagnostics.planner.drafting import DraftCost
from tpimpi.diagnostics.planner.hits import HitCurve
from tpimpi.diagnostics.planner.loads import LayerLoad, Load, Loads
from tpimpi.diagnostics.planner.prediction import ExpertsHeld, Prediction
from tpimpi.engine.budget import Needs, allowances, make_budget
from tpimpi.engine.chunk import mixture_chunk
from tpimpi.engine.needs import LONGEST_DRAFT, needs_of_model
from tpimpi.engine.overlap import default_chunk
from tpimpi.engine.watch import sums_of
from tpimpi.errors import InputError
from tpimpi.models.blocks import layer_blocks
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.partition import Partition, make_partition

# What comes out


@dataclass(frozen=True)
class Holding:
    """What a rank does with its memory, in bytes: all that it takes, what is streamed for each token of what every token
    uses, and its expert cache."""

    taken: int
    streamed: int
    experts: int


class Predictor:
    """Predicts what a workload's plans take, with the ranks of `measured`."""

    def __init__(self, workload: Workload, measured: Measured, hits: HitCurve | None = None) -> None:
        """`hits` is the workload's curve, where it was made already."""
        self.workload, self.measured = workload, measured
        self.loads = Loads(workload.config, workload.formats)
        config = workload.config
        blocks = [block for layer in range(config.layers) for block in layer_blocks(config, layer)]
        # Of a step, by the kind of the block that a sum ends with.
        self._sums = Counter(blocks[one.last].kind for one in sums_of(config, blocks))
        self.hits = hits or HitCurve(workload.config, workload.routing)
        self.draft = None if workload.draft is None else DraftCost(*workload.draft)
        self._found: dict[tuple[float, ...], Prediction] = {}

    def predict(self, weights: Sequence[float]) -> Prediction:
        """Of shares in these proportions, one a rank. Raises InputError for proportions that make_partition refuses."""
        key = tuple(weights)
        if key not in self._found:
            self._found[key] = self._predict(make_partition(self.workload.config, weights))
        return self._found[key]

    def _predict(self, partition: Partition) -> Prediction:
        loads = [self.loads.load(share, rank) for rank, share in enumerate(partition.shares)]
        try:
            held, chunk = self.memory(partition, loads)
        except InputError as error:
            never = (math.inf,) * 7
            return Prediction(partition.describe(), *never, "memory", 0, (), (), str(error))
        experts = [self.experts(load, each.experts) for load, each in zip(loads, held, strict=True)]
        streamed = [each.streamed + own.read_bytes for each, own in zip(held, experts, strict=True)]
        compute, star = self.blocks(loads, 1)
        head = self.measured.head.seconds(loads[0].head)
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
            shares=partition.describe(),
            s_per_token=token,
            first_token_s=self._first_token(loads, held, experts, chunk) + head,
            compute_s=compute,
            star_s=star,
            head_s=head,
            disk_s=max(disk),
            processor_s=max(processor),
            limit=limit,
            limit_rank=whose,
            memory=tuple(each.taken for each in held),
            streamed=tuple(streamed),
            experts=tuple(experts) if self.workload.config.experts else (),
            prompt_chunk=chunk,
            tokens_per_s=self._tokens_per_s(partition, loads) if self.workload.parallel > 1 else 0.0,
            **self._speculation(partition, loads, held, token),
        )

    def _speculation(
        self, partition: Partition, loads: Sequence[Load], held: Sequence[Holding], token: float
    ) -> dict[str, Any]:
        """The draft that is best where each drafted token is accepted at the workload's rate: with rate a a pass that checks
        n gives (1 - a**(n + 1)) / (1 - a) tokens (arXiv 2211.17192, equation 1). Drafting costs nothing, unless a model does
        it: that takes time and memory."""
        rate, each = self.workload.accepted, 0.0
        if rate is None:
            return {}
        best, length = token, 0
        streamed: tuple[int, ...] = ()
        if self.draft is not None:
            each = self._draft_token(self.draft)
            try:
                held, _ = self.memory(
                    partition, loads, beside=self.draft.memory(self.workload, self.measured.ranks[0].backend)
                )
            except InputError:
                return {"drafted_s_per_token": best, "draft": length}
            streamed = tuple(one.streamed for one in held)
        missed = [1.0 - self.experts(load, one.experts).hits for load, one in zip(loads, held, strict=True)]
        for n in range(1, LONGEST_DRAFT + 1):
            tokens = n + 1 if rate == 1 else (1 - rate ** (n + 1)) / (1 - rate)
            seconds = (self._step(loads, held, missed, n + 1) + self._head(loads, n + 1) + n * each) / tokens
            if seconds < best:
                best, length = seconds, n
        return {"drafted_s_per_token": best, "draft": length, "drafted_streamed": streamed}

    def _draft_token(self, draft: DraftCost) -> float:
        """Seconds that rank 0 takes to draft a token."""
        cost = self._layer_cost(0, 1).wall
        return (
            draft.layers * cost.fixed + cost.per_byte * draft.layer_bytes + self.measured.head.seconds(draft.head_bytes)
        )

    def _head(self, loads: Sequence[Load], rows: int) -> float:
        """Seconds of the head for so many rows: as many times those of one as a layer takes."""
        one, several = (self._layer_cost(0, n).wall.per_byte for n in (1, rows))
        return self.measured.head.seconds(loads[0].head) * (several / one if one else 1.0)

    def _tokens_per_s(self, partition: Partition, loads: Sequence[Load]) -> float:
        """Of all sequences together; 0 where there is no memory for them."""
        sequences = self.workload.parallel
        try:
            held, _ = self.memory(partition, loads, sequences)
        except InputError:
            return 0.0
        missed = [1.0 - self.experts(load, each.experts).hits for load, each in zip(loads, held, strict=True)]
        return sequences / (self._step(loads, held, missed, sequences) + self._head(loads, sequences))

    def _first_token(
        self, loads: Sequence[Load], held: Sequence[Holding], experts: Sequence[ExpertsHeld], chunk: int
    ) -> float:
        """Without the head. A chunk uses what is in the cache and what is not alike, whatever its positions share."""
        missed = [1.0 - one.held / max(1, one.of) for one in experts]
        return sum(self._step(loads, held, missed, positions) for positions in chunks(self.workload.prompt, chunk))

    def _step(self, loads: Sequence[Load], held: Sequence[Holding], missed: Sequence[float], positions: int) -> float:
        """Of so many positions, without the head; `missed` is the part of used experts that each rank reads."""
        step = sum(self.blocks(loads, positions))
        for rank, load in enumerate(loads):
            used = self.used(positions) * sum(layer.count * layer.expert for layer in load.layers)
            streamed = held[rank].streamed + round(used * missed[rank])
            rest = self._processor(rank, load, positions, streamed, head=False)
            step = max(step, rest, self._disk(rank, streamed))
        return step

    # Experts

    def used(self, positions: int) -> float:
        """Experts of a layer that a step of so many positions uses."""
        return self.hits.distinct(positions) if self.workload.config.experts else 0.0

    def experts(self, load: Load, cache: int) -> ExpertsHeld:
        """What a cache of so many bytes does for a rank."""
        place = max((record.nbytes for record in load.experts), default=0)
        if not place:
            return ExpertsHeld(0, 0, 1.0, 0, 0)
        held = min(load.expert_count, cache // place)
        hits = self.hits.at(held / load.expert_count)
        return ExpertsHeld(held, load.expert_count, hits, load.chosen_bytes, round((1 - hits) * load.chosen_bytes))

    # Times

    def _layer_cost(self, rank: int, positions: int) -> LayerCost:
        speed = self.measured.ranks[rank]
        return speed.token.interpolate(speed.chunk, self._part(positions))

    def _part(self, positions: int) -> float:
        """Where so many positions lie between one (0) and the chunk that was measured (1)."""
        return (positions - 1) / (self.measured.positions - 1) if self.measured.positions > 1 else 0.0

    def allreduce(self, positions: int) -> float:
        """Seconds of an allreduce of so many positions."""
        measured = self.measured
        more = measured.allreduce_chunk_s - measured.allreduce_s
        return measured.allreduce_s + max(0.0, more) * self._part(positions)

    def blocks(self, loads: Sequence[Load], positions: int) -> tuple[float, float]:
        """What all layers take on the path: (the slowest ranks' blocks, star)."""
        costs = [self._layer_cost(rank, positions).wall for rank in range(len(loads))]
        compute, used = 0.0, self.used(positions)
        for kinds in zip(*(load.layers for load in loads), strict=True):
            parts = [[kind.attn for kind in kinds], [kind.mlp + used * kind.expert for kind in kinds]]
            if self.workload.config.parallel_blocks:  # nobody waits between the two
                parts = [[attn + mlp for attn, mlp in zip(*parts, strict=True)]]
            for sizes in parts:
                slowest = max(
                    cost.fixed / len(parts) + cost.per_byte * size for cost, size in zip(costs, sizes, strict=True)
                )
                compute += kinds[0].count * slowest
        if len(loads) == 1:
            return compute, 0.0
        small = self._sums["qkv"]  # two numbers a position
        whole = self._sums.total() - small
        return compute, self.allreduce(positions) * (whole + 0.5) + self.measured.allreduce_s * small

    def _slowest(self, loads: Sequence[Load]) -> int:
        """The rank that computes longest."""
        times = [
            sum(
                layer.count * self.measured.ranks[rank].token.wall.seconds(size) for layer, size in self._sizes(load, 1)
            )
            for rank, load in enumerate(loads)
        ]
        return times.index(max(times))

    def _sizes(self, load: Load, positions: int) -> Iterator[tuple[LayerLoad, float]]:
        """The kinds of layers, and the bytes that a step of so many positions goes through in one."""
        used = self.used(positions)
        return ((layer, layer.attn + layer.mlp + used * layer.expert) for layer in load.layers)

    def _processor(self, rank: int, load: Load, positions: int, streamed: int, *, head: bool = True) -> float:
        """Processor time of a step on a rank, over the processors that it gets."""
        speed, cpu = self.measured.ranks[rank], self._layer_cost(rank, positions).cpu
        total = sum(layer.count * cpu.seconds(size) for layer, size in self._sizes(load, positions))
        if rank == 0 and head:
            total += self.measured.head_cpu.seconds(load.head)
        return (total + streamed * speed.read_cpu_s_per_byte) / max(speed.processors, 1e-6)

    def _disk(self, rank: int, streamed: int) -> float:
        rate = self.measured.ranks[rank].disk_bytes_per_s
        return streamed / rate if streamed and rate else 0.0

    # Memory

    def needs(self, partition: Partition, rank: int, load: Load, chunk: int | None = None, sequences: int = 1) -> Needs:
        """What a rank would need, as an engine reckons it; with chunks of the usual size unless `chunk` says another."""
        speed, workload = self.measured.ranks[rank], self.workload
        needs = needs_of_model(
            Header(rank, workload.formats, "", "", workload.config, partition, ()),
            load.records,
            tiles=load.tiles,
            base=speed.base,
            backend=speed.backend,
            kv_format=workload.kv_format,
            allreduce=self.measured.allreduce,
            context=workload.context,
            chunk=chunk or workload.chunk or default_chunk(workload.config),
            logit_rows=sequences,
            experts=load.experts,
            expert_count=load.expert_count,
        )
        return replace(needs, cache=needs.cache * sequences)

    def memory(
        self, partition: Partition, loads: Sequence[Load], sequences: int = 1, beside: int = 0
    ) -> tuple[list[Holding], int]:
        """What each rank does with its memory, of which rank 0 has so many bytes for something else `beside`; and the
        positions of a chunk. Raises InputError where it has too little."""
        workload = self.workload

        def all_needs(positions: int | None) -> dict[int, Needs]:
            found = {rank: self.needs(partition, rank, load, positions, sequences) for rank, load in enumerate(loads)}
            return found | {0: replace(found[0], work=found[0].work + beside)}

        needs = all_needs(None)
        chunk = workload.chunk or default_chunk(workload.config)
        if workload.window is not None:
            return self._in_window(needs, loads, workload.window), chunk
        promises = self.promises(needs)
        if workload.config.experts and workload.chunk is None:
            chunk = mixture_chunk(list(needs.values()), promises, workload.context)
            needs = all_needs(chunk)
        held = []
        for rank, need in needs.items():
            where = f"r{rank} {self.measured.ranks[rank].host}"
            budget = make_budget(need, promises[rank], f"{where} has {promises[rank] / 1e6:.0f} MB")
            left = need.tiles - budget.pinned
            taken = need.fixed + budget.pinned + budget.experts + (budget.buffers if left else 0)
            held.append(Holding(taken, left, budget.experts))
        return held, chunk

    def _in_window(self, needs: Mapping[int, Needs], loads: Sequence[Load], window: int | str) -> list[Holding]:
        """The same with `--window`: so many blocks in memory, or all."""
        found = []
        for need, load in zip(needs.values(), loads, strict=True):
            held = (
                load.tiles if window == "all" else int(window) * max(max(kind.attn, kind.mlp) for kind in load.layers)
            )
            whole = held >= load.tiles
            experts = need.experts if window == "all" else need.min_experts
            taken = need.fixed + (load.tiles if whole else held) + experts
            found.append(Holding(taken, 0 if whole else load.tiles, experts))
        return found

    def promises(self, needs: Mapping[int, Needs]) -> list[int]:
        """What each rank may take, in rank order."""
        ranks = self.measured.ranks[: len(needs)]
        if (sizes := self.workload.memory) is not None:
            return list(sizes[: len(needs)]) if len(sizes) > 1 else list(sizes) * len(needs)
        places = {rank: speed.places for rank, speed in enumerate(ranks)}
        found = allowances(places, {rank: speed.host for rank, speed in enumerate(ranks)}, needs)
        return [found[rank] for rank in range(len(needs))]


def chunks(prompt: int, chunk: int) -> Iterator[int]:
    """The positions that are computed at once, `chunk` at most, one after the other, of a prompt of so many."""
    for start in range(0, prompt, chunk):
        yield min(chunk, prompt - start)
