"""Latency and speed of the links between the ranks, as the hub measures them, and the allreduce that suits them."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.arrays import median
from tpimpi.errors import StarError
from tpimpi.star.allreduce import IN_RANK_ORDER
from tpimpi.star.channel import ECHO, Channel, Pending

PING_ROUNDS = 8  # at most; every rank gets a ping in each
PING_TIME_S = 0.12  # after this time three rounds are enough

TIMED_SIZES = (4096, 16_384, 65_536)  # sums of so many numbers are timed
TIMED_SIZES_IF_SLOW = (1024, 4096)
TRIAL_NUMBERS = 16_384  # the time of a star of so many numbers says how slow the links are:
SLOW_TRIAL_S = 0.025  # beyond this the largest of TIMED_SIZES is not timed,
VERY_SLOW_TRIAL_S = 0.08  # beyond this none of them
REPEATS, REPEATS_IF_SLOW = 3, 2  # sums in a row, of which the first does not count
SECOND_PASS_S = 0.2  # where the first pass over all sizes took less, there is a second
LARGEST_TIMED_NUMBERS = 1 << 20  # larger sums are never timed
TIMING_BUDGET_S = 0.6  # for the sums of all sizes, those of the largest included
LARGEST_ROUNDS = 4  # each algorithm makes REPEATS of the largest sum so many times, at most
NEAR_TIMES = (
    2.0  # an algorithm expected to take longer than so many times the fastest is not timed with the largest sum
)
ANSWER_TIMEOUT_S = 20.0  # for one message of a measurement
SLOW_ANSWER_S = 1.0
MAX_EXCHANGED_NUMBERS = 32_768  # of a sum by exchange, with three ranks or more: each holds all partials

# Which share of the star's time another algorithm may take and still be preferred, by the sum's size class and whether the
# hub's link carries fewer bytes than with the star: with n ranks (n - 1) sums go over it in a star, in a mesh 2 (n - 1) / n,
# fewer from three ranks on. Small sums: only what is clearly faster, as times vary. Where the largest was timed, what is as
# fast. Above all timed sizes bytes take the time, so the mesh is taken unless it was slower; far above them unless it took
# twice as long, as the number of messages counts less and less. What does not send less is judged there as at the largest.
SMALL, LARGE, ABOVE, FAR_ABOVE = "small", "large", "above", "far above"
FAR_ABOVE_TIMES = 4  # times the largest timed
ALLOWED_SHARES = {
    (SMALL, False): 0.9,
    (SMALL, True): 0.9,
    (LARGE, False): 1.0,
    (LARGE, True): 1.05,
    (ABOVE, True): 1 / 0.9,
    (FAR_ABOVE, True): 2.0,
}

_PING, _LATENCY, _SUM, _END = range(4)  # what the hub asks for: float64 [4]: kind, and up to three numbers

Times = Mapping[str, Sequence[tuple[int, float]]]  # algorithm -> (numbers, seconds) in ascending order


@dataclass
class Links:
    """What was measured: seconds one way from rank 0 to ranks 1, 2, …; and the `times` of the sums that were tried."""

    latencies: list[float]
    times: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def latency_s(self) -> float:
        """Of the slowest link, one way."""
        return max(self.latencies, default=0.0)


class LinkMeasurement:
    """One rank's part. `add(algorithm, numbers)` makes one sum of so many numbers, and returns when it has it."""

    def __init__(self, channel: Channel, add: Callable[[str, int], None]) -> None:
        self._channel, self._add = channel, add
        self._ask, self._answer = np.zeros(4), np.zeros(1)

    def lead(self, largest: int) -> Links:
        """Hub: measure latencies, and, where there are to be sums, of `largest` numbers at most, those among which `choose`
        does.

        Raises StarError where a rank does not answer.
        """
        self._channel.latency = None  # so that waiting suits any
        latencies = self._latencies()
        self._channel.latency = max(latencies)
        self._ask_all(_LATENCY, self._channel.latency)
        found = Links(latencies, self._sums(largest) if largest else {})
        self._ask_all(_END)
        self._channel.buffers.clear()
        return found

    def follow(self) -> None:
        """Other ranks: do what the hub asks for, until it has all it wants."""
        self._channel.latency = None
        while True:
            self._wait(self._channel.receive(self._ask, 0, ECHO))
            kind, first, second, third = self._ask.tolist()
            if kind == _END:
                self._channel.buffers.clear()
                return
            if kind == _LATENCY:
                self._channel.latency = first
            elif kind == _SUM:
                for _ in range(int(third)):
                    self._add(IN_RANK_ORDER[int(first)], int(second))
            else:
                self._wait(self._channel.send(self._answer, 0, ECHO))

    def _wait(self, pending: Pending) -> None:
        self._channel.wait(pending, time.monotonic() + ANSWER_TIMEOUT_S)

    def _ask_all(self, kind: int, *numbers: float) -> None:
        self._ask[:] = 0
        self._ask[: 1 + len(numbers)] = kind, *numbers
        self._wait(self._channel.send_to(self._ask, range(1, self._channel.size), ECHO))

    def _latencies(self) -> list[float]:
        """Half of the shortest round trip to each other rank; all are asked at once."""
        shortest = [math.inf] * (self._channel.size - 1)
        answers = np.empty((len(shortest), 1))
        start = time.monotonic()
        for turn in range(PING_ROUNDS):
            pending = {n: self._channel.receive(answers[n], n + 1, ECHO) for n in range(len(shortest))}
            began = time.monotonic()
            self._ask_all(_PING)
            while pending:
                for n, answer in list(pending.items()):
                    if self._channel.test(answer):
                        shortest[n] = min(shortest[n], time.monotonic() - began)
                        del pending[n]
                if time.monotonic() - began > 1e-3:
                    time.sleep(20e-6)
                else:
                    os.sched_yield()  # to a rank on this core, which else answers only when we sleep
                if time.monotonic() - began > SLOW_ANSWER_S:  # the heartbeat looks whether it was lost
                    self._wait(next(iter(pending.values())))
            if turn >= 2 and time.monotonic() - start > PING_TIME_S:
                break
        return [trip / 2 for trip in shortest]

    def _sums(self, largest: int) -> dict[str, list[tuple[int, float]]]:
        """Time the algorithms that add in rank order."""
        best: dict[tuple[str, int], float] = {}
        self._ask_all(_SUM, IN_RANK_ORDER.index("star"), TRIAL_NUMBERS, 2)
        start = self._end_of("star", TRIAL_NUMBERS)  # the first connects
        sizes, repeats = worth_timing(self._end_of("star", TRIAL_NUMBERS) - start)
        start = time.monotonic()
        for turn in range(2):
            for count in reversed(sizes):  # so that the links carry what they can before the small ones are timed
                for name in self._candidates(count):
                    best[name, count] = min([*self._trips(name, count, repeats), best.get((name, count), math.inf)])
            if turn == 0 and time.monotonic() - start > SECOND_PASS_S:
                break
        times = {n: [(count, best[n, count]) for count in sizes if (n, count) in best] for n in IN_RANK_ORDER}
        largest = min(largest, LARGEST_TIMED_NUMBERS)
        left = TIMING_BUDGET_S - (time.monotonic() - start)
        names, turns = worth_timing_largest(times, largest, self._candidates(largest), left)
        trips: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(turns):
            for name in names:
                seconds = self._trips(name, largest, REPEATS)
                if turn:  # the first is for the links to begin to carry what they can, and for buffers
                    trips[name] += seconds
        for name, seconds in trips.items():
            times[name].append((largest, median(seconds)))
        return times

    def _candidates(self, count: int) -> list[str]:
        """What may be chosen for so many numbers."""
        return [name for name in IN_RANK_ORDER if name != "exchange" or count <= max_exchanged(self._channel.size)]

    def _trips(self, name: str, count: int, repeats: int) -> list[float]:
        """Seconds of each of so many sums in a row, but the first."""
        self._ask_all(_SUM, IN_RANK_ORDER.index(name), count, repeats)
        try:
            ends = [self._end_of(name, count) for _ in range(repeats)]
        except StarError as error:
            if name == "star":
                raise
            hint = "where the ranks reach rank 0 but not one another, give --allreduce star"
            raise StarError(f"{error}; {hint}") from error
        return [b - a for a, b in itertools.pairwise(ends)]

    def _end_of(self, name: str, count: int) -> float:
        self._add(name, count)
        return time.monotonic()


