"""The window: keeps some of this rank's tiles in memory and streams the others from its slice file, ahead of the compute.

The blocks of a model are used in the same order for every token, so the order of reading is a cycle. A cache that keeps
what was used last would have dropped each tile just before its turn came, and read everything anew for every token. So
the tiles that fit are *pinned*: read once, and kept. The others pass through a ring of memory that is used again and
again, read by a few threads that go on across blocks and tokens, while the star waits and while rank 0 samples. A token
then takes the larger of the time to compute it and the time to read what is not pinned; never their sum.

Which tiles are pinned: any choice of so many bytes leaves as many to read, so what counts is that reading never stops. It
would where a long run of pinned tiles is computed: the ring fills up, and the disk idles. So the pinned tiles are spread
as evenly over the cycle as can be, and so that this holds for every number of them: in the order of van der Corput
(1935), in which each further one halves a longest gap. Taking away the last again, under pressure, leaves the others as
evenly spread.

The head is spread like the rest. Rank 0 alone has it, and the other ranks wait meanwhile: where each rank has its own
disk, a token takes as long as the rank that reads most, wherever its pinned tiles lie. So rank 0 wants the larger budget
(tpimpi.system.memory divides a host's so) or a smaller share.

`blocks` is the scheduler of arXiv 2410.00531 instead: nothing is pinned, and so many consecutive blocks are in memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpimpi.engine.trace import READ, WAIT, Recorder
from tpimpi.errors import InputError
from tpimpi.models.blocks import Block
from tpimpi.system.buffers import Bytes, Pages, Places
from tpimpi.system.direct_io import Extent
from tpimpi.weights.slices.file import SliceFile, Tile
from tpimpi.weights.slices.layout import Record

SMALLEST_WINDOW = 2  # blocks: one computes while the next is read
FEWEST_TILES = 2  # in the ring, of the largest size: one computes while the next is read
USUAL_TILES = 5  # beyond these a larger ring was not seen to help
DEFAULT_READS = 2  # in flight
_PATIENCE = 2.0  # seconds


def pin_order(count: int) -> list[int]:
    """The indices of `count` tiles in the order in which they are pinned: every beginning of it is spread evenly."""
    bits = max(1, (count - 1).bit_length())
    backwards = (int(format(number, f"0{bits}b")[::-1], 2) for number in range(1 << bits))
    return [index for index in backwards if index < count]


def records_of(file: SliceFile, order: Sequence[Block]) -> list[Record]:
    """The tiles that a cycle of blocks goes through, in the order of use."""
    by_block: dict[Block, list[Record]] = {block: [] for block in order}
    for record in file.records:
        if record.block in by_block:
            by_block[record.block].append(record)
    return [record for block in order for record in by_block[block]]


def ring_bytes(records: Sequence[Record], tiles: int) -> int:
    """Memory for a ring of so many tiles; not more than all of them take."""
    sizes = [record.nbytes for record in records]
    return min(sum(sizes), tiles * max(sizes, default=0))


@dataclass(eq=False)
class _Load:
    """A tile on its way into memory, at one turn."""

    index: int  # of the tile in the cycle
    turn: int  # of its use, counted over all cycles
    pinned: bool
    buffer: Bytes
    pieces: deque[Extent | None]  # to be read yet; None is a chunked tile as a whole
    pending: int = 0  # pieces that are being read
    over: bool = False  # used, or given up: its memory goes once nothing is read into it any more
    tile: Tile | None = None


class Window:
    """`for tile in window.tiles(block)` yields the block's tiles in order; a tile is valid until the next is asked for.
    `hold(block)` has them all at once, where they are pinned.

    Both are called by one thread; `pin_at_most` and what is only read may be called by another. Raises InputError where
    `blocks` is under 2; `tiles` raises what reading raised (SliceError, StorageError).
    """

    def __init__(
        self,
        file: SliceFile,
        order: Sequence[Block],
        *,
        pinned_bytes: int | None = None,
        ring: int | None = None,
        blocks: int | None = None,
        reads: int = DEFAULT_READS,
        recorder: Recorder | None = None,
    ) -> None:
        """`order` is the cycle of blocks. `pinned_bytes` is how much may be pinned, None for everything; `ring` the bytes
        of the ring, None for USUAL_TILES tiles; `blocks` the number of them in memory, for the scheduler that pins
        nothing; `reads` those in flight."""
        if blocks is not None and blocks < SMALLEST_WINDOW:
            raise InputError(f"window is {blocks}, must be at least {SMALLEST_WINDOW} blocks; give --window 2 or more")
        self._file, self._order, self._recorder = file, list(order), recorder
        self._records = records_of(file, order)
        self._pieces = [file.pieces(record) for record in self._records]
        self._spans: dict[Block, tuple[int, int]] = {}  # of a block: its tiles in the cycle
        self._block_of: list[int] = []  # of a tile: its block's place in the order
        for place, block in enumerate(self._order):
            first = len(self._block_of)
            self._block_of += [place] * sum(record.block == block for record in self._records_from(first, block))
            self._spans[block] = (first, len(self._block_of))
        self._n = len(self._records)
        self.total_bytes = sum(record.nbytes for record in self._records)
        if blocks is not None and blocks >= len(self._order):
            blocks, pinned_bytes = None, None
        self._blocks = blocks
        self._pin_order = pin_order(self._n)
        self._place = {index: place for place, index in enumerate(self._pin_order)}
        self._places = Places([self._records[index].nbytes for index in self._pin_order])
        if ring is None:
            ring = self._blocks_bytes(blocks) if blocks is not None else ring_bytes(self._records, USUAL_TILES)
        assert ring >= ring_bytes(self._records, 1), "a tile would never find room"
        self._ring = _Ring(ring)
        self.bytes_read = 0
        self.wait_seconds = 0.0
        self.waiting_since: float | None = None  # time.monotonic(), while `tiles` waits for the disk
        self.waiting_for = ""
        lock = threading.Lock()
        self._changed = threading.Condition(lock)  # a tile is there, or never will be: `tiles` waits for it
        self._room = threading.Condition(lock)  # there may be something to read: wakes one reader, which wakes the next
        self._pinned: list[Tile | None] = [None] * self._n
        self._pin_loads: dict[int, _Load] = {}  # by index: pinned tiles, and those on their way
        self._wanted: set[int] = set()  # indices that are to be pinned
        self._skipped: set[int] = set()  # turns that will not come to be used
        self.pinned_bytes = 0  # memory of pinned tiles, those on their way included
        self.wanted_bytes = 0  # memory that pinned tiles are to take
        self.most_bytes = 0  # memory that tiles took, at most
        self._stream: deque[_Load] = deque()  # the ring's loads, oldest first
        self._live: dict[int, _Load] = {}  # by turn: those of them that are of use
        self._current: _Load | None = None  # whose pieces are being handed out
        self._use = 0  # the turn in use, or next to be used
        self._held = 1  # turns in use at once, from there on
        self._next = 0  # the turn that is to be read next
        self._late: list[_Load] = []  # pinned loads to be released once they are not in use
        self._error: BaseException | None = None
        self._closed = False
        self.pin_at_most(0 if blocks is not None else pinned_bytes)
        self._threads = [
            threading.Thread(target=self._read, args=(lane,), name=f"tpimpi-read-{lane}", daemon=True)
            for lane in range(reads)
        ]
        for thread in self._threads:
            thread.start()

    def _records_from(self, first: int, block: Block) -> Iterator[Record]:
        for record in self._records[first:]:
            if record.block != block:
                return
            yield record

    def _blocks_bytes(self, blocks: int) -> int:
        """Size of the largest run of so many consecutive blocks, plus one tile for the ring's turn."""
        sizes = [sum(r.nbytes for r in self._records[slice(*self._spans[block])]) for block in self._order]
        runs = (sum((sizes * 2)[start : start + blocks]) for start in range(len(sizes)))
        return max(runs) + max((record.nbytes for record in self._records), default=0)

    # What is held

    @property
    def buffer_bytes(self) -> int:
        """Memory of the ring, as far as it was ever used."""
        return self._ring.touched

    @property
    def ring_bytes(self) -> int:
        """Size of the ring, used or not."""
        return len(self._ring.memory)

    @property
    def streamed_bytes(self) -> int:
        """What has to be read for each token."""
        return self.total_bytes - self.wanted_bytes

    def pin_at_most(self, nbytes: int | None) -> int:
        """Pin as many tiles as `nbytes` hold (None: all); those that are pinned beyond that are given back before this
        returns.

        The tile in use goes when the next is asked for. Further ones are read when their turn comes. Returns the bytes
        wanted.
        """
        with self._changed:
            wanted: set[int] = set()
            taken = 0
            for index in self._pin_order:
                size = self._records[index].nbytes
                if nbytes is not None and taken + size > nbytes:
                    break
                taken += size
                wanted.add(index)
            self._wanted, self.wanted_bytes = wanted, taken
            missing = [load for index, load in self._pin_loads.items() if index not in wanted]
            for load in missing:
                del self._pin_loads[load.index]
                self.pinned_bytes -= self._records[load.index].nbytes
                self._pinned[load.index] = None
                load.over = True
                load.pieces.clear()
                self._late.append(load)
            self._release_late()
            self._read_again({load.index for load in missing})
            self._reap()
            self._room.notify()
        return taken

    def _release_late(self) -> None:
        """Give back the memory of pinned tiles that had to go; not of the one in use, nor of those still being read."""
        late = [load for load in self._late if load.pending or (load.index - self._use) % self._n < self._held]
        for load in self._late:
            if load not in late:
                self._places.release(self._place[load.index])
        self._late = late

    def _read_again(self, indices: set[int]) -> None:
        """Tiles that the readers passed over, since they were pinned, and that now are not: go back to the first of them."""
        turns = [turn for turn in range(self._use, self._next) if turn % self._n in indices]
        if not turns:
            return
        for turn in [turn for turn in self._live if turn >= turns[0]]:
            self._over(self._live.pop(turn))
        self._next = turns[0]
        self._reap()

    # Using tiles

    def tiles(self, block: Block) -> Iterator[Tile]:
        """The tiles of `block`, in order. Blocks of the cycle that lie before it and were not asked for are passed over."""
        first, last = self._spans[block]
        if first == last:
            return
        turn = self._use + (first - self._use) % self._n
        for turn_of_tile in range(turn, turn + last - first):
            yield self._tile(turn_of_tile)
        self._advance(turn + last - first)

    def hold(self, block: Block) -> list[Tile] | None:
        """All tiles of `block`, valid until the next are asked for; None where they are not all pinned, and in memory."""
        first, last = self._spans[block]
        self._advance(self._use + (first - self._use) % self._n)
        with self._changed:
            tiles = [tile for tile in self._pinned[first:last] if tile is not None]
            if len(tiles) < last - first:
                return None
            self._held = max(1, len(tiles))
        return tiles

    def count(self, block: Block) -> int:
        """How many tiles `block` has."""
        first, last = self._spans[block]
        return last - first

    def would_wait(self, block: Block) -> bool:
        """Whether the first tile of `block` is not in memory yet."""
        first, last = self._spans[block]
        return first < last and self._loaded(self._use + (first - self._use) % self._n) is None

    def skip(self, block: Block) -> None:
        """The next turn of `block` will not be used, so it need not be read."""
        with self._changed:
            first, last = self._spans[block]
            if first < last:
                turn = self._use + (first - self._use) % self._n
                if turn in self._skipped:  # it was, and is still the next
                    turn += self._n
                self._skipped = {skipped for skipped in self._skipped if skipped >= self._use}
                self._skipped.update(range(turn, turn + last - first))

    def _tile(self, turn: int) -> Tile:
        # First say what is in use, then look: pin_at_most does it the other way round, so one of the two sees the other.
        if not self._stream and not self._late:
            self._use, self._held = turn, 1
            tile = self._pinned[turn % self._n]
            if tile is not None and len(self._wanted) == self._n:
                return tile
        self._advance(turn)
        tile = self._loaded(turn)
        return tile if tile is not None else self._wait(turn)

    def _loaded(self, turn: int) -> Tile | None:
        load = self._live.get(turn)
        return self._pinned[turn % self._n] if load is None else load.tile

    def _wait(self, turn: int) -> Tile:
        began = time.monotonic()
        index = turn % self._n
        self.waiting_for, self.waiting_since = self._records[index].path, began
        try:
            with self._changed:
                while (tile := self._loaded(turn)) is None:
                    if self._error is not None:
                        raise self._error
                    self._changed.wait()
                return tile
        finally:
            ended = time.monotonic()
            self.waiting_since = None
            self.wait_seconds += ended - began
            if self._recorder is not None:
                self._recorder.add(WAIT, *self._name(index), began, ended)

    def _name(self, index: int) -> tuple[int, int]:
        """Of a tile: its block's place in the order, and its own in the block."""
        place = self._block_of[index]
        return place, index - self._spans[self._order[place]][0]

    def _advance(self, turn: int) -> None:
        """`turn` is next: what was used before it makes room."""
        with self._changed:
            self._use, self._held = turn, 1
            self._next = max(self._next, turn)
            for live in [live for live in self._live if live < turn]:
                self._over(self._live.pop(live))
            self._reap()
            self._release_late()
            self._skipped = {skipped for skipped in self._skipped if skipped >= turn}
            self._room.notify()

    def _over(self, load: _Load) -> None:
        load.over = True
        load.pieces.clear()

    def _reap(self) -> None:
        """Free the oldest places of the ring that are of no more use."""
        while self._stream and self._stream[0].over and not self._stream[0].pending:
            self._stream.popleft()
            self._ring.free_oldest()
        if not self._stream and len(self._pin_loads) == self._n and self._ring.touched:
            self._ring.release()

    # The readers

    def _read(self, lane: int) -> None:
        try:
            while (job := self._take()) is not None:
                load, piece = job
                record = self._records[load.index]
                began = time.monotonic()
                if piece is not None:
                    self._file.read_piece(record, piece, load.buffer)
                    tile = None
                else:
                    tile = self._file.read(record, load.buffer)
                if self._recorder is not None:
                    self._recorder.add(READ, *self._name(load.index), began, time.monotonic(), lane)
                self._took(load, record.nbytes if piece is None else piece.stop - piece.start, tile)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
                self._room.notify_all()

    def _take(self) -> tuple[_Load, Extent | None] | None:
        """The next piece to read, once there is one; None when the window is closed."""
        with self._changed:
            while not self._closed and self._error is None:
                if self._current is None or not self._current.pieces:
                    self._current = self._next_load()
                if self._current is not None:
                    self._current.pending += 1
                    self._room.notify()
                    return self._current, self._current.pieces.popleft()
                self._room.wait()
            return None

    def _next_load(self) -> _Load | None:
        """The next tile to read; None where there is nothing to do, or no room."""
        if len(self._pin_loads) == self._n:
            return None
        self._next = max(self._next, self._use)
        while self._next < self._limit():
            turn = self._next
            index = turn % self._n
            if index not in self._pin_loads and turn not in self._skipped:
                # One that was pinned, and is in use yet, has its memory until it is not.
                pinned = index in self._wanted and all(late.index != index for late in self._late)
                if pinned:
                    buffer = self._places.take(self._place[index])
                else:
                    place = self._ring.allocate(self._records[index].nbytes)
                    if place is None:
                        return None
                    buffer = self._ring.memory[place : place + self._records[index].nbytes]
                whole = self._pieces[index]
                load = _Load(index, turn, pinned, buffer, deque([None] if whole is None else whole))
                if pinned:
                    self._pin_loads[index] = load
                    self.pinned_bytes += self._records[index].nbytes
                else:
                    self._stream.append(load)
                    self._live[turn] = load
                self.most_bytes = max(self.most_bytes, self.pinned_bytes + self._ring.touched)
                self._next += 1
                return load
            self._next += 1
        return None

    def _limit(self) -> int:
        """The turn before which the readers stop."""
        if self._blocks is None:
            return self._use + self._n
        cycle, index = divmod(self._use, self._n)
        cycles, place = divmod(self._block_of[index] + self._blocks, len(self._order))
        return (cycle + cycles) * self._n + self._spans[self._order[place]][0]

    def _took(self, load: _Load, nbytes: int, tile: Tile | None) -> None:
        """A piece is in memory; with the last one the tile is checked and can be used."""
        with self._changed:
            self.bytes_read += nbytes
            last = load.pending == 1 and not load.pieces and not load.over
            if not last:
                load.pending -= 1
                if load.over:
                    self._reap()
                    self._release_late()
                    self._room.notify()
                return
        if tile is None:  # still counted as pending, so that its memory stays
            tile = self._file.tile(self._records[load.index], load.buffer)
        with self._changed:
            load.pending -= 1
            load.tile = tile
            if load.pinned and not load.over:
                self._pinned[load.index] = tile
            self._reap()
            self._release_late()
            self._changed.notify_all()

    def close(self) -> None:
        """Stop reading, and give all memory back; the file may be closed afterwards."""
        with self._changed:
            self._closed = True
            self._room.notify_all()
        for thread in self._threads:
            thread.join(_PATIENCE)  # one that waits for a disk which stalls is left behind
        self._places.release_all()
        self._ring.release()


class _Ring:
    """Places in one piece of memory, given out in order and freed in the same order; each is contiguous."""

    def __init__(self, nbytes: int) -> None:
        self._pages = Pages(nbytes)
        self.memory = self._pages.array
        self.touched = 0
        self._nbytes = nbytes
        self._live: deque[tuple[int, int]] = deque()

    def allocate(self, nbytes: int) -> int | None:
        """Offset of `nbytes` free bytes, or None while there are none."""
        start, stop = 0, self._nbytes
        if self._live:
            oldest, (newest, last) = self._live[0][0], self._live[-1]
            if newest < oldest:  # the live places wrap: free is what lies between
                start, stop = last, oldest
            elif last + nbytes <= self._nbytes:
                start = last
            else:
                stop = oldest
        if start + nbytes > stop:
            return None
        self._live.append((start, start + nbytes))
        self.touched = max(self.touched, start + nbytes)
        return start

    def free_oldest(self) -> None:
        self._live.popleft()

    def release(self) -> None:
        """Give the memory back while nothing is in it."""
        self._pages.release()
        self.touched = 0
