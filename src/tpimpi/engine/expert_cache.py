"""The expert cache: keeps in memory those experts' tiles that were used lately, and reads the others when they are wanted.

A token uses some of a layer's experts, chosen by its router. All layers share one pool of slots, each large enough for any
tile. What a block wants is read at once, in the order of the file; what is expected for the next block (`prefetch`) is
read when that is done, and given up when the block turns out not to want it. An expert that is in use, or
about to be in this block, keeps its slot as long as another can go. Where there is room for all of them, readers go on
with the rest from the first use on, so that they are soon there. Readers are those of the window too: see readers.

Which bytes are where changes no number: tiles are handed out in the order in which they are asked for.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial

from tpimpi.engine.eviction import ExpertKey, Stalest
from tpimpi.engine.expert_slots import ExpertEntry, ExpertSlots, min_slots
from tpimpi.engine.figures import ExpertFigures
from tpimpi.engine.readers import Read, Readers, Urgency
from tpimpi.engine.trace import READ, WAIT, Recorder
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.layout import Record
from tpimpi.weights.slices.tile import Tile


class ExpertCache:
    """Tiles of experts. `begin`, `tiles` and `prefetch` are called by one thread; `limit` and what is only read, by any."""

    def __init__(
        self,
        file: SliceFile,
        records: Mapping[ExpertKey, Record],
        *,
        nbytes: int | None,
        readers: Readers,
        recorder: Recorder | None = None,
        block_index: Mapping[int, int] | None = None,
    ) -> None:
        """`records` are the experts' tiles; `nbytes` is how much memory they may take, None for all of them, and is enough
        for two. `readers` read them. `block_index` says for the trace where a layer's block stands in the order."""
        self._file, self._records, self._readers, self._recorder = file, records, readers, recorder
        self._blocks = block_index or {}
        self.slot_bytes = max((record.nbytes for record in records.values()), default=0)
        self.total_bytes = self.slot_bytes * len(records)
        policy = Stalest(1 + max((key.layer for key in records), default=0))
        limit = len(records) if nbytes is None else min(len(records), nbytes // max(1, self.slot_bytes))
        self._slots = ExpertSlots(len(records), self.slot_bytes, limit, policy)
        self._wanted: deque[ExpertKey] = deque()  # by the block, not handed out yet; in order
        self._urgent: deque[ExpertEntry] = deque()  # to be read, in order
        self._prefetch_queue: deque[ExpertEntry] = deque()  # to be read if there is nothing urgent
        self._prefetches: list[ExpertEntry] = []  # all that is expected of the next block
        self._rest: Iterator[ExpertKey] = iter(())  # what may be read when nobody waits, in the order of the file
        self._to_check = itertools.cycle(records)
        self._begun = False  # an expert was used
        self._changed = threading.Condition(readers.lock)
        self._error: BaseException | None = None
        self._used = self._hits = self._expected = self._expected_used = 0
        self._bytes_read = self._expected_bytes = 0
        self.wait_seconds = 0.0
        self.waiting_since: float | None = None  # time.monotonic(), while `tiles` waits for the disk
        self.waiting_for = ""
        if records:
            readers.add(self)

    # What is held

    @property
    def held_bytes(self) -> int:
        """Memory of experts, those on their way included."""
        return len(self._slots.entries) * self.slot_bytes

    @property
    def peak_bytes(self) -> int:
        """Memory that experts took, at most."""
        return self._slots.peak * self.slot_bytes

    @property
    def limit_bytes(self) -> int:
        """Memory that experts may take."""
        return self._slots.limit * self.slot_bytes

    @property
    def min_bytes(self) -> int:
        """Memory without which no expert can be used."""
        return min_slots(len(self._records)) * self.slot_bytes

    @property
    def is_whole(self) -> bool:
        """Whether there is room for all experts."""
        return self._slots.limit >= len(self._records)

    @property
    def figures(self) -> ExpertFigures:
        """What was done so far."""
        return ExpertFigures(
            used=self._used,
            hits=self._hits,
            expected=self._expected,
            expected_used=self._expected_used,
            bytes_read=self._bytes_read,
            expected_bytes=self._expected_bytes,
            wait_s=self.wait_seconds,
        )

    def limit(self, nbytes: int) -> None:
        """From now on take at most so many bytes, and at least those of `min_bytes`. Experts beyond that go at once, but
        for those in use or being read, which go when they are not any more."""
        with self._changed:
            least = min_slots(len(self._records))
            self._slots.limit = max(least, min(len(self._records), nbytes // max(1, self.slot_bytes)))
            self._rest = iter(self._records if self._begun else ())
            self._shrink()
            self._start_reads()
            self._readers.wake_all()  # there may be room for the rest

    # Using experts

    def prefetch(self, layer: int, experts: Sequence[int]) -> None:
        """The next block that wants experts is that of this layer, and will probably want these, the likeliest first. Said
        again, it takes the place of what was said before."""
        keys = [ExpertKey(layer, expert) for expert in experts if self._records]
        with self._changed:
            wanted = set(keys)
            kept = {entry.key: entry for entry in self._prefetches if entry.key in wanted and self._slots.has(entry)}
            self._forget_prefetches(wanted)
            for key in keys:
                entry = kept.get(key)
                if entry is None and key in self._slots.entries:
                    continue
                # What was expected before and is not wanted is the first to go; what is to be used soon never does.
                entry = entry or self._slots.take(key, self._wanted, prefetched=True)
                if entry is None:
                    break
                entry.prefetched = True
                self._prefetches.append(entry)
                if not entry.begun:
                    self._prefetch_queue.append(entry)
            if self._prefetch_queue:
                self._readers.wake_all()

    def begin(self, layer: int, experts: Sequence[int]) -> None:
        """The block of this layer wants these, in this order: they are read from now on. `tiles` hands them out. Raises what
        reading raised, or what `check_next` found."""
        if not self._records:  # a rank may have no columns of experts
            return
        keys = [ExpertKey(layer, expert) for expert in experts]
        with self._changed:
            if self._error is not None:
                raise self._error
            if not self._begun:
                self._begun, self._rest = True, iter(self._records)
                self._readers.wake_all()
            self._slots.policy.begin(layer)
            self._begin(keys)
            self._start_reads()

    def tiles(self) -> Iterator[list[Tile]]:
        """The tiles of what the block wants, in order: in groups, each of those that are in memory by then. A group is valid
        until the next is asked for. Raises what reading raised."""
        while True:
            with self._changed:
                self._release()
                if not self._wanted:
                    return
                self._start_reads()
                self._wait_for(self._wanted[0])
                group = self._take_group()
            yield group

    def _begin(self, keys: Iterable[ExpertKey]) -> None:
        """A block wants these."""
        self._wanted = deque(keys)
        wanted = set(self._wanted)
        for key in self._wanted:
            self._used += 1
            entry = self._slots.entries.get(key)
            if entry is None:
                continue
            self._hits += entry.begun
            self._expected_used += entry.begun and entry.prefetched
            if not entry.begun:
                self._urgent.append(entry)
        self._forget_prefetches(wanted)

    def _forget_prefetches(self, wanted: Set[ExpertKey]) -> None:
        """What was expected wrongly, since others are wanted, is given up, or is the first to go."""
        for entry in self._prefetches:
            entry.prefetched = False
            if entry.key in wanted or not self._slots.has(entry):
                continue
            if entry.begun:
                self._slots.policy.demote(entry.key)
            else:
                self._slots.give_back(entry)
        self._prefetches.clear()
        self._prefetch_queue.clear()

    def _release(self) -> None:
        """What was handed out is not in use any more."""
        for key in self._slots.in_use:
            self._slots.policy.use(key)
        self._slots.in_use.clear()
        self._shrink()

    def _shrink(self) -> None:
        """Give memory back where there is more than there may be."""
        for entry in self._slots.shrink():
            for queue in (self._urgent, self._prefetch_queue):
                if entry in queue:
                    queue.remove(entry)

    def _start_reads(self) -> None:
        """Find slots for what is wanted and not there, in order, as long as there are any."""
        for key in self._wanted:
            if key not in self._slots.entries:
                entry = self._slots.take(key, self._wanted)
                if entry is None:
                    break
                self._urgent.append(entry)
        if self._urgent:
            self._readers.wake_all()

    def _take_group(self) -> list[Tile]:
        """All that is there, from the first that is wanted on."""
        group: list[Tile] = []
        while (
            self._wanted and (entry := self._slots.entries.get(self._wanted[0])) is not None and entry.tile is not None
        ):
            self._slots.in_use.add(self._wanted.popleft())
            group.append(entry.tile)
        return group

    def _wait_for(self, key: ExpertKey) -> None:
        """Wait until this expert is in memory; how long that took is counted."""
        if (entry := self._slots.entries.get(key)) is not None and entry.tile is not None:
            return
        began = time.monotonic()
        self.waiting_for, self.waiting_since = self._records[key].path, began
        try:
            while (entry := self._slots.entries.get(key)) is None or entry.tile is None:
                if self._error is not None:
                    raise self._error
                self._changed.wait()
                self._start_reads()
        finally:
            ended = time.monotonic()
            self.waiting_since = None
            self.wait_seconds += ended - began
            if self._recorder is not None:
                self._recorder.add(WAIT, self._blocks.get(key.layer, -1), key.expert, began, ended)

    def check_next(self) -> int:
        """Compare the next expert that is in memory with its checksum. Returns its bytes, 0 where none is there. For one
        thread beside that which uses the experts."""
        with self._changed:
            entry = self._next_to_check()
            if entry is None:
                return 0
            entry.busy, record, buffer = True, self._records[entry.key], self._slots.buffer(entry)
        damage = self._file.damage(record, buffer[: record.nbytes])
        with self._changed:
            entry.busy, self._error = False, self._error or damage
            self._shrink()
            self._changed.notify_all()
        return record.nbytes

    def _next_to_check(self) -> ExpertEntry | None:
        """The next expert, in the order of the file, that is in memory and nobody is at."""
        for _ in self._records:
            key = next(self._to_check)
            entry = self._slots.entries.get(key)
            if entry is not None and entry.tile is not None and not entry.busy:
                return entry
        return None

    # For the readers

    def next_read(self, urgency: Urgency) -> Read | None:
        """The next expert; see ReadSource."""
        entry = None if self._error is not None else self._next(urgency)
        if entry is None:
            return None
        entry.busy = True
        if entry.prefetched:
            self._expected += 1
            self._expected_bytes += self._records[entry.key].nbytes
        return partial(self._read, entry)

    def _next(self, urgency: Urgency) -> ExpertEntry | None:
        """The next expert to read of this urgency."""
        if urgency is Urgency.SPARE:
            return self._one_of_the_rest()
        queue = {Urgency.CHOSEN: self._urgent, Urgency.GUESSED: self._prefetch_queue}.get(urgency)
        while queue:
            entry = queue.popleft()
            if self._slots.has(entry) and not entry.begun:  # else given up meanwhile, or read as another's
                return entry
        return None

    def _one_of_the_rest(self) -> ExpertEntry | None:
        """The next expert that nobody asked for, where all have room."""
        if self.is_whole:
            for key in self._rest:
                if key not in self._slots.entries and (entry := self._slots.take(key, self._wanted)) is not None:
                    return entry
        return None

    def _read(self, entry: ExpertEntry, lane: int) -> None:
        """Read an expert."""
        record, buffer = self._records[entry.key], self._slots.buffer(entry)
        began = time.monotonic()
        tile = self._file.read(record, buffer[: record.nbytes])
        if self._recorder is not None:
            block = self._blocks.get(entry.key.layer, -1)
            self._recorder.add(READ, block, entry.key.expert, began, time.monotonic(), lane)
        with self._changed:
            entry.busy, entry.tile = False, tile
            self._bytes_read += record.nbytes
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """`tiles` raises what a reader raised; see ReadSource."""
        self._error = self._error or error
        self._changed.notify_all()

    def close(self) -> None:
        """Stop reading, and give all memory back; the file may be closed afterwards."""
        self._readers.remove(self)
        self._slots.release_all()
