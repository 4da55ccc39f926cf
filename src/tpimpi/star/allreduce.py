"""Sums over all ranks: the star, other algorithms that add in rank order, and those it is measured against.

An algorithm is a generator. It starts messages, yields what is to be done before it can go on, and is resumed when that
is done; so several sums can be under way, and computing can go on in between (`Allreduce.poll`). After each of them every
rank holds the same bits. With n ranks, S bytes, a latency L one way and B bytes a second each way through each rank's link:

    star        2 L + (n - 1) S / B         to the hub and back, piece by piece
    exchange      L + (n - 1) S / B         everyone sends all to everyone
    mesh        2 L + 2 (n - 1) / n S / B   everyone is the hub of a part
    ring        2 (n - 1) L + 2 (n - 1) / n S / B
    tree        2 ceil(log2 n) L + log2 n S / B, about

star, exchange and mesh add in rank order: the same numbers to the bit (with the f32 wire), so `auto` may choose among them
by what it measures, and a run's answer does not depend on that. The star needs links to rank 0 alone.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.star.channel import PARTIAL, SUM, Channel, Pending
from tpimpi.star.pieces import IncomingPiece, PieceChannel

Steps = Iterator[Pending]

EARLIEST_ANSWER_SHARE = 0.95  # no answer comes before this share of the shortest round trip seen
BACKGROUND_POLL_S = 300e-6  # between two looks at the sums in the background


class Allreduce:
    """A sum under way: made by `Star.start`, ended by `wait`."""

    def __init__(
        self,
        channel: Channel | None,
        steps: Steps,
        timeout: float,
        spent: Callable[[float], None],
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        """`spent` is told the seconds that go into it; `finish` is called by `wait` when it is done. `channel` is None where
        there is a single rank, and nothing to do."""
        self._finish = finish
        self._channel, self._steps, self._timeout, self._spent = channel, steps, timeout, spent
        self._lock = threading.Lock()  # of the steps: `Background` goes on with them too
        self._error: BaseException | None = None
        self._pending = self._next()

    def _next(self) -> Pending | None:
        return next(self._steps, None)

    def poll(self) -> bool:
        """Go on as far as that is possible without waiting; whether the sum is done. What goes wrong is raised by `wait`."""
        if self._pending is None:
            return True
        if self._lock.acquire(blocking=False):
            try:
                while self._pending is not None and self._channel is not None and self._channel.test(self._pending):
                    self._pending = self._next()
            except BaseException as error:
                self._error, self._pending = error, None
            finally:
                self._lock.release()
        return self._pending is None

    def wait(self, deadline: float | None = None) -> None:
        """End it. `deadline` is a time.monotonic() value, None for the run's timeout. Raises StarError when it has
        passed."""
        if self._pending is not None:
            began = time.monotonic()
            deadline = began + self._timeout if deadline is None else deadline
            with self._lock:
                while self._pending is not None and self._channel is not None:
                    self._channel.wait(self._pending, deadline)
                    self._pending = self._next()
            self._spent(time.monotonic() - began)
        if self._error is not None:
            raise self._error
        self._finish()


class Background:
    """A thread that goes on with sums while the main thread computes: MPI moves messages, and the hub adds and answers, only
    while somebody asks it to. MPI has to be started for several threads."""

    def __init__(self) -> None:
        self._sums: list[Allreduce] = []
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, under_way: Allreduce) -> None:
        """Go on with this one too, until it is done."""
        with self._work:
            self._sums.append(under_way)
            self._work.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tpimpi-sums", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._sums:
                    self._work.wait()
                sums = list(self._sums)
            done = [under_way for under_way in sums if under_way.poll()]
            with self._work:
                self._sums = [under_way for under_way in self._sums if under_way not in done]
            del sums, done  # which would hold their star, and its memory, while there is nothing to do
            time.sleep(BACKGROUND_POLL_S)


def star(pieces: PieceChannel, flat: F32) -> Steps:
    """Everyone sends to rank 0, which adds in rank order and sends its own bytes back: two hops, whatever the number
    of ranks (arXiv 2410.00531, section 3.3).
    """
    cut, others = pieces.cut(0, flat.size), range(1, pieces.size)
    if pieces.rank != 0:
        answers = [pieces.expect(piece, 0, SUM) for piece in cut]
        sends = [pieces.send(flat[piece], 0, PARTIAL) for piece in cut]
        # Before that no answer can be here; looks are made by the core that somebody's partial may be waiting for.
        earliest = time.monotonic() + EARLIEST_ANSWER_SHARE * 2 * (pieces.channel.latency or 0.0)
        for piece, send, answer in zip(cut, sends, answers, strict=True):
            yield send
            answer.pending.not_before = earliest
            yield answer.pending
            answer.put(flat[piece])
        return
    inbox = [[pieces.expect(piece, rank, PARTIAL) for rank in others] for piece in cut]
    for piece, partials in zip(cut, inbox, strict=True):
        total = flat[piece]
        for pending, partial in zip(_side_by_side(partials), partials, strict=True):
            yield pending
            partial.add(total)
        pieces.publish(total, others, SUM)
    yield pieces.sent()


def exchange(pieces: PieceChannel, flat: F32) -> Steps:
    """Everyone sends its partial to everyone, who all add in rank order: a single hop, for n - 1 times the bytes.

    All add the same numbers in the same order, in IEEE f32, and so have the same bits.
    """
    cut = pieces.cut(0, flat.size)
    others = [(pieces.rank + turn) % pieces.size for turn in range(1, pieces.size)]
    inbox = {(piece.start, rank): pieces.expect(piece, rank, PARTIAL) for piece in cut for rank in others}
    for piece in cut:
        pieces.publish(flat[piece], others, PARTIAL)
    for piece in cut:
        yield from _add_in_rank_order(pieces, flat[piece], {rank: inbox[piece.start, rank] for rank in others})
    yield pieces.sent()


def mesh(pieces: PieceChannel, flat: F32) -> Steps:
    """Everyone is the hub of a part: it gets that part of every partial, adds in rank order, and sends its own bytes to
    everyone. Two hops, and no link carries more than another (a reduce-scatter and an all-gather, both direct; see Thakur,
    Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005).
    """
    cut = pieces.parts(flat.size)
    # Each begins with another one, so that not all send to the same rank at once.
    others = [(pieces.rank + turn) % pieces.size for turn in range(1, pieces.size)]
    inbox = [{rank: pieces.expect(piece, rank, PARTIAL) for rank in others} for piece in cut[pieces.rank]]
    # The first pieces of all parts, then the second: so every hub has something to add while the rest is on its way.
    theirs = [
        (owner, cut[owner][turn]) for turn in range(max(map(len, cut))) for owner in others if turn < len(cut[owner])
    ]
    answers = [(piece, pieces.expect(piece, owner, SUM)) for owner, piece in theirs]
    sends = [pieces.send(flat[piece], owner, PARTIAL) for owner, piece in theirs]
    for piece, partials in zip(cut[pieces.rank], inbox, strict=True):
        yield from _add_in_rank_order(pieces, flat[piece], partials)
        pieces.publish(flat[piece], others, SUM)
    for send, (piece, answer) in zip(sends, answers, strict=True):
        yield send
        yield answer.pending
        answer.put(flat[piece])
    yield pieces.sent()


def _add_in_rank_order(pieces: PieceChannel, total: F32, partials: Mapping[int, IncomingPiece]) -> Steps:
    """Make `total`, this rank's own partial, the sum of all."""
    own = total.copy() if pieces.rank else total
    ranks = sorted(partials)
    pending = dict(zip(ranks, _side_by_side([partials[rank] for rank in ranks]), strict=True))
    for rank in range(pieces.size):
        if rank == pieces.rank:
            if rank:
                total += own
            continue
        yield pending[rank]
        if rank:
            partials[rank].add(total)
        else:
            partials[rank].put(total)


