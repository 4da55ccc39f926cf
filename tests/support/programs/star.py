"""Run on every rank: the star against comm.Allreduce, over sizes; then its other operations. Fails by a traceback."""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

from tpimpi.engine.protocol import Operation, StepHeader, receive_header, send_header
from tpimpi.errors import StarError
from tpimpi.star import Star, connect
from tpimpi.star.allreduce import ALGORITHMS, IN_RANK_ORDER
from tpimpi.star.control import Done, gather_notes, on_every_rank

SIZES = (1, 2, 31, 576, 4096, 16_385, 262_144, 1_048_576)  # elements: up to 4 MiB
FEW_SIZES = (2, 576, 262_144)  # where many ranks share few cores
MANY_RANKS = 5


def main() -> None:
    star = connect()
    world, rank, size = MPI.COMM_WORLD, star.rank.index, star.rank.size
    assert (rank, size) == (world.rank, world.size)
    sizes = SIZES if size < MANY_RANKS else FEW_SIZES
    for algorithm in ALGORITHMS:
        star.algorithm = algorithm
        for count in sizes:
            partial = np.random.default_rng([rank, count]).standard_normal(count).astype(np.float32)
            expected = np.empty_like(partial)
            world.Allreduce(partial, expected)
            for shape in ((count,), (1, count)):
                total = partial.copy().reshape(shape)
                star.allreduce(total)
                error = np.abs(total.reshape(-1) - expected).max()
                assert error < 1e-5 * size, f"{algorithm} {count}: off by {error}"
            _same_bits_everywhere(world, total)
            if algorithm in IN_RANK_ORDER:
                _is_the_sum_in_rank_order(world, partial, total)
        _many_in_a_row(star)
    star.algorithm = "star"
    _early_partials_are_taken_in(star)
    _broadcast_and_notes(star)
    _fewer_ranks(star)
    _silence_is_named(star)
    if rank == 0:
        print("all well", flush=True)


def _same_bits_everywhere(world: MPI.Comm, total: np.ndarray) -> None:
    hub = total.copy()
    world.Bcast(hub, root=0)
    assert hub.tobytes() == total.tobytes(), f"rank {world.rank} holds other bits than the hub"


def _is_the_sum_in_rank_order(world: MPI.Comm, partial: np.ndarray, total: np.ndarray) -> None:
    everyone = np.empty((world.size, partial.size), np.float32)
    world.Allgather(partial, everyone)
    expected = everyone[0].copy()
    for row in everyone[1:]:
        expected += row
    assert expected.tobytes() == total.tobytes(), "not the sum in rank order"


def _many_in_a_row(star: Star) -> None:
    """Sizes that go up and down share the same buffers; a fast rank must not overtake a slow one."""
    for turn in range(200 if star.rank.size < MANY_RANKS else 50):
        count = 1 + turn * 37 % 500
        values = np.full(count, star.rank.index + turn, np.float32)
        under_way = star.start(values)
        if star.rank.index == turn % star.rank.size:
            time.sleep(0.001)
        under_way.wait(time.monotonic() + 60)
        assert (values == sum(range(star.rank.size)) + turn * star.rank.size).all(), turn


def _early_partials_are_taken_in(star: Star) -> None:
    """While rank 0 waits for rank 1's partial, those of the ranks behind it are taken in, and opened, as they come."""
    world = MPI.COMM_WORLD
    channel = star._channel
    if channel is None or star.rank.size < 3:
        return
    last = star.rank.size - 1
    before = channel.received[last] if star.rank.is_hub else 0
    values = np.full(64, star.rank.index, np.float32)
    if star.rank.index == 1:
        world.Barrier()  # until rank 0 has what the others sent
    total = star.start(values)
    if star.rank.is_hub:
        deadline = time.monotonic() + 20
        while channel.received[last] == before and time.monotonic() < deadline:
            assert not total.poll()
            time.sleep(0.001)
        assert channel.received[last] == before + 1, "the last rank's partial was left lying"
    if star.rank.index != 1:
        world.Barrier()
    total.wait()
    assert (values == sum(range(star.rank.size))).all()


def _broadcast_and_notes(star: Star) -> None:
    hub = star.rank.is_hub
    values = np.arange(6, dtype=np.float32).reshape(2, 3) if hub else np.zeros((2, 3), np.float32)
    star.broadcast(values)
    assert values.tolist() == [[0, 1, 2], [3, 4, 5]]
    if hub:
        send_header(star, StepHeader(Operation.BEGIN, 77))
        send_header(star, StepHeader(Operation.FORWARD, 3, 12), np.array([7, 8]))
        star.broadcast_note(b'{"a": 1}')
    else:
        assert receive_header(star)[0] == StepHeader(Operation.BEGIN, 77, 0)
        header, words = receive_header(star)
        assert (header, words.tolist()) == (StepHeader(Operation.FORWARD, 3, 12), [7, 8])
        assert star.receive_note() == b'{"a": 1}'
    notes = star.gather_notes(f"note of {star.rank.index}".encode())
    assert notes == ([f"note of {r}".encode() for r in range(star.rank.size)] if hub else [])
    _a_note_with_an_unknown_field(star)


def _a_note_with_an_unknown_field(star: Star) -> None:
    """The last rank's note is not as it is due: the hub names that rank and the field."""
    last = star.rank.size - 1
    if star.rank.index == last > 0:
        star.gather_notes(b'{"note": "Done", "colour": 1}')
    elif not star.rank.is_hub:
        gather_notes(star, Done())
    elif last:
        try:
            on_every_rank(star, lambda: None, Done)
        except StarError as error:
            assert str(error).startswith(f"{star.rank_name(last)} sent a note that makes no sense: "), error
            assert "unknown field `colour`" in str(error), error
        else:
            raise AssertionError("the hub did not notice")


def _fewer_ranks(star: Star) -> None:
    """A star of all but the last sums as the whole one does, in the background too: `plan` measures what a run will do."""
    size = star.rank.size
    assert star.threads == (size > 1)
    few = star.first(max(1, size - 1))
    assert (few is None) == (star.rank.index == size - 1 > 0)
    if few is None or size == 1:
        return
    assert few.threads
    values = np.full(1000, few.rank.index + 1, np.float32)
    few.start(values, background=True).wait()
    assert (values == sum(range(1, size))).all()


def _silence_is_named(star: Star) -> None:
    """The last rank says nothing for a while: the hub's deadline passes, and its message names that rank and no other."""
    world, last = MPI.COMM_WORLD, star.rank.size - 1
    world.Barrier()
    if last == 0:
        return
    values = np.ones(8, np.float32)
    if star.rank.index == last:
        world.Barrier()
        return
    under_way = star.start(values)
    if star.rank.is_hub:
        try:
            under_way.wait(time.monotonic() + 0.3)
        except StarError as error:
            assert f"from {star.heartbeat.name(last)} for" in str(error), error
        else:
            raise AssertionError("the hub did not notice")
    world.Barrier()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    # The sum that _silence_is_named left unfinished would be waited for in MPI_Finalize by some libraries.
    MPI.COMM_WORLD.Barrier()
    sys.stdout.flush()
