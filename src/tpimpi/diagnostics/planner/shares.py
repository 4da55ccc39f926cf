"""Shares for unequal ranks: those that are predicted to take least, in small whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from tpimpi.diagnostics.planner.predict import Predictor
from tpimpi.diagnostics.planner.prediction import Prediction
from tpimpi.weights.slices.partition import make_partition

MAX_WEIGHT = 16  # of a rank: they stay short
# Shares are as good as the best if they are predicted to take at most so many times the best's time.
EQUAL_SHARES_TOLERANCE = 1.1
SHORT_SHARES_TOLERANCE = 1.03
SLICED_SHARES_TOLERANCE = 1.15  # those for which there are slices already
_HALVINGS = 40  # of an interval, in search of a time or a part


def best_shares(predictor: Predictor, ranks: int) -> Prediction:
    """The shares that take least, in whole numbers up to MAX_WEIGHT; of those that are as good the shortest; but equal
    ones unless others are clearly better.

    What the ranks can bear in real numbers is rounded in every way that MAX_WEIGHT allows; the best of these is improved by
    steps of one, since heads are not divided.
    """
    equal = (1,) * ranks
    tried = {equal}
    if ranks > 1:
        ideal = _ideal(predictor, ranks)
        tried |= {_whole(ideal, most) for most in range(1, MAX_WEIGHT + 1)}
    best = min(tried, key=lambda weights: predictor.predict(weights).s_per_token)
    better: tuple[int, ...] | None = best
    while better is not None and ranks > 1:
        best, limit = better, predictor.predict(better).s_per_token * 0.998
        steps = {_reduced(step) for step in _neighbours(best)}
        tried |= steps
        found = min(steps, key=lambda weights: predictor.predict(weights).s_per_token)
        better = found if predictor.predict(found).s_per_token < limit else None
    least = predictor.predict(best).s_per_token
    if predictor.predict(equal).s_per_token <= least * EQUAL_SHARES_TOLERANCE:
        return predictor.predict(equal)
    good = [weights for weights in tried if predictor.predict(weights).s_per_token <= least * SHORT_SHARES_TOLERANCE]
    return predictor.predict(
        min(good, key=lambda weights: (max(weights), predictor.predict(weights).s_per_token, weights))
    )


def _ideal(predictor: Predictor, ranks: int) -> list[float]:
    """Parts of the model, in real numbers that add up to 1, with which the slowest rank takes least."""
    times = [_RankTime(predictor, rank, ranks) for rank in range(ranks)]

    def parts(seconds: float) -> list[float]:
        return [time.largest_part(seconds) for time in times]

    low, high = 0.0, max(time.seconds(1.0) for time in times)
    if math.isinf(high):
        high = 1e9
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(parts(middle)) >= 1 else (middle, high)
    found = parts(high)
    return [part / sum(found) for part in found] if sum(found) > 0 else [1 / ranks] * ranks


class _RankTime:
    """What a token would take if it waited for this rank alone, as a function of its part of the model."""

    def __init__(self, predictor: Predictor, rank: int, ranks: int) -> None:
        workload, measured = predictor.workload, predictor.measured
        self._speed, self._layers = measured.ranks[rank], workload.config.layers
        whole = make_partition(workload.config, [float(other == rank) for other in range(ranks)])
        load = predictor.loads.load(whole.shares[rank], rank)
        self._window = workload.window
        self._head, self._bytes, self._chosen = load.head, load.tiles - load.head, load.chosen_bytes
        self._hits = predictor.hits
        equal = make_partition(workload.config, [1.0] * ranks)
        loads = [predictor.loads.load(share, other) for other, share in enumerate(equal.shares)]
        needs = [predictor.needs(equal, other, load) for other, load in enumerate(loads)]
        self._need = predictor.needs(whole, rank, load)
        self._promise = predictor.promises(dict(enumerate(needs)))[rank]
        _, star = predictor.blocks(loads, 1)
        self._others = star + measured.head.seconds(loads[0].head)
        self._head_cpu = measured.head_cpu.seconds(self._head) if rank == 0 else 0.0

    def seconds(self, part: float) -> float:
        """What a token takes with this part of the model."""
        speed, nbytes = self._speed, part * (self._bytes + self._chosen)
        path = self._layers * speed.token.wall.fixed + speed.token.wall.per_byte * nbytes + self._others
        cpu = self._layers * speed.token.cpu.fixed + speed.token.cpu.per_byte * nbytes + self._head_cpu
        streamed = self._streamed(part)
        disk = streamed / speed.disk_bytes_per_s if speed.disk_bytes_per_s and streamed else 0.0
        cpu += streamed * speed.read_cpu_s_per_byte
        return max(path, cpu / max(speed.processors, 1e-6), disk)

    def _streamed(self, part: float) -> float:
        need, tiles = self._need, part * self._bytes + self._head
        if self._window is not None:
            return 0.0 if self._window == "all" else tiles + part * self._chosen
        left = self._promise - (need.fixed - need.cache) - part * need.cache
        experts, least = part * need.experts, part * need.min_experts
        if tiles + least <= left:
            return part * self._chosen * (1 - self._hits.at(min(1.0, (left - tiles) / experts))) if experts else 0.0
        room = left - need.usual_buffers - least
        return tiles - max(0.0, room) + part * self._chosen if left >= need.min_buffers + least else math.inf

    def largest_part(self, seconds: float) -> float:
        """The largest part with which it takes at most so long; 0 where none does."""
        if self.seconds(1.0) <= seconds:
            return 1.0
        low, high = 0.0, 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.seconds(middle) <= seconds else (low, middle)
        return low


def _whole(parts: Sequence[float], most: int) -> tuple[int, ...]:
    """Whole numbers in these proportions, the largest of them `most`."""
    return _reduced([round(part / max(parts) * most) for part in parts])


def _reduced(weights: Sequence[int]) -> tuple[int, ...]:
    divisor = math.gcd(*weights)
    return tuple(weight // divisor for weight in weights)


def _neighbours(weights: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """One weight a step up or down."""
    for rank, weight in enumerate(weights):
        for other in (weight - 1, weight + 1):
            changed = (*weights[:rank], other, *weights[rank + 1 :])
            if 0 <= other <= MAX_WEIGHT and any(changed):
                yield changed
