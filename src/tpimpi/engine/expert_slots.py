"""The memory of the expert cache: slots, each large enough for any expert's tile, and who has one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tpimpi.engine.eviction import ExpertKey, Policy
from tpimpi.system.buffers import BufferPool, Bytes
from tpimpi.weights.slices.tile import Tile


def min_slots(experts: int) -> int:
    """Slots without which no expert can be used: one computes while the next is read."""
    return min(2, experts)


@dataclass(eq=False)
class ExpertEntry:
    """An expert that has a slot."""

    key: ExpertKey
    slot: int
    prefetched: bool  # read because it was expected, and not wanted yet
    busy: bool = False  # a reader is at it, or a check: it keeps its slot
    tile: Tile | None = None

    @property
    def begun(self) -> bool:
        """Whether its bytes are there, or on their way."""
        return self.busy or self.tile is not None


class ExpertSlots:
    """Which experts have a slot, `limit` at most. Its user's lock is held wherever it changes."""

    def __init__(self, experts: int, slot_bytes: int, limit: int, policy: Policy) -> None:
        """For so many experts, each of at most `slot_bytes`. The `policy` says who goes first."""
        assert limit >= min_slots(experts), "an expert would never find a slot"
        self.limit, self.policy = limit, policy
        self.entries: dict[ExpertKey, ExpertEntry] = {}
        self.in_use: set[ExpertKey] = set()  # those that compute
        self.peak = 0  # slots that had memory, at most
        self._pool = BufferPool([slot_bytes] * experts)
        self._free = list(range(experts))[::-1]  # the slot that was given back last is taken first
        self._buffers: dict[int, Bytes] = {}  # of the slots that have memory

    def buffer(self, entry: ExpertEntry) -> Bytes:
        """Its slot's memory: uint8 [slot_bytes]."""
        return self._buffers[entry.slot]

    def has(self, entry: ExpertEntry) -> bool:
        """Whether it still has the slot that it was given."""
        return self.entries.get(entry.key) is entry

    def take(self, key: ExpertKey, wanted: Sequence[ExpertKey], *, prefetched: bool = False) -> ExpertEntry | None:
        """A slot for an expert, another's if need be; None where none may go now. `wanted` are those of the block that
        were not used yet, in order."""
        if len(self.entries) >= self.limit:
            victim = self._victim(key, wanted, prefetched=prefetched)
            if victim is None:
                return None
            self.give_back(victim)
        slot = self._free.pop()
        if slot not in self._buffers:
            self._buffers[slot] = self._pool.take(slot)
        self.peak = max(self.peak, len(self._buffers))
        entry = ExpertEntry(key, slot, prefetched)
        self.entries[key] = entry
        self.policy.add(key)
        return entry

    def _victim(self, key: ExpertKey, wanted: Sequence[ExpertKey], *, prefetched: bool) -> ExpertEntry | None:
        """Whose slot goes to `key`: the policy's choice of those that are of no use now; for one that is wanted, if there
        is no such, the last that the block wants."""
        soon = set(wanted)

        def may_go(other: ExpertKey) -> bool:
            entry = self.entries[other]
            return not (entry.busy or other in soon or other in self.in_use or (prefetched and entry.prefetched))

        found = self.policy.victim(may_go)
        if found is not None:
            return self.entries[found]
        if prefetched:
            return None
        for later in reversed(wanted):
            if later == key:
                return None
            entry = self.entries.get(later)
            if entry is not None and not entry.busy and entry.tile is not None:
                return entry
        return None

    def give_back(self, entry: ExpertEntry) -> None:
        """Its slot is free, for another expert."""
        del self.entries[entry.key]
        self.policy.remove(entry.key)
        self._free.append(entry.slot)

    def shrink(self) -> list[ExpertEntry]:
        """Give memory back where there is more than there may be; returns those that had it. Who is busy or in use keeps
        it for now."""
        gone: list[ExpertEntry] = []
        while len(self.entries) > self.limit:
            found = self.policy.victim(lambda key: not self.entries[key].busy and key not in self.in_use)
            if found is None:
                break
            gone.append(entry := self.entries[found])
            self.give_back(entry)
            self._pool.release(entry.slot)
            del self._buffers[entry.slot]
        return gone

    def release_all(self) -> None:
        """Give all memory back, for good."""
        self._pool.release_all()
