"""Run on every rank: every algorithm over every wire, sums that overlap, and measured links. Fails by a traceback."""

from __future__ import annotations

import sys

import numpy as np
from mpi4py import MPI

from tpimpi.star import ALGORITHMS, WIRES, Star, choose, connect, parse_rule
from tpimpi.star.allreduce import IN_RANK_ORDER
from tpimpi.star.codec import wire_of

SIZES = (1, 33, 4096, 8192, 40_000, 140_000)
FEW_SIZES = (33, 4096, 40_000)  # where many ranks share few cores
MANY_RANKS = 5
# Of one rounding: half a unit in the last of bf16's 8 bits; half a step of q8_0, of which 120 or more reach the greatest of
# a block.
ROUNDING = {"f32": 2.0**-24, "bf16": 2.0**-9, "q8_0": 1 / 240}


def main() -> None:
    star = connect()
    sizes = SIZES if star.rank.size < MANY_RANKS else FEW_SIZES
    for wire in WIRES:
        star.wire = wire_of(wire)
        for algorithm in ALGORITHMS:
            if algorithm != "library" or wire == "f32":
                star.algorithm = algorithm
                for latency in (None, 1e-6):  # for which pieces are small, and large
                    star._channel.latency = latency  # type: ignore[union-attr]
                    for count in sizes:
                        _near_the_sum(star, count, wire)
                    _two_under_way(star)
        star.algorithm = "star"
        _exact(star)
        _broadcast(star, wire)
        _links(star)
    star.wire = wire_of("f32")
    for count in sizes:
        _in_rank_order(star, count)
    _in_the_background(star)
    star.algorithm = "exchange:100,star:9000,mesh"
    for count in sizes:
        _near_the_sum(star, count, "f32")
    if star.rank.is_hub:
        print("all well", flush=True)
    star.close()


def _near_the_sum(star: Star, count: int, wire: str) -> None:
    world = MPI.COMM_WORLD
    partial = np.random.default_rng([world.rank, count]).standard_normal(count).astype(np.float32)
    everyone = np.empty((world.size, count), np.float32)
    world.Allgather(partial, everyone)
    star.allreduce(partial)
    _same_bits_everywhere(partial)
    # A block of 32 has one scale, so what counts is its greatest number; a sum is rounded on at most n more stations.
    magnitude = np.abs(everyone).astype(np.float64).sum(axis=0)
    magnitude = np.pad(magnitude, (0, -count % 32)).reshape(-1, 32).max(axis=1).repeat(32)[:count]
    error = np.abs(partial - everyone.sum(axis=0, dtype=np.float64))
    assert (error <= 2.1 * world.size * ROUNDING[wire] * magnitude).all(), (
        f"{star.algorithm} {wire} {count}: {error.max()}"
    )
    if wire != "f32" and world.size > 1 and count > 1:
        assert error.max() > 100 * ROUNDING["f32"], f"{star.algorithm} {wire}: nothing was rounded"


def _exact(star: Star) -> None:
    """A sum that is not to be rounded travels in f32: numbers that no other wire has."""
    values = np.array([1 + 2.0**-20, 3e30, 1e-30, 2.0**-12], np.float32)
    under_way = star.start(found := values * (star.rank.index + 1), exact=True)
    under_way.wait()
    size = star.rank.size
    np.testing.assert_allclose(found, values * (size * (size + 1) // 2), rtol=3e-7)


def _same_bits_everywhere(values: np.ndarray) -> None:
    everyone = MPI.COMM_WORLD.allgather(values.tobytes())
    assert len(set(everyone)) == 1, "the ranks hold different bits"


def _in_rank_order(star: Star, count: int) -> None:
    """Star, exchange and mesh have the bits of NumPy's sum from rank 0 on."""
    partial = np.random.default_rng([star.rank.index, count]).standard_normal(count).astype(np.float32)
    everyone = MPI.COMM_WORLD.allgather(partial)
    expected = everyone[0].copy()
    for other in everyone[1:]:
        expected += other
    for star.algorithm in IN_RANK_ORDER:
        found = partial.copy()
        star.allreduce(found)
        assert found.tobytes() == expected.tobytes(), f"{star.algorithm} {count}"


def _in_the_background(star: Star) -> None:
    """Two sums of large pieces at a time, with which the other thread goes on: no buffer is in two of them."""
    rank, size = star.rank.index, star.rank.size
    for star.algorithm in IN_RANK_ORDER:
        for turn in range(20):
            first = np.full(40_000, 1.0 + rank + turn, np.float32)
            second = np.full(70_000, 128.0 * (1 + rank + turn), np.float32)
            for under_way in [star.start(first, background=True), star.start(second, background=True)]:
                under_way.wait()
            expected = size * (size + 1) // 2 + size * turn
            assert (first == expected).all() and (second == 128 * expected).all(), f"{star.algorithm} {turn}"


def _two_under_way(star: Star) -> None:
    """Polled in another order than they were started in, and on each rank in one of its own."""
    rank, size = star.rank.index, star.rank.size
    first, second = np.full(9000, 1.0 + rank, np.float32), np.full(9000, 128.0 * (1 + rank), np.float32)
    sums = [star.start(first), star.start(second)]
    for turn in range(200):
        sums[(turn + rank) % 2].poll()
    for under_way in sums:
        under_way.wait()
    expected = size * (size + 1) // 2
    for values, factor in ((first, 1), (second, 128)):
        assert np.allclose(values, factor * expected, rtol=0.02 if star.wire.format == "q8_0" else 1e-9), values[:4]


def _broadcast(star: Star, wire: str) -> None:
    values = np.random.default_rng(7).standard_normal((3, 5000)).astype(np.float32)
    mine = values.copy() if star.rank.is_hub else np.zeros_like(values)
    star.broadcast(mine)
    _same_bits_everywhere(mine)
    assert np.abs(mine - values).max() <= 2.1 * ROUNDING[wire] * np.abs(values).max()
    assert (mine == values).all() == (wire == "f32" or star.rank.size == 1)


def _links(star: Star) -> None:
    """Every rank learns the latency; the rule that the hub finds is one."""
    links = star.measure_links(1 << 17)
    if star.rank.size == 1:
        assert links.latencies == []
        return
    latency = star._channel.latency  # type: ignore[union-attr]
    assert latency is not None and 0 < latency < 1
    assert MPI.COMM_WORLD.bcast(latency) == latency
    if star.rank.is_hub:
        assert len(links.latencies) == star.rank.size - 1 and links.latency_s == latency
        assert parse_rule(choose(links.times, star.rank.size))
    else:
        assert links.times == {}


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    MPI.COMM_WORLD.Barrier()
    sys.stdout.flush()
