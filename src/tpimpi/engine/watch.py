"""What rank 0 keeps of a step, so that a sum of it can be audited afterwards (see auditor)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.models.blocks import Block
from tpimpi.models.config import ModelConfig
from tpimpi.star import PartialWatch


@dataclass(frozen=True)
class AuditedSum:
    """The blocks whose tiles are added in one sum, by their places in a model's order of blocks: [first, last]."""

    first: int
    last: int


def sums_of(config: ModelConfig, blocks: Sequence[Block]) -> list[AuditedSum]:
    """All sums of a step, in order. Where a layer is parallel, its attention and its MLP are one."""
    first, found = 0, []
    for place, block in enumerate(blocks):
        if not (block.kind == "attn" and config.layer(block.layer).parallel):
            found.append(AuditedSum(first, place))
            first = place + 1
    return found


class Watch:
    """Keeps one row of a step: the residual before a sum, what every other rank sent into that sum, and what it became.

    `row` is counted in the step; `squares` are the layer's sums of squares before an `attn` that has them, [1, 2]; `own` is
    this rank's partial, `total` the sum, [1, width] each.
    """

    def __init__(
        self, audited: AuditedSum, row: int, squares_place: int | None = None, bounds: Sequence[int] | None = None
    ) -> None:
        """`squares_place` is where the block of the sums of squares stands, None where the layer has none. `bounds` are
        where the parts of the sum begin that each rank adds (see Star.parts_of_sum); None where rank 0 adds all."""
        self.audited, self.row = audited, row
        self._bounds = bounds
        self.x: F32 | None = None  # [1, hidden]
        self.sent = PartialWatch(slice(0, 0))
        self.squares: F32 | None = None
        self.own: F32 | None = None
        self.total: F32 | None = None
        self._squares_place, self._local = squares_place, row

    def of_run(self, run: slice) -> Watch | None:
        """For these rows of the step, which go through the layers by themselves: None where the row is not among them."""
        if not run.start <= self.row < run.stop:
            return None
        self._local = self.row - run.start
        return self

    def note(self, x: F32, place: int) -> None:
        """The residual before the block at `place` is `x` [n, hidden]."""
        if place == self.audited.first:
            self.x = x[self._local : self._local + 1].copy()

    def partials_of(self, partial: F32, place: int) -> PartialWatch | None:
        """What is to see the partials of the sum that ends at `place`, of which `partial` [n, width] becomes the sum; None
        where it is of no interest."""
        if place == self._squares_place:
            self.squares = partial[self._local : self._local + 1]
        if place != self.audited.last:
            return None
        width = partial.shape[1]
        self.sent.run = slice(self._local * width, (self._local + 1) * width)
        self.total = partial[self._local : self._local + 1]
        self.own = self.total.copy()
        return self.sent

    def parts(self) -> list[slice]:
        """Which of the row's numbers each rank added, by rank."""
        run = self.sent.run
        bounds = [run.start, run.stop] if self._bounds is None else self._bounds
        places = np.clip(np.subtract(bounds, run.start), 0, run.stop - run.start).tolist()
        return [slice(first, last) for first, last in itertools.pairwise(places)]
