"""Which experts should go from the cache: policies on a trace of routing, without weights; the part of uses that hit.

    python -m bench.studies.routing_trace trace.npy
    python -m bench.studies.expert_eviction trace.npy

The first quarter of the trace fills the cache and is not counted. Nothing is read ahead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from bench.studies.routing_trace import RoutingTrace
from tpimpi.engine.eviction import ExpertKey, LeastRecentlyUsed, Stalest, hit_rate

PARTS = (0.07, 0.125, 0.25, 0.4, 0.6)  # of all experts, that the cache has room for
_HALF_LIFE_PASSES = 32  # of a use, for FrequencyWithAging


class FrequencyWithAging(LeastRecentlyUsed):
    """The expert that was used least goes first; a use counts half after so many blocks of its layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self._passes = [0] * layers
        self._scores: dict[ExpertKey, tuple[float, int]] = {}
        self._there: set[ExpertKey] = set()

    def begin(self, layer: int) -> None:
        self._passes[layer] += 1

    def _score(self, key: ExpertKey) -> float:
        score, at = self._scores.get(key, (0.0, 0))
        return score * 0.5 ** ((self._passes[key.layer] - at) / _HALF_LIFE_PASSES)

    def add(self, key: ExpertKey) -> None:
        self._there.add(key)
        self.use(key)

    def use(self, key: ExpertKey) -> None:
        self._scores[key] = self._score(key) + 1, self._passes[key.layer]

    def remove(self, key: ExpertKey) -> None:
        self._there.remove(key)

    def victim(self, may_go: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        return min((key for key in self._there if may_go(key)), key=self._score, default=None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE")
    parser.add_argument("--experts", type=int, default=128, help="of a layer")
    options = parser.parse_args(arguments)
    trace: RoutingTrace = np.load(options.trace, allow_pickle=False)
    layers = trace.shape[1]
    print("cache    LRU  frequency with aging  stalest")
    for part in PARTS:
        places = max(int(options.experts * layers * part), trace.shape[2] + 1)
        policies = (LeastRecentlyUsed(), FrequencyWithAging(layers), Stalest(layers))
        lru, frequency, stalest = (hit_rate(trace, places, policy) for policy in policies)
        print(f"{part:5.3f}  {lru:5.3f}  {frequency:20.3f}  {stalest:7.3f}", flush=True)


if __name__ == "__main__":
    main()