def worth_timing(took: float) -> tuple[Sequence[int], int]:
    """The sizes of sums to time, and how many of each, where one star of TRIAL_NUMBERS numbers `took` so many seconds: over
    narrow or far links all of them would take seconds."""
    if took > VERY_SLOW_TRIAL_S:
        return TIMED_SIZES_IF_SLOW, REPEATS_IF_SLOW
    return TIMED_SIZES[:-1] if took > SLOW_TRIAL_S else TIMED_SIZES, REPEATS


def worth_timing_largest(times: Times, largest: int, names: Sequence[str], seconds: float) -> tuple[list[str], int]:
    """Which of these algorithms to time with `largest` numbers after `times` were measured, and how often, in so many
    seconds: the star and what is near it. Where links are so fast that it is the copying of bytes that takes the time,
    smaller sums do not tell which is best; where they are not, it would take too long, and the smaller ones tell."""
    took = {name: expected(times[name], largest) for name in names}
    near = [name for name in names if took[name] <= NEAR_TIMES * min(took.values())]
    if largest <= TIMED_SIZES[-1] or times["star"][-1][0] < TIMED_SIZES[-1] or "star" not in near or len(near) == 1:
        return [], 0
    turns = min(LARGEST_ROUNDS, int(seconds / (REPEATS * sum(took[name] for name in near))))
    return (near, turns) if turns > 1 else ([], 0)


