"""Run on every rank: clocks that are planted wrong are compared, and what that sends is looked at. Fails by a traceback."""

from __future__ import annotations

import sys
import time

import numpy as np
from mpi4py import MPI

from tpimpi.errors import StarError
from tpimpi.star import CLOCK, Star, connect
from tpimpi.star.channel import CHECKSUM_BYTES

SKEWS = (7.5, -1234.25, 86_400.0)  # seconds that the clock of each rank is fast
ALLOWED = {"rank", "size", "Irecv", "Abort"}


class Wire:
    """A communicator that notes the tag and size of what is sent, and has only what never blocks."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        self._wired_comm = comm
        self.sent: list[tuple[int, int]] = []

    def __getattr__(self, name: str):
        assert name in ALLOWED, f"the star uses {name}"
        return getattr(self._wired_comm, name)

    def Isend(self, buffer, dest: int, tag: int):  # noqa: N802
        self.sent.append((tag, np.asarray(buffer[0]).nbytes))
        return self._wired_comm.Isend(buffer, dest=dest, tag=tag)


def main() -> None:
    star = connect()
    star._comm = star._channel.comm = wire = Wire(star._comm)  # type: ignore[assignment]
    ranks, me = star.rank.size, star.rank.index
    for skews in ((0.0,) * ranks, SKEWS[:ranks]):
        offsets = star.clock_offsets(lambda skews=skews: time.monotonic() + skews[me])
        if not star.rank.is_hub:
            assert offsets == []
            continue
        expected = [skews[0] - skew for skew in skews]
        assert len(offsets) == ranks and offsets[0] == 0, offsets
        assert all(abs(a - b) < 0.005 for a, b in zip(offsets, expected, strict=True)), (offsets, expected)
    assert wire.sent and set(wire.sent) == {(CLOCK, 8 + CHECKSUM_BYTES)}, wire.sent
    assert star.seconds == 0, "comparing clocks is no part of the sums"
    _nonsense_is_refused(star)
    _silence_is_named(star)
    if star.rank.is_hub:
        print("all well", flush=True)


def _nonsense_is_refused(star: Star) -> None:
    """Rank 1 says that its clock shows NaN: the hub stops there, with one question asked."""
    if star.rank.is_hub:
        try:
            star.clock_offsets()
        except StarError as error:
            assert "rank 1" in str(error) and "nan" in str(error), error
        else:
            raise AssertionError("the hub took NaN for a time")
    elif star.rank.index == 1:
        asked = np.empty(1)
        star._channel.wait(star._channel.receive(asked, 0, CLOCK), None)  # type: ignore[union-attr]
        star._channel.wait(star._channel.send(np.array([np.nan]), 0, CLOCK), None)  # type: ignore[union-attr]
    MPI.COMM_WORLD.Barrier()


def _silence_is_named(star: Star) -> None:
    """The last rank does not answer: the hub says so when the time is up."""
    if star.rank.is_hub:
        star.timeout = 0.5
        try:
            star.clock_offsets()
        except StarError as error:
            assert f"nothing came from r{star.rank.size - 1} " in str(error), error
        else:
            raise AssertionError("the hub did not notice")
    elif star.rank.index < star.rank.size - 1:
        star.clock_offsets()
    MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
    # The answer that _silence_is_named still waits for would be waited for in MPI_Finalize by some libraries.
    MPI.COMM_WORLD.Barrier()
    sys.stdout.flush()
