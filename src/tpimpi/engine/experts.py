"""The experts of a block on one rank: where their cache, their router and their products meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import F32, I32, Array
from tpimpi.compute.backends import Backend
from tpimpi.compute.experts import ExpertUse
from tpimpi.compute.router import RouterSpec
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.errors import TpimpiError
from tpimpi.models.config import ModelConfig

Choices = npt.NDArray[np.int32]  # experts, [n, chosen]


@dataclass(frozen=True)
class Routed:
    """Which experts each position of a block uses, the same on every rank, and what each counts: [n, chosen] both."""

    layer: int
    experts: Choices
    weights: F32

    def rows_by_expert(self) -> dict[int, tuple[npt.NDArray[np.int32], F32]]:
        """Of every expert that is used, ascending: the positions that use it, ascending, and what it counts for each."""
        order = self.experts.ravel().argsort(kind="stable")
        rows, weights = (order // self.experts.shape[1]).astype(np.int32), self.weights.ravel()[order]
        used, begins = np.unique(self.experts.ravel()[order], return_index=True)
        ends = [*begins[1:].tolist(), len(order)]
        cuts = zip(used.tolist(), begins.tolist(), ends, strict=True)
        return {expert: (rows[begin:end], weights[begin:end]) for expert, begin, end in cuts}


class Experts:
    """The experts of all layers, as one rank computes them."""

    def __init__(
        self, config: ModelConfig, resident: Mapping[str, Array], cache: ExpertCache, backend: Backend
    ) -> None:
        self.config, self.resident, self.cache, self.backend = config, resident, cache, backend
        self._routing_hash = xxhash.xxh3_64()
        self._recorded: dict[int, list[Choices]] | None = None  # of every layer, in order
        self._routing_trace: Choices | None = None  # of random weights: [positions, layers, chosen]
        if config.trace_positions:
            shape = (config.trace_positions, config.layers, config.experts_per_token)
            self._routing_trace = self.resident["trace"].view("<u2").reshape(shape).astype(np.int32)

    @property
    def routing_hash(self) -> int:
        """A hash of all choices so far, the same on every rank: int63."""
        return self._routing_hash.intdigest() >> 1

    def record_routing(self) -> None:
        """From now on keep all choices: two bytes each."""
        self._recorded = {}

    def recorded_routing(self) -> npt.NDArray[np.uint16]:
        """The choices since `record_routing`: uint16 [positions, layers, chosen]; dense layers name the first experts."""
        found = {layer: np.concatenate(choices) for layer, choices in (self._recorded or {}).items()}
        positions = max((len(choices) for choices in found.values()), default=0)
        trace = np.empty((positions, self.config.layers, self.config.experts_per_token), np.uint16)
        trace[:] = np.arange(self.config.experts_per_token)
        for layer, choices in found.items():
            trace[:, layer] = choices
        return trace

    def likely(self, x: F32, layer: int, position: I32, count: int) -> list[int]:
        """What the next block with experts, that of `layer`, will probably choose and should be read, the likeliest first:
        by its router and the residual `x` [n, hidden] at `position` [n], as it is before the layer's attention, which
        changes it: `count` experts for each position. Guesses from before the block of the layer before are too often
        wrong: with the last ones they read 15 % more, and took as long.
        """
        spec = self.config.router(layer)
        if spec is None or not count or self.cache.is_whole:
            return []
        h = self.backend.fixed_rms_norm(x, self.resident["mlp_norm"][layer], self.config.norm_eps)
        likely = replace(spec, top_k=min(spec.experts, count))
        try:
            experts, _ = self._by_router(h, layer, likely)
        except ValueError:
            return []  # which `route` will say
        if self._routing_trace is not None:
            experts = self._guesses(self._of_trace(layer, position), layer, int(position[0]))
        # The first choice of every position first; what many positions want, once.
        return list(dict.fromkeys(experts.T.reshape(-1).tolist()))

    def _by_router(self, h: F32, layer: int, spec: RouterSpec) -> tuple[Choices, F32]:
        """As Backend.route, with the router of this layer."""
        bias = self.resident["router_bias"][layer] if spec.bias != "none" else None
        return self.backend.route(h, self.resident["router"][layer], bias, spec)

    def _of_trace(self, layer: int, position: I32) -> Choices:
        """What the trace names at positions [n]: [n, chosen]."""
        assert self._routing_trace is not None
        return self._routing_trace[position % len(self._routing_trace), layer]

    def _guesses(self, chosen: Choices, layer: int, start: int) -> Choices:
        """The trace's experts, of which the stated part is right: the same on every rank."""
        dice = np.random.default_rng([layer, start, len(chosen)])
        wrong = dice.random(chosen.shape) >= self.config.trace_predicted
        return np.where(wrong, dice.integers(self.config.experts, size=chosen.shape), chosen)

    def route(self, h: F32, layer: int, position: I32) -> Routed:
        """The choice for the normed vectors `h` [n, hidden] of a layer, at `position` [n]. Raises TpimpiError where they are
        not finite."""
        routed = self.chosen(h, layer, position)
        self._routing_hash.update(routed.experts.tobytes())
        if self._recorded is not None:
            self._recorded.setdefault(layer, []).append(routed.experts.astype(np.uint16))
        return routed

    def chosen(self, h: F32, layer: int, position: I32) -> Routed:
        """As `route`, and it is not counted."""
        spec = self.config.router(layer)
        assert spec is not None, f"layer {layer} is dense"
        try:
            experts, weights = self._by_router(h, layer, spec)
        except ValueError as error:
            raise TpimpiError(
                f"layer {layer}: the router's numbers are not finite, so no experts can be chosen; the model's weights are "
                f"damaged, or its format too coarse: download it again, or try --format bf16"
            ) from error
        if self._routing_trace is not None:
            experts = self._of_trace(layer, position)
        return Routed(layer, experts, weights)

    def begin(self, routed: Routed) -> None:
        """What was chosen is read from now on; `add_partial` uses it."""
        self.cache.begin(routed.layer, np.unique(routed.experts).tolist())

    def add_partial(self, partial: F32, h: F32, routed: Routed) -> None:
        """Add what this rank's columns of the chosen experts give for `h` [n, hidden] to `partial` [n, hidden].

        Expert after expert in the order of their numbers, so that a row's sum does not depend on what is in memory, nor on
        the rows beside it.
        """
        users = routed.rows_by_expert()
        for group in self.cache.tiles():
            uses = [ExpertUse(tile.matrices, tile.parts, *users[tile.record.expert]) for tile in group]
            self.backend.experts(h, uses, self.config.activation, self.config.activation_limit, partial)