def choose(times: Times, ranks: int) -> str:
    """The rule (see `allreduce.parse_rule`) for what was measured, with so many ranks: the exchange for small sums and the
    mesh for large ones, each as far as it is faster than the star by ALLOWED_SHARES; where both are, the faster one."""
    largest = times["star"][-1][0]
    sizes = sorted({*(1 << bits for bits in range(8, 25)), largest})
    below, small, large = 0, 0, math.inf  # the mesh is for sizes from `large` on, `below` is the one before
    for place in reversed(range(len(sizes))):
        if not _preferred("mesh", sizes[place], times, ranks):
            break
        below, large = sizes[max(0, place - 1)], sizes[place]
    for size in sizes:
        if size > max_exchanged(ranks) or not _preferred("exchange", size, times, ranks):
            break
        if size >= large and expected(times["mesh"], size) < expected(times["exchange"], size):
            break
        small = size
    if small == sizes[-1]:
        return "exchange"
    if large <= sizes[0]:
        return f"exchange:{small},mesh" if small else "mesh"
    steps = [f"exchange:{small}"] if small else []
    if large < math.inf and below > small:
        steps.append(f"star:{below}")
    return ",".join([*steps, "mesh" if large < math.inf else "star"])


def _preferred(name: str, size: int, times: Times, ranks: int) -> bool:
    """Whether an algorithm is to be preferred to the star for sums of `size` numbers."""
    largest = times["star"][-1][0]
    sends_less = name == "mesh" and ranks > 2
    size_class = _size_class(size if sends_less else min(size, largest), largest)
    at = largest if size_class == FAR_ABOVE else size  # times so far above are a guess
    allowed = ALLOWED_SHARES[size_class, sends_less]
    return expected(times[name], at) < allowed * expected(times["star"], at)


def _size_class(size: int, largest: int) -> str:
    """Of a sum of `size` numbers, where sums of up to `largest` numbers were timed: a key of ALLOWED_SHARES."""
    if size > largest:
        return ABOVE if size <= FAR_ABOVE_TIMES * largest else FAR_ABOVE
    return SMALL if size <= TIMED_SIZES[-1] else LARGE


def max_exchanged(ranks: int) -> float:
    """Numbers of a sum by exchange, at most: every rank holds all partials, which of two is no more than with the star."""
    return MAX_EXCHANGED_NUMBERS if ranks > 2 else math.inf


def expected(points: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds for `size` numbers, from what was timed: on straight lines, and not under the time of the smallest."""
    if size <= points[0][0]:
        return points[0][1]
    (n0, t0), (n1, t1) = next(((a, b) for a, b in itertools.pairwise(points) if size <= b[0]), points[-2:])
    return t0 + (size - n0) * max(0.0, t1 - t0) / (n1 - n0)


def hub_rate(points: Sequence[tuple[int, float]], ranks: int) -> float | None:
    """Bytes a second through the hub's link, each way, from the times of stars; None where they do not say."""
    (n0, t0), (n1, t1) = points[0], points[-1]
    return (ranks - 1) * 4 * (n1 - n0) / (t1 - t0) if t1 > t0 else None


def describe_rule(rule: str) -> str:
    """An allreduce's rule for people: "star", or "star up to 256 KiB, mesh above" for "star:65536,mesh"."""
    words: list[str] = []
    for step in rule.split(","):
        name, _, most = step.partition(":")
        words.append(f"{name} up to {_size(int(most) * 4)}" if most else f"{name} above" if words else name)
    return ", ".join(words)


def describe(rule: str, links: Links, ranks: int) -> str:
    """The line that tells the user what was chosen, and why."""
    why = f"latency {_time(links.latency_s)}"
    if "star" in links.times and (rate := hub_rate(links.times["star"], ranks)) is not None:
        why += f", {rate / 1e6:.0f} MB/s"
    return f"allreduce: {describe_rule(rule)} ({why})"


def _size(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-4 else f"{seconds * 1e6:.0f} us"
