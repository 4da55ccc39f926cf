"""Which expert goes from the cache when another needs its slot.

Recently used experts stay: which ones are popular over a long text helps little, and which were used lately helps much.
`bench.studies.expert_eviction` compares these policies on traces of routing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, Protocol

from tpimpi.compute.experts import RoutingTrace


class ExpertKey(NamedTuple):
    """An expert of a layer."""

    layer: int
    expert: int


class Policy(Protocol):
    """Decides who goes.

    `add` comes when a key gets a slot, `use` after the block used it (it has a slot), `demote` when it was read in vain,
    `remove` when it loses its slot; `victim` returns a key that has a slot, and changes nothing.
    """

    def begin(self, layer: int) -> None:
        """The block of this layer begins to choose; what it uses is told next."""

    def add(self, key: ExpertKey) -> None:
        """It has a slot now."""

    def use(self, key: ExpertKey) -> None:
        """The block uses it."""

    def demote(self, key: ExpertKey) -> None:
        """It is the first to go."""

    def remove(self, key: ExpertKey) -> None:
        """It has a slot no more."""

    def victim(self, may_go: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The one to go of those that may; None where there is none."""


class LeastRecentlyUsed:
    """The expert whose last use is the longest ago goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def begin(self, layer: int) -> None:
        """See Policy."""

    def add(self, key: ExpertKey) -> None:
        self._order[key] = None
        self._order.move_to_end(key)

    def use(self, key: ExpertKey) -> None:
        self._order.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        self._order.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        del self._order[key]

    def victim(self, may_go: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        return next((key for key in self._order if may_go(key)), None)


class Stalest:
    """The expert that its layer has passed over most often since it last chose it goes first; among equals the one whose
    layer comes last.

    Layers take turns, so by time alone the oldest would be those of the layer that comes next, just before it may choose
    them again (after "least-stale" of SpecMD, arXiv 2602.03921).
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._passes = [0] * layers  # blocks of a layer so far
        self._now = 0  # the layer whose block began last
        self._used: list[OrderedDict[ExpertKey, int]] = [
            OrderedDict() for _ in range(layers)
        ]  # at which pass; oldest first

    def begin(self, layer: int) -> None:
        self._now = layer
        self._passes[layer] += 1

    def add(self, key: ExpertKey) -> None:
        used = self._used[key.layer]
        used[key] = self._passes[key.layer]
        used.move_to_end(key)

    def use(self, key: ExpertKey) -> None:
        self.add(key)

    def demote(self, key: ExpertKey) -> None:
        used = self._used[key.layer]
        used[key] = -1
        used.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        del self._used[key.layer][key]

    def victim(self, may_go: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        found: tuple[int, int, ExpertKey] | None = None
        for turn in range(self._layers):  # the layers in the order of their coming blocks
            layer = (self._now + 1 + turn) % self._layers
            for key, used in self._used[layer].items():
                if not may_go(key):
                    continue
                stale = (self._passes[layer] - used, turn, key)
                if found is None or stale[:2] > found[:2]:
                    found = stale
                break
        return None if found is None else found[2]


def hit_rate(trace: RoutingTrace, slots: int, policy: Policy) -> float:
    """The part of a trace's uses that find their expert in a cache of so many slots, at least as many as a position uses of
    a layer and one more. The first quarter of the positions fills the cache and is not counted. Nothing is read ahead.
    """
    there: set[ExpertKey] = set()
    found = counted = 0
    for position, layers in enumerate(trace.tolist()):
        counts = position >= len(trace) // 4
        for layer, experts in enumerate(layers):
            wanted = [ExpertKey(layer, expert) for expert in experts]
            policy.begin(layer)
            found += counts * sum(key in there for key in wanted)
            counted += counts * len(wanted)
            for key in wanted:
                if key in there:
                    policy.use(key)
                    continue
                if len(there) >= slots:
                    victim = policy.victim(lambda other, wanted=wanted: other not in wanted)  # type: ignore[misc]
                    assert victim is not None, "too few slots for one position"
                    policy.remove(victim)
                    there.remove(victim)
                there.add(key)
                policy.add(key)
    return found / counted
