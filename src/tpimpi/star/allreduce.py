"""Sums over all ranks: the star, and what it is measured against.

An algorithm is a generator. It starts messages, yields what is to be done before it can go on, and is resumed when that
is done; so several sums can be under way, and computing can go on in between (`Allreduce.poll`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from tpimpi.formats import F32
from tpimpi.star.post import PARTIAL, SUM, Pending, Post

Steps = Iterator[Pending]


class Allreduce:
    """A sum under way: made by `Star.start`, ended by `wait`."""

    def __init__(self, post: Post | None, steps: Steps, timeout: float, spent: Callable[[float], None]) -> None:
        """`spent` is told the seconds that go into it. `post` is None where there is a single rank, and nothing to do."""
        self._post, self._steps, self._timeout, self._spent = post, steps, timeout, spent
        self._pending = self._next()

    def _next(self) -> Pending | None:
        return next(self._steps, None)

    def poll(self) -> bool:
        """Go on as far as that is possible without waiting; whether the sum is done."""
        began = time.monotonic()
        while self._pending is not None and self._post is not None and self._post.test(self._pending):
            self._pending = self._next()
        self._spent(time.monotonic() - began)
        return self._pending is None

    def wait(self, deadline: float | None = None) -> None:
        """End it. `deadline` is a time.monotonic() value, None for the run's timeout. Raises StarError when it has
        passed."""
        began = time.monotonic()
        deadline = began + self._timeout if deadline is None else deadline
        while self._pending is not None and self._post is not None:
            self._post.wait(self._pending, deadline)
            self._pending = self._next()
        self._spent(time.monotonic() - began)


def star(post: Post, flat: F32) -> Steps:
    """Everyone sends to rank 0, which adds in rank order and sends its own bytes back: two hops, whatever the number
    of ranks (arXiv 2410.00531, section 3.3).
    """
    others = range(1, post.size)
    if post.rank != 0:
        # The sum may not be received into the array that is still being sent.
        result = np.empty_like(flat)
        answer = post.receive(result, 0, SUM)
        yield post.send(flat, 0, PARTIAL)
        yield answer
        flat[:] = result
        return
    partials = np.empty((len(others), flat.size), np.float32)
    receives = [post.receive(partials[rank - 1], rank, PARTIAL) for rank in others]
    for rank, pending in zip(others, receives, strict=True):
        yield pending
        np.add(flat, partials[rank - 1], out=flat)
    yield post.send_to(flat, others, SUM)


def library(post: Post, flat: F32) -> Steps:
    """MPI's own allreduce."""
    result = np.empty_like(flat)
    yield Pending([post.comm.Iallreduce(flat, result)], [0], [None])
    flat[:] = result


ALGORITHMS: dict[str, Callable[[Post, F32], Steps]] = {"star": star, "library": library}
