"""The window: keeps some of this rank's tiles in memory and streams the others from its slice file, ahead of the compute.

The blocks of a model are used in the same order for every token, so the order of reading is a cycle. A cache that keeps
what was used last would have dropped each tile just before its turn came, and read everything anew for every token. So
the tiles that fit are *pinned*: read once, and kept. The others pass through a ring of memory that is used again and
again, read by a few threads (see readers) that go on across blocks and tokens, while the star waits and while rank 0
samples. A token then takes the larger of the time to compute it and the time to read what is not pinned; never their sum.

Which tiles are pinned: any choice of so many bytes leaves as many to read, so what counts is that reading never stops. It
would where a long run of pinned tiles is computed: the ring fills up, and the disk idles. So the pinned tiles are spread
as evenly over the cycle as can be, and so that this holds for every number of them: in the order of van der Corput
(1935), in which each further one halves a longest gap. Taking away the last again, under pressure, leaves the others as
evenly spread.

The head is spread like the rest. Rank 0 alone has it, and the other ranks wait meanwhile: where each rank has its own
disk, a token takes as long as the rank that reads most, wherever its pinned tiles lie. So rank 0 wants the larger budget
(tpimpi.engine.budget divides a host's so) or a smaller share.

`blocks` is the scheduler of arXiv 2410.00531 instead: nothing is pinned, and so many consecutive blocks are in memory.

`PinnedSet` holds the tiles that stay, `Ring` the memory that the others pass through, `ReadQueue` says what is read next;
`Window` is what the model sees of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from tpimpi.engine.cycle import Cycle
from tpimpi.engine.pinned_set import PinnedSet
from tpimpi.engine.read_queue import ReadQueue
from tpimpi.engine.readers import Readers
from tpimpi.engine.ring import USUAL_TILES, Ring, ring_bytes
from tpimpi.engine.trace import WAIT, Recorder
from tpimpi.errors import DamagedMemoryError, InputError
from tpimpi.models.blocks import Block
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.tile import Tile

SMALLEST_WINDOW = 2  # blocks: one computes while the next is read


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
        readers: Readers,
        *,
        pinned_bytes: int | None = None,
        ring: int | None = None,
        blocks: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """`order` is the cycle of blocks, which `readers` read. `pinned_bytes` is how much may be pinned, None for
        everything; `ring` the bytes of the ring, None for USUAL_TILES tiles; `blocks` the number of them in memory, for the
        scheduler that pins nothing."""
        if blocks is not None and blocks < SMALLEST_WINDOW:
            raise InputError(f"window is {blocks}, must be at least {SMALLEST_WINDOW} blocks; give --window 2 or more")
        self._file = file
        self._cycle = cycle = Cycle(file, order)
        self._to_check = -1  # the tile that was checked last
        self._damage: DamagedMemoryError | None = None
        if blocks is not None and blocks >= len(cycle.order):
            blocks, pinned_bytes = None, None
        if ring is None:
            ring = cycle.blocks_bytes(blocks) if blocks is not None else ring_bytes(cycle.records, USUAL_TILES)
        assert ring >= ring_bytes(cycle.records, 1), "a tile would never find room"
        self._recorder = recorder
        self.total_bytes = sum(cycle.sizes)
        self.wait_seconds = 0.0
        self.waiting_since: float | None = None  # time.monotonic(), while `tiles` waits for the disk
        self.waiting_for = ""
        self._ring = Ring(ring)
        self._pinned = PinnedSet(cycle.sizes)
        self._pinned.want(0 if blocks is not None else pinned_bytes)
        self._queue = ReadQueue(
            file, cycle, self._pinned, self._ring, blocks=blocks, readers=readers, recorder=recorder
        )

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
    def pinned_bytes(self) -> int:
        """Memory of pinned tiles, those on their way included."""
        return self._pinned.nbytes

    @property
    def wanted_bytes(self) -> int:
        """Memory that pinned tiles are to take."""
        return self._pinned.wanted_bytes

    @property
    def streamed_bytes(self) -> int:
        """What has to be read for each token."""
        return self.total_bytes - self.wanted_bytes

    @property
    def peak_bytes(self) -> int:
        """Memory that tiles took, at most."""
        return self._queue.peak_bytes

    @property
    def bytes_read(self) -> int:
        """What was read from the file so far."""
        return self._queue.bytes_read

    def pin_at_most(self, nbytes: int | None) -> int:
        """Pin as many tiles as `nbytes` hold (None: all); those that are pinned beyond that are given back before this
        returns.

        The tile in use goes when the next is asked for. Further ones are read when their turn comes. Returns the bytes
        wanted.
        """
        return self._queue.pin_at_most(nbytes)

    # Using tiles

    def tiles(self, block: Block) -> Iterator[Tile]:
        """The tiles of `block`, in order. Blocks of the cycle that lie before it and were not asked for are passed over."""
        first, last = self._cycle.spans[block]
        if first == last:
            return
        turn = self._cycle.next_turn(first, self._queue.turn)
        for turn_of_tile in range(turn, turn + last - first):
            yield self._tile(turn_of_tile)
        self._queue.advance(turn + last - first)

    def pinned_tiles(self, block: Block) -> list[Tile] | None:
        """All tiles of `block`, valid until the next are asked for; None where they are not all pinned, and in memory."""
        first, last = self._cycle.spans[block]
        self._queue.advance(self._cycle.next_turn(first, self._queue.turn))
        return self._queue.pinned_tiles(first, last)

    def tiles_out_of_turn(self, block: Block) -> Iterator[Tile]:
        """The tiles of `block` out of turn, in order: pinned ones as they are in memory, others read for this alone. Each is
        valid until the next is asked for."""
        first, last = self._cycle.spans[block]
        own: Bytes | None = None
        for index in range(first, last):
            with self._queue.borrowed(index) as load:
                if load is not None and load.tile is not None:
                    yield load.tile
                    continue
            if own is None:
                own = aligned_buffer(max(self._cycle.sizes[first:last]))
            record = self._cycle.records[index]
            yield self._file.read(record, own[: record.nbytes])

    def check_next_pinned(self) -> int:
        """Compare the next pinned tile with its checksum, and remember where it is not what was read; see `raise_damage`.

        Returns its bytes, 0 where none was pinned. For one thread beside that which uses the tiles."""
        for _ in range(self._cycle.count):
            self._to_check = (self._to_check + 1) % self._cycle.count
            with self._queue.borrowed(self._to_check) as load:
                if load is None:
                    continue
                record = self._cycle.records[self._to_check]
                self._damage = self._damage or self._file.damage(record, load.buffer)
                return record.nbytes
        return 0

    def raise_damage(self) -> None:
        """Raise what `check_next_pinned` found, if it found anything."""
        if self._damage is not None:
            raise self._damage

    @property
    def turn(self) -> int:
        """The turn in use; while it stays the same, nothing is computed."""
        return self._queue.turn

    def count(self, block: Block) -> int:
        """How many tiles `block` has."""
        first, last = self._cycle.spans[block]
        return last - first

    def would_wait(self, block: Block) -> bool:
        """Whether the first tile of `block` is not in memory yet."""
        first, last = self._cycle.spans[block]
        return first < last and self._queue.loaded(self._cycle.next_turn(first, self._queue.turn)) is None

    def skip(self, block: Block) -> None:
        """The next turn of `block` will not be used, so it need not be read."""
        first, last = self._cycle.spans[block]
        if first < last:
            self._queue.skip(first, last)

    def _tile(self, turn: int) -> Tile:
        queue, pinned = self._queue, self._pinned
        # First say what is in use, then look: pin_at_most does it the other way round, so one of the two sees the other.
        if not queue.stream and not pinned.retired:
            queue.turn, queue.turns_in_use = turn, 1
            tile = pinned.tiles[turn % self._cycle.count]
            if tile is not None and pinned.all_wanted:
                return tile
        queue.advance(turn)
        tile = queue.loaded(turn)
        return tile if tile is not None else self._wait(turn)

    def _wait(self, turn: int) -> Tile:
        """The tile, once it is in memory; how long that took is counted."""
        began = time.monotonic()
        index = turn % self._cycle.count
        self.waiting_for, self.waiting_since = self._cycle.records[index].path, began
        try:
            return self._queue.wait(turn)
        finally:
            ended = time.monotonic()
            self.waiting_since = None
            self.wait_seconds += ended - began
            if self._recorder is not None:
                self._recorder.add(WAIT, *self._cycle.location(index), began, ended)

    def close(self) -> None:
        """Stop reading, and give all memory back; the file may be closed afterwards."""
        self._queue.close()
        self._pinned.release_all()
        self._ring.release()