class ChunkExperts:
    """The experts of a chunk that goes through the layers as a whole, or in halves by turns: what all its positions chose is
    read once, and each expert computes at once all positions that chose it.

    In a block each half calls `route`, in order; then each calls `add_partial`.
    """

    def __init__(self, experts: Experts, halves: Sequence[slice]) -> None:
        """`halves` are the runs of the chunk's positions."""
        self._experts, self._halves = experts, halves
        self._likely: list[int] = []  # that were told to the cache of the block that comes next
        self._routed: list[Routed] = []  # of the block, of the halves so far
        self._h: F32 | None = None  # of all halves, [positions, hidden]
        self._partial: F32 | None = None  # the same

    def prefetch(self, x: F32, layer: int, position: I32, count: int) -> None:
        """Have read what one half's residual `x` [n, hidden] says; see Experts.likely."""
        self._likely = list(dict.fromkeys([*self._likely, *self._experts.likely(x, layer, position, count)]))
        if self._likely:
            self._experts.cache.prefetch(layer, self._likely)

    def route(self, h: F32, partial: F32, layer: int, position: I32) -> tuple[F32, F32]:
        """Choose for the normed vectors `h` [n, hidden] of the next half, whose `partial` [n, hidden] is so far; with the
        last half, what was chosen is read from now on. Returns where both are until `add_partial` was called. Raises as
        Experts.route."""
        if len(self._halves) == 1:
            self._h, self._partial = h, partial
        else:
            if not self._routed:
                shape = (self._halves[-1].stop, h.shape[1])
                self._h, self._partial = np.empty(shape, np.float32), np.empty(shape, np.float32)
            assert self._h is not None and self._partial is not None
            half = self._halves[len(self._routed)]
            self._h[half], self._partial[half] = h, partial
            h, partial = self._h[half], self._partial[half]
        self._routed.append(self._experts.route(h, layer, position))
        if len(self._routed) == len(self._halves):
            self._likely = []
            self._experts.begin(self._together())
        return h, partial

    @property
    def due(self) -> bool:
        """Whether `add_partial` was not called since all halves chose."""
        return len(self._routed) == len(self._halves)

    def add_partial(self) -> None:
        """Add to the partials of all halves what the experts give for them."""
        assert self.due and self._h is not None and self._partial is not None
        self._experts.add_partial(self._partial, self._h, self._together())
        self._routed, self._h, self._partial = [], None, None

    def _together(self) -> Routed:
        """What all halves chose."""
        experts = np.concatenate([routed.experts for routed in self._routed])
        weights = np.concatenate([routed.weights for routed in self._routed])
        return Routed(self._routed[0].layer, experts, weights)
