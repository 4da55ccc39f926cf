"""One link at a time, as `doctor` looks at it: how long a message takes, how much that varies, and bytes a second each way.

(`links` is for choosing a sum: quick, and all ranks at once.)
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.arrays import Bytes, median
from tpimpi.star.channel import ECHO, Channel
from tpimpi.star.pieces import PIECE_NUMBERS
from tpimpi.star.star import Star

MAX_PINGS, MIN_PINGS = 100, 10
PING_TIME_S = 0.5  # after this time MIN_PINGS are enough
CHUNK_BYTES = 4 * PIECE_NUMBERS  # of one message while bandwidth is measured: the size that sums have
FIRST_BULK_BYTES, MAX_BULK_BYTES = 1 << 16, 1 << 24  # sent at once: doubled until that takes BULK_TIME_S
BULK_TIME_S = 0.15
ANSWER_TIMEOUT_S = 30.0  # for one message of a measurement

_PING, _UP, _DOWN, _END = range(4)  # what the hub asks for: int64 [2], kind and bytes


@dataclass(frozen=True)
class Ping:
    """Between rank 0 and another: seconds one way (half of the shortest and of the median round trip), bytes a second to it
    and from it, and how many bytes went each way in all."""

    latency_s: float
    median_s: float
    to_bytes_per_s: float
    from_bytes_per_s: float
    moved_bytes: int


def ping_link(star: Star, rank: int) -> Ping:
    """Hub: look at the link to `rank`, which answers. Raises StarError where it does not in time."""
    channel = _channel(star)
    trips: list[float] = []
    began = time.monotonic()
    while len(trips) < MAX_PINGS and (len(trips) < MIN_PINGS or time.monotonic() - began < PING_TIME_S):
        trips.append(_timed(channel, rank, _PING, 0))
    to_rate, to_moved = _rate(channel, rank, _UP, min(trips))
    from_rate, from_moved = _rate(channel, rank, _DOWN, min(trips))
    _ask(channel, rank, _END, 0)
    return Ping(min(trips) / 2, median(trips) / 2, to_rate, from_rate, min(to_moved, from_moved))


def answer_link(star: Star) -> None:
    """Another rank: answer until the hub has seen enough."""
    channel = _channel(star)
    while True:
        kind, nbytes = (int(value) for value in _take(channel, 0).view(np.int64))
        if kind == _END:
            return
        if kind == _UP:
            _take_all(channel, 0, nbytes)
        if kind == _DOWN:
            _send_all(channel, 0, nbytes)
        else:
            _ask(channel, 0, _PING, 0)


def _channel(star: Star) -> Channel:
    assert star._channel is not None
    return star._channel


def _rate(channel: Channel, rank: int, kind: int, trip: float) -> tuple[float, int]:
    """Bytes a second, and how many were moved to find out."""
    nbytes, moved = FIRST_BULK_BYTES, 0
    while True:
        seconds = _timed(channel, rank, kind, nbytes)
        moved += nbytes
        if seconds - trip >= BULK_TIME_S or nbytes >= MAX_BULK_BYTES:
            return nbytes / max(seconds - trip, seconds / 10), moved
        nbytes *= 2


def _timed(channel: Channel, rank: int, kind: int, nbytes: int) -> float:
    """Seconds from asking `rank` to its whole answer."""
    began = time.monotonic()
    _ask(channel, rank, kind, nbytes)
    if kind == _UP:
        _send_all(channel, rank, nbytes)
    if kind == _DOWN:
        _take_all(channel, rank, nbytes)
    else:
        _take(channel, rank)
    return time.monotonic() - began


def _ask(channel: Channel, rank: int, kind: int, nbytes: int) -> None:
    channel.wait(channel.send(np.array([kind, nbytes], np.int64), rank, ECHO), time.monotonic() + ANSWER_TIMEOUT_S)


def _take(channel: Channel, rank: int) -> Bytes:
    return channel.take(rank, ECHO, time.monotonic() + ANSWER_TIMEOUT_S)


def _send_all(channel: Channel, rank: int, nbytes: int) -> None:
    chunk = np.zeros(CHUNK_BYTES, np.uint8)
    sends = [
        channel.send(chunk[: min(CHUNK_BYTES, nbytes - start)], rank, ECHO) for start in range(0, nbytes, CHUNK_BYTES)
    ]
    for send in sends:
        channel.wait(send, time.monotonic() + ANSWER_TIMEOUT_S)


def _take_all(channel: Channel, rank: int, nbytes: int) -> None:
    left = nbytes
    while left > 0:
        left -= len(_take(channel, rank))
