"""How many of the experts that a token uses are in the expert cache, by how many it has room for."""

from __future__ import annotations

from itertools import pairwise

from tpimpi.compute.experts import RoutingTrace
from tpimpi.engine.eviction import Stalest, hit_rate
from tpimpi.models.config import ModelConfig

# Parts of all experts for which a trace is gone through; between them the curve is taken to be straight.
PARTS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1.0)
MAX_USES = 200_000  # of experts, from the beginning of a trace: about a second for each part


class HitCurve:
    """The part of all uses that find their expert in a cache.

    By a trace of routing [positions, layers, experts a token]: what the cache's own policy makes of it. Without one, if all
    choices are equally likely: then a cache hits as large a part as it holds, whatever its policy. No text is worse, as
    experts of one text are used again and again.
    """

    def __init__(self, config: ModelConfig, trace: RoutingTrace | None) -> None:
        self._config = config
        self._sparse = [layer for layer in range(config.layers) if config.router(layer) is not None]
        self._trace = None
        if trace is not None:
            positions = max(8, MAX_USES // (len(self._sparse) * config.experts_per_token))
            self._trace = trace[:positions, self._sparse]
        self._found = {0.0: 0.0, 1.0: 1.0}

    def at(self, part: float) -> float:
        """With room for such a part of all experts, 0 to 1."""
        if self._trace is None or part in (0, 1):
            return part
        below, above = next(pair for pair in pairwise(PARTS) if pair[0] <= part <= pair[1])
        low, high = self._at(below), self._at(above)
        return low + (high - low) * (part - below) / (above - below)

    def _at(self, part: float) -> float:
        if part not in self._found:
            assert self._trace is not None
            places = int(part * self._config.experts * len(self._sparse))
            if places <= self._config.experts_per_token:  # none is there still when its layer's turn comes again
                self._found[part] = 0.0
            else:
                self._found[part] = hit_rate(self._trace, places, Stalest(len(self._sparse)))
        return self._found[part]

    def distinct(self, positions: int) -> float:
        """Experts of a layer that a chunk of so many positions uses, if each position chooses by itself."""
        config = self._config
        missed = (1 - config.experts_per_token / config.experts) ** positions
        return config.experts * (1 - missed)
