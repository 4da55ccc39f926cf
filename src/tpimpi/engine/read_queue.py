"""What is to be read next for a window, ahead of its use."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from functools import partial

from tpimpi.engine.cycle import Cycle
from tpimpi.engine.load import TileLoad
from tpimpi.engine.pinned_set import PinnedSet
from tpimpi.engine.readers import Read, Readers, Urgency
from tpimpi.engine.ring import Ring
from tpimpi.engine.trace import READ, Recorder
from tpimpi.system.direct_io import Extent
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.tile import Tile


class ReadQueue:
    """Reads the tiles of a cycle in the order of use, into pinned memory or into the ring, as far as there is room.

    All methods may be called while the readers are at work; each takes the lock, but for `loaded`, which only looks.
    `pin_at_most` and `borrowed` are for any thread, the others for the one that uses the tiles.
    """

    def __init__(
        self,
        file: SliceFile,
        cycle: Cycle,
        pinned: PinnedSet,
        ring: Ring,
        *,
        blocks: int | None,
        readers: Readers,
        recorder: Recorder | None,
    ) -> None:
        """`readers` read for it from now on. They stay within a cycle of the turn in use, or within so many `blocks`."""
        self._file, self._cycle, self._pinned, self._ring = file, cycle, pinned, ring
        self._blocks, self._readers, self._recorder = blocks, readers, recorder
        self._pieces = [file.pieces(record) for record in cycle.records]
        self._changed = threading.Condition(readers.lock)  # a tile is there, or never will be: `wait` waits for it
        self.turn = 0  # the turn in use, or next to be used
        self.turns_in_use = 1  # turns in use at once, from there on
        self.bytes_read = 0
        self.peak_bytes = 0  # memory that tiles took, at most
        self.stream: deque[TileLoad] = deque()  # the ring's loads, oldest first
        self._live: dict[int, TileLoad] = {}  # by turn: those of them that are of use
        self._borrowed: list[int] = []  # indices of pinned tiles that are in use out of turn
        self._skipped: set[int] = set()  # turns that will not come to be used
        self._current: TileLoad | None = None  # whose pieces are being handed out
        self._next = 0  # the turn that is to be read next
        self._awaited: int | None = None  # the turn that `wait` waits for
        self._error: BaseException | None = None
        readers.add(self)

    # For the window

    def loaded(self, turn: int) -> Tile | None:
        """The tile of a turn, if it is in memory."""
        load = self._live.get(turn)
        return self._pinned.tiles[turn % self._cycle.count] if load is None else load.tile

    def wait(self, turn: int) -> Tile:
        """The tile of a turn, once it is in memory. Raises what reading raised."""
        with self._changed:
            self._awaited = turn
            try:
                while (tile := self.loaded(turn)) is None:
                    if self._error is not None:
                        raise self._error
                    self._changed.wait()
            finally:
                self._awaited = None
            return tile

    def advance(self, turn: int) -> None:
        """`turn` is next: what was used before it makes room."""
        with self._changed:
            self.turn, self.turns_in_use = turn, 1
            self._next = max(self._next, turn)
            for live in [live for live in self._live if live < turn]:
                self._live.pop(live).give_up()
            self._reap()
            self._release_retired()
            self._skipped = {skipped for skipped in self._skipped if skipped >= turn}
            if self._has_room_to_read():  # to wake a reader for nothing takes the compute's time
                self._readers.wake()

    def pinned_tiles(self, first: int, last: int) -> list[Tile] | None:
        """The tiles with indices from `first` to before `last`, in use together; None where they are not all pinned."""
        with self._changed:
            tiles = [tile for tile in self._pinned.tiles[first:last] if tile is not None]
            if len(tiles) < last - first:
                return None
            self.turns_in_use = max(1, len(tiles))
        return tiles

    @contextlib.contextmanager
    def borrowed(self, index: int) -> Iterator[TileLoad | None]:
        """The pinned tile with this index, in use out of turn; None where it is not in memory."""
        with self._changed:
            load = self._pinned.loads.get(index)
            if load is not None and load.tile is not None:
                self._borrowed.append(index)
            else:
                load = None
        try:
            yield load
        finally:
            if load is not None:
                with self._changed:
                    self._borrowed.remove(index)
                    self._release_retired()

    def skip(self, first: int, last: int) -> None:
        """The next turns of these tiles will not be used, so they need not be read."""
        with self._changed:
            turn = self._cycle.next_turn(first, self.turn)
            if turn in self._skipped:  # it was, and is still the next
                turn += self._cycle.count
            self._skipped = {skipped for skipped in self._skipped if skipped >= self.turn}
            self._skipped.update(range(turn, turn + last - first))

    def pin_at_most(self, nbytes: int | None) -> int:
        """See Window.pin_at_most."""
        with self._changed:
            given_up = self._pinned.want(nbytes)
            self._release_retired()
            self._read_again(given_up)
            self._reap()
            self._readers.wake()
            return self._pinned.wanted_bytes

    def close(self) -> None:
        """Stop reading; see Readers.remove."""
        self._readers.remove(self)

    # What is in memory; the lock is held

    def _read_again(self, indices: set[int]) -> None:
        """Tiles that the readers passed over, since they were pinned, and that now are not: go back to the first of them."""
        turns = [turn for turn in range(self.turn, self._next) if turn % self._cycle.count in indices]
        if not turns:
            return
        for turn in [turn for turn in self._live if turn >= turns[0]]:
            self._live.pop(turn).give_up()
        self._next = turns[0]
        self._reap()

    def _release_retired(self) -> None:
        """Give back the memory of pinned tiles that had to go; not of those in use, nor of those still being read."""
        self._pinned.release_retired(
            lambda index: (index - self.turn) % self._cycle.count < self.turns_in_use or index in self._borrowed
        )

    def _reap(self) -> None:
        """Free the oldest places of the ring that are of no more use."""
        while self.stream and self.stream[0].retired and not self.stream[0].pending:
            self.stream.popleft()
            self._ring.free_oldest()
        if not self.stream and self._pinned.all_loaded and self._ring.touched:
            self._ring.release()

    # For the readers

    def next_read(self, urgency: Urgency) -> Read | None:
        """The next piece; see ReadSource."""
        if self._error is not None or (urgency is not Urgency.AHEAD and not self._is_awaited(urgency)):
            return None
        if self._current is None or not self._current.pieces:
            self._current = self._next_load()
        if self._current is None:
            return None
        self._current.pending += 1
        return partial(self._read, self._current, self._current.pieces.popleft())

    def _is_awaited(self, urgency: Urgency) -> bool:
        """Whether the next piece is of the tile that `wait` waits for, or of one that is to be read before it."""
        if urgency is not Urgency.AWAITED or self._awaited is None:
            return False
        current = self._current
        return self._next <= self._awaited or (
            current is not None and bool(current.pieces) and current.turn <= self._awaited
        )

    def fail(self, error: BaseException) -> None:
        """`wait` raises what a reader raised; see ReadSource."""
        self._error = self._error or error
        self._changed.notify_all()

    def _read(self, load: TileLoad, piece: Extent | None, lane: int) -> None:
        """Read a piece of a tile; None is all of one."""
        record = self._cycle.records[load.index]
        began = time.monotonic()
        if piece is not None:
            self._file.read_piece(record, piece, load.buffer)
            tile = None
        else:
            tile = self._file.read(record, load.buffer)
        if self._recorder is not None:
            self._recorder.add(READ, *self._cycle.location(load.index), began, time.monotonic(), lane)
        self._took(load, record.nbytes if piece is None else piece.stop - piece.start, tile)

    def _has_room_to_read(self) -> bool:
        """Whether a reader would find something to read now."""
        if self._current is not None and self._current.pieces:
            return True
        if not self._pass_over():
            return False
        index = self._next % self._cycle.count
        return self._pinned.wants(index) or self._ring.has_room(self._cycle.sizes[index])

    def _pass_over(self) -> bool:
        """Go on to the next turn whose tile is to be read; False where there is none yet."""
        if self._pinned.all_loaded:
            return False
        self._next, limit = max(self._next, self.turn), self._limit()
        while self._next < limit:
            if self._next % self._cycle.count not in self._pinned.loads and self._next not in self._skipped:
                return True
            self._next += 1
        return False

    def _next_load(self) -> TileLoad | None:
        """The next tile to read; None where there is nothing to do, or no room."""
        if not self._pass_over():
            return None
        load = self._start_load(self._next, self._next % self._cycle.count)
        if load is not None:
            self._next += 1
        return load

    def _start_load(self, turn: int, index: int) -> TileLoad | None:
        """Take memory for a tile; None where there is no room in the ring."""
        pinned = self._pinned.wants(index)
        buffer = self._pinned.take_memory(index) if pinned else self._ring.take(self._cycle.sizes[index])
        if buffer is None:
            return None
        pieces = self._pieces[index]
        load = TileLoad(index, turn, pinned, buffer, deque([None] if pieces is None else pieces))
        if pinned:
            self._pinned.add(load)
        else:
            self.stream.append(load)
            self._live[turn] = load
        self.peak_bytes = max(self.peak_bytes, self._pinned.nbytes + self._ring.touched)
        return load

    def _limit(self) -> int:
        """The turn before which the readers stop."""
        if self._blocks is None:
            return self.turn + self._cycle.count
        return self._cycle.turn_after_blocks(self.turn, self._blocks)

    def _took(self, load: TileLoad, nbytes: int, tile: Tile | None) -> None:
        """A piece is in memory; with the last one the tile is checked and can be used."""
        with self._changed:
            self.bytes_read += nbytes
            last = load.pending == 1 and not load.pieces and not load.retired
            if not last:
                load.pending -= 1
                if load.retired:
                    self._reap()
                    self._release_retired()
                    self._readers.wake()
                return
        if tile is None:  # still counted as pending, so that its memory stays
            tile = self._file.tile(self._cycle.records[load.index], load.buffer)
        with self._changed:
            load.pending -= 1
            load.tile = tile
            if load.pinned and not load.retired:
                self._pinned.tiles[load.index] = tile
            self._reap()
            self._release_retired()
            self._changed.notify_all()
