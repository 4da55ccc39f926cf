"""The window: streams this rank's tiles from its slice file into reused memory, ahead of the compute, on its own thread.

The blocks of a model are used in the same order for every token, so the order of reading is a cycle: while rank 0
samples, the first tiles of the next token are already being read. At most `blocks` consecutive blocks are held, the one
in use included; if that is all of them, each tile is read once and kept.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

from tpimpi.errors import InputError
from tpimpi.plan import Block
from tpimpi.slicefile import SliceFile, Tile, aligned_buffer
from tpimpi.slicelayout import Record

SMALLEST_WINDOW = 2  # one block computes while the next is read


class Window:
    """`for tile in window.tiles(block)` yields the block's tiles in order; a tile is valid until the next is asked for.

    Memory: the largest run of `blocks` consecutive blocks, plus one tile; it is taken as it is first used.
    Raises InputError where `blocks` is under 2; `tiles` raises what reading raised (SliceError).
    """

    def __init__(self, file: SliceFile, order: Sequence[Block], blocks: int | None) -> None:
        """`order` is the cycle of blocks; `blocks` how many of them are held, None for all."""
        if blocks is not None and blocks < SMALLEST_WINDOW:
            raise InputError(f"window is {blocks}, must be at least {SMALLEST_WINDOW} blocks; give --window 2 or more")
        self._file, self._order = file, list(order)
        self._records: dict[Block, list[Record]] = {block: [] for block in order}
        for record in file.records:
            if record.block in self._records:
                self._records[record.block].append(record)
        self.keeps_all = blocks is None or blocks >= len(self._order)
        self.blocks = len(self._order) if self.keeps_all or blocks is None else blocks
        self.bytes_read = 0
        self.wait_seconds = 0.0
        self._changed = threading.Condition()
        self._kept: dict[str, Tile] = {}
        self._loaded: deque[tuple[int, Tile]] = deque()  # (turn, tile) of the tiles in the ring, oldest first
        self._ring = _Ring(0 if self.keeps_all else self.window_bytes())
        self._turn = 0  # the block in use, or next to be used, counted over all cycles
        self._error: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._read_all, name="tpimpi-window", daemon=True)
        self._thread.start()

    def window_bytes(self) -> int:
        """Size of the largest run of consecutive blocks that the window may hold, plus one tile for the ring's turn."""
        sizes = [sum(record.nbytes for record in self._records[block]) for block in self._order]
        if self.keeps_all:
            return sum(sizes)
        runs = (sum((sizes * 2)[start : start + self.blocks]) for start in range(len(sizes)))
        return max(runs) + max((r.nbytes for records in self._records.values() for r in records), default=0)

    def held_bytes(self) -> int:
        """Memory that tiles take, or took at most."""
        return min(self.bytes_read, self.window_bytes())

    def tiles(self, block: Block) -> Iterator[Tile]:
        """The tiles of `block`, in order. Blocks of the cycle that lie before it and were not asked for are passed over."""
        if self.keeps_all:
            for record in self._records[block]:
                yield self._wait_for_kept(record)
            return
        with self._changed:
            while self._order[self._turn % len(self._order)] != block:
                self._turn += 1
            turn = self._turn
            self._drop_before(turn)
            self._changed.notify_all()
        for _ in self._records[block]:
            yield self._wait_for_next(turn)
            with self._changed:
                self._loaded.popleft()
                self._ring.free_oldest()
                self._changed.notify_all()
        with self._changed:
            self._turn = turn + 1
            self._changed.notify_all()

    def _drop_before(self, turn: int) -> None:
        while self._loaded and self._loaded[0][0] < turn:
            self._loaded.popleft()
            self._ring.free_oldest()
            self._changed.notify_all()  # the reader may wait for this room

    def _wait_for_kept(self, record: Record) -> Tile:
        if record.path not in self._kept:
            began = time.monotonic()
            with self._changed:
                while record.path not in self._kept:
                    self._raise_error()
                    self._changed.wait()
            self.wait_seconds += time.monotonic() - began
        return self._kept[record.path]

    def _wait_for_next(self, turn: int) -> Tile:
        began = time.monotonic()
        with self._changed:
            while True:
                self._drop_before(turn)
                if self._loaded:
                    break
                self._raise_error()
                self._changed.wait()
            self.wait_seconds += time.monotonic() - began
            return self._loaded[0][1]

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    # The reader thread

    def _read_all(self) -> None:
        try:
            if self.keeps_all:
                self._read_once()
            else:
                self._read_around()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _read_once(self) -> None:
        memory, place = aligned_buffer(self.window_bytes()), 0
        for block in self._order:
            for record in self._records[block]:
                if self._closed:
                    return
                tile = self._file.read(record, memory[place : place + record.nbytes])
                place += record.nbytes
                with self._changed:
                    self.bytes_read += record.nbytes
                    self._kept[record.path] = tile
                    self._changed.notify_all()

    def _read_around(self) -> None:
        turn = 0
        while True:
            with self._changed:
                while not self._closed and turn >= self._turn + self.blocks:
                    self._changed.wait()
                turn = max(turn, self._turn)  # blocks that were passed over need not be read
            for record in self._records[self._order[turn % len(self._order)]]:
                with self._changed:
                    while not self._closed and (place := self._ring.allocate(record.nbytes)) is None:
                        self._changed.wait()
                    if self._closed:
                        return
                    if turn < self._turn:
                        self._ring.free_newest()
                        break
                assert place is not None
                tile = self._file.read(record, self._ring.memory[place : place + record.nbytes])
                with self._changed:
                    self.bytes_read += record.nbytes
                    self._loaded.append((turn, tile))
                    self._changed.notify_all()
            if self._closed:
                return
            turn += 1

    def close(self) -> None:
        """Stop reading; the file may be closed afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()


class _Ring:
    """Places in one piece of memory, given out in order and freed in the same order; each is contiguous."""

    def __init__(self, nbytes: int) -> None:
        self.memory = aligned_buffer(nbytes)
        self._nbytes = nbytes
        self._live: deque[tuple[int, int]] = deque()

    def allocate(self, nbytes: int) -> int | None:
        """Offset of `nbytes` free bytes, or None while there are none."""
        if not self._live:
            start = 0
        else:
            first, last = self._live[0][0], self._live[-1][1]
            if last > first:  # the live places do not wrap: free are the end and the beginning
                start = last if last + nbytes <= self._nbytes else 0
                if start == 0 and nbytes >= first:
                    return None
            else:
                start = last
                if last + nbytes >= first:
                    return None
        self._live.append((start, start + nbytes))
        return start

    def free_oldest(self) -> None:
        self._live.popleft()

    def free_newest(self) -> None:
        self._live.pop()
