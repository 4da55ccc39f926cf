"""What waits to be answered, of several owners: each gets its share, however much another asks."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairQueue(Generic[T]):
    """Things of owners. The next is of the owner who has the fewest under way; of several such of the one whose last turn is
    longest ago. What one owner asks is taken in its order."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}  # of owners who have something that waits
        self._under_way: dict[T, str] = {}
        self._turns: dict[str, int] = {}  # the number of an owner's last turn, while it has something here
        self._turn = 0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, owner: str, one: T) -> None:
        self._waiting.setdefault(owner, deque()).append(one)

    def take(self) -> T:
        """The next, which is under way from now on; something waits."""
        counts = list(self._under_way.values())
        owner = min(self._waiting, key=lambda name: (counts.count(name), self._turns.get(name, 0)))
        one = self._waiting[owner].popleft()
        if not self._waiting[owner]:
            del self._waiting[owner]
        self._turn += 1
        self._turns[owner] = self._turn
        self._under_way[one] = owner
        return one

    def remove(self, owner: str, one: T) -> None:
        """It is done, or nobody wants it any more."""
        if self._under_way.pop(one, None) is None:
            self._waiting[owner].remove(one)
            if not self._waiting[owner]:
                del self._waiting[owner]
        if owner not in self._waiting and owner not in self._under_way.values():
            self._turns.pop(owner, None)
