"""Rank 0 makes the tiles that are missing: its own go into its file, those of other ranks are sent to them.

The model is read and quantized on a thread of its own; the main thread alone talks to the other ranks.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from tpimpi.compute.arrays import Bytes
from tpimpi.compute.backends import load_quantizer
from tpimpi.errors import StarError, as_ours
from tpimpi.star import Pending, Star
from tpimpi.weights.build import TileWriter, build_tiles, bytes_to_build
from tpimpi.weights.slices.writer import SliceWriter
from tpimpi.weights.sources import Source
from tpimpi.weights.stream import END, FAILED, StreamWriter

MESSAGES_IN_FLIGHT = 2  # to each rank
SILENCE_S = 20.0  # without a message to a rank, after which it is sent an empty one

_Item = tuple[int, Bytes] | Exception | None  # a message for a rank; why building failed; None: all is built


class _StoppedError(Exception):
    """The main thread has given up, so the thread that builds is to end."""


class TileSender:
    """Builds the missing tiles (`own` ones, and those of `streams`) and sends the streams' messages to their ranks.

    Memory: what `build_tiles` takes, and three messages for each rank.
    """

    def __init__(self, star: Star, source: Source, own: SliceWriter | None, streams: Sequence[StreamWriter]) -> None:
        self.source, self.own, self.streams = source, own, streams
        self._writers: list[TileWriter] = [*([] if own is None else [own]), *streams]
        self._total = max(1, bytes_to_build(self._writers, own))
        self._built = 0  # bytes
        self._items: queue.Queue[_Item] = queue.Queue(MESSAGES_IN_FLIGHT)
        self._stop = threading.Event()
        self._messages = _Messages(star, [stream.rank for stream in streams])
        for stream in streams:
            stream.send = lambda rank, message: self._hand_over((rank, message))

    def run(self, update: Callable[[int, int], None]) -> None:
        """Do all of it; `update` gets the bytes built, and those to build. Raises ModelError, StorageError, StarError."""
        builder = threading.Thread(target=self._build, name="tpimpi-slicing", daemon=True)
        builder.start()
        try:
            self._send(update)
        except Exception as error:
            self._end(builder)
            if not isinstance(as_ours(error), StarError):
                self._messages.give_up(self.streams)
            raise
        finally:
            self._end(builder)
        update(self._total, self._total)

    def _end(self, builder: threading.Thread) -> None:
        self._stop.set()
        builder.join()

    def _send(self, update: Callable[[int, int], None]) -> None:
        """The main thread: send what the other thread hands over, until it is done. Raises what it raised."""
        while True:
            try:
                item = self._items.get(timeout=0.2)
            except queue.Empty:
                pass
            else:
                if item is None:
                    break
                if isinstance(item, Exception):
                    raise item
                self._messages.send(*item)
            self._messages.keep_waiting()
            update(min(self._built, self._total - 1), self._total)
        self._messages.finish()

    # The thread that builds

    def _build(self) -> None:
        with contextlib.suppress(_StoppedError):
            self._hand_over(self._build_all())

    def _build_all(self) -> Exception | None:
        """Build all tiles; the error that ended it, if one did."""
        try:
            quantizer = load_quantizer(len(os.sched_getaffinity(0)))
            build_tiles(self.source, self._writers, self.own, self._report, quantizer)
            for stream in self.streams:
                stream.end(END)
        except _StoppedError:
            raise
        except Exception as error:
            return error
        return None

    def _report(self, nbytes: int) -> None:
        self._built = nbytes
        if self._stop.is_set():
            raise _StoppedError

    def _hand_over(self, item: _Item) -> None:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=1.0)
                return
            except queue.Full:
                continue
        raise _StoppedError


class _Messages:
    """Messages on their way to the other ranks, at most MESSAGES_IN_FLIGHT to each. Raises StarError."""

    def __init__(self, star: Star, ranks: Sequence[int]) -> None:
        self.star = star
        self._pending: dict[int, deque[tuple[Pending, Bytes]]] = {rank: deque() for rank in ranks}
        self._last = dict.fromkeys(ranks, time.monotonic())

    def send(self, rank: int, message: Bytes) -> None:
        pending = self._pending[rank]
        while len(pending) >= MESSAGES_IN_FLIGHT:
            self.star.finish_bulk(pending.popleft()[0])
        pending.append((self.star.start_bulk(message, rank), message))  # kept until it is gone
        self._last[rank] = time.monotonic()

    def keep_waiting(self) -> None:
        """Tell ranks whose next tile takes long that it will come."""
        for rank, last in self._last.items():
            if time.monotonic() - last > SILENCE_S:
                self.send(rank, np.empty(0, np.uint8))

    def finish(self) -> None:
        for pending in self._pending.values():
            while pending:
                self.star.finish_bulk(pending.popleft()[0])

    def give_up(self, streams: Sequence[StreamWriter]) -> None:
        """Tell the ranks that wait for tiles that none will come."""
        for stream in streams:
            stream.send = self.send
            stream.end(FAILED)
        self.finish()
