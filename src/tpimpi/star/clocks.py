"""Clocks of other ranks compared with the hub's.

As NTP does, the hub takes of CLOCK_ROUND_TRIPS round trips the shortest, and the other's clock for the middle of it: wrong
by half of that trip at most, and by what the clocks drift apart afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tpimpi.errors import StarError
from tpimpi.star.channel import CLOCK, Channel

CLOCK_ROUND_TRIPS = 16  # to each rank


def clock_offset(channel: Channel, rank: int, clock: Callable[[], float], deadline: float) -> float:
    """Hub: seconds to add to the clock of `rank`, which calls `answer_with_clock` meanwhile, to have this rank's.

    `deadline` is a time.monotonic() value. Raises StarError where no answer comes until then, or one that is no number.
    """
    here, there = np.empty(1, np.float64), np.empty(1, np.float64)
    trips = []
    for _ in range(CLOCK_ROUND_TRIPS):
        reply = channel.receive(there, rank, CLOCK)
        here[0] = began = clock()
        channel.wait(channel.send(here, rank, CLOCK), deadline)
        channel.wait(reply, deadline)
        ended = clock()
        if not math.isfinite(there[0]):
            raise StarError(f"rank {rank} says that its clock shows {there[0]} s, which makes no sense")
        trips.append((ended - began, (began + ended) / 2 - float(there[0])))
    return min(trips)[1]


def answer_with_clock(channel: Channel, clock: Callable[[], float], deadline: float) -> None:
    """Another rank: answer each of the hub's messages with what `clock` shows."""
    asked, answer = np.empty(1, np.float64), np.empty(1, np.float64)
    for _ in range(CLOCK_ROUND_TRIPS):
        channel.wait(channel.receive(asked, 0, CLOCK), deadline)
        answer[0] = clock()
        channel.wait(channel.send(answer, 0, CLOCK), deadline)
