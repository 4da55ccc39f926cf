"""Which expert goes from the cache when another needs its place.

Recently used experts stay: which ones are popular over a long text helps little, and which were used lately helps much.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple


class ExpertKey(NamedTuple):
    """An expert of a layer."""

    layer: int
    expert: int


class LeastRecentlyUsed:
    """The expert whose last use is the longest ago goes first."""

    def __init__(self) -> None:
        self._order: OrderedDict[ExpertKey, None] = OrderedDict()

    def add(self, key: ExpertKey) -> None:
        """It has a place now."""
        self._order[key] = None
        self._order.move_to_end(key)

    def use(self, key: ExpertKey) -> None:
        """A token uses it."""
        self._order.move_to_end(key)

    def demote(self, key: ExpertKey) -> None:
        """It is the first to go."""
        self._order.move_to_end(key, last=False)

    def remove(self, key: ExpertKey) -> None:
        """It has a place no more."""
        del self._order[key]

    def victim(self, may_go: Callable[[ExpertKey], bool]) -> ExpertKey | None:
        """The one to go of those that may; None where there is none."""
        return next((key for key in self._order if may_go(key)), None)