def _side_by_side(arrivals: Sequence[IncomingPiece]) -> list[Pending]:
    """What is to be done for each of them, in order: while one is awaited, those behind it are opened as they come, so that
    after the last one that comes only that is left to be opened."""
    pending = [arrival.pending for arrival in arrivals]
    for one, behind in itertools.pairwise(pending):
        one.behind = behind
    return pending


def ring(pieces: PieceChannel, flat: F32) -> Steps:
    """Reduce-scatter, then all-gather, each n - 1 steps to the next rank: no link carries more than another, but 2 (n - 1)
    hops (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).

    Part p is added up on its way from rank p to rank p - 1, which then passes its own bytes round.
    """
    n, rank = pieces.size, pieces.rank
    cut, left, right = pieces.parts(flat.size), (rank - 1) % n, [(rank + 1) % n]
    adding = [[pieces.expect(piece, left, PARTIAL) for piece in cut[(rank - step) % n]] for step in range(1, n)]
    gathering = [[pieces.expect(piece, left, SUM) for piece in cut[(rank - step) % n]] for step in range(n - 1)]
    sends = {piece.start: pieces.send(flat[piece], right[0], PARTIAL) for piece in cut[rank]}
    for step, arrivals in enumerate(adding, start=1):
        for piece, arrival in zip(cut[(rank - step) % n], arrivals, strict=True):
            yield arrival.pending
            arrival.add(flat[piece])
            if step < n - 1:
                sends[piece.start] = pieces.send(flat[piece], right[0], PARTIAL)
            else:
                pieces.publish(flat[piece], right, SUM)
    for step, arrivals in enumerate(gathering):
        for piece, arrival in zip(cut[(rank - step) % n], arrivals, strict=True):
            yield arrival.pending
            yield sends[piece.start]
            if step < n - 2:
                pieces.forward(arrival.data, right, SUM)
            arrival.put(flat[piece])
    yield pieces.sent()


def tree(pieces: PieceChannel, flat: F32) -> Steps:
    """A binomial tree: sums go up to rank 0, its own bytes down again, ceil(log2 n) hops each way (reduce and broadcast of
    short messages in MPICH: Thakur, Rabenseifner and Gropp, 2005).
    """
    cut, rank = pieces.cut(0, flat.size), pieces.rank
    lowest = rank & -rank if rank else 1 << pieces.size.bit_length()  # the parent is `lowest` below
    bits = [1 << bit for bit in range(pieces.size.bit_length()) if 1 << bit < lowest]
    children = [rank + bit for bit in bits if rank + bit < pieces.size]
    down = children[::-1]  # those with the most below them first
    inbox = [[pieces.expect(piece, child, PARTIAL) for child in children] for piece in cut]
    answers = [pieces.expect(piece, rank - lowest, SUM) for piece in cut] if rank else []
    sends = []
    for piece, partials in zip(cut, inbox, strict=True):
        total = flat[piece]
        for pending, partial in zip(_side_by_side(partials), partials, strict=True):
            yield pending
            partial.add(total)
        if rank:
            sends.append(pieces.send(total, rank - lowest, PARTIAL))
        else:
            pieces.publish(total, down, SUM)
    for piece, send, answer in zip(cut if rank else [], sends, answers, strict=True):
        yield answer.pending
        pieces.forward(answer.data, down, SUM)
        yield send
        answer.put(flat[piece])
    yield pieces.sent()


def library(pieces: PieceChannel, flat: F32) -> Steps:
    """MPI's own allreduce; in f32 only."""
    assert pieces.wire.format == "f32"
    result = np.empty_like(flat)
    yield Pending([pieces.channel.comm.Iallreduce(flat, result)], [0], [None], counted=False)
    flat[:] = result


ALGORITHMS: dict[str, Callable[[PieceChannel, F32], Steps]] = {
    "star": star,
    "exchange": exchange,
    "mesh": mesh,
    "ring": ring,
    "tree": tree,
    "library": library,
}
IN_RANK_ORDER = ("star", "exchange", "mesh")  # give the same numbers to the bit


def parse_rule(rule: str) -> list[tuple[float, str]]:
    """Which algorithm is for which sums: "star", or "exchange:8192,star:65536,mesh": up to 8192 numbers, up to 65536, above.

    (most numbers, algorithm) each, in ascending order.
    """
    steps = []
    for step in rule.split(","):
        name, _, most = step.partition(":")
        assert name in ALGORITHMS, rule
        steps.append((float(most or "inf"), name))
    assert steps == sorted(steps) and steps[-1][0] == float("inf"), rule
    return steps
