"""How a process joins the run: it starts MPI where a launcher started it, and the heartbeat."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tpimpi.errors import InputError, LostError, StarError
from tpimpi.star.channel import Channel
from tpimpi.star.heartbeat import DEFAULT_SILENCE_S, WAIT_FOR_HUB_REPORT_S, Heartbeat
from tpimpi.star.pieces import EAGER_BYTES
from tpimpi.star.star import Star
from tpimpi.system.launcher import all_on_this_host, launched_rank, launched_size, launcher_kind

if TYPE_CHECKING:
    from mpi4py import MPI

    from tpimpi.system.handshakes import Handshakes

SEAL_OPTION = "--seal"
SEALS = AUTO, ON, OFF = ("auto", "on", "off")

WAIT_REPORT_S = 5.0  # rank 0 says that it waits for the other ranks to start after this time
SLOW_START_S = 20.0  # and after this time, what may be wrong
RELAY_TIME_S = 0.2  # the launcher relays our line in it; its own banner would else come before or within ours
HOPELESS_START_S = 120.0  # and ends the run after this time


def seal_given(arguments: Sequence[str]) -> str:
    """What --seal is among a command's arguments, which every rank has: one of SEALS. Links are sealed before rank 0 reads
    its options, and says there what is wrong with another value."""
    given = AUTO
    for word, following in itertools.pairwise([*arguments, ""]):
        name, sign, value = word.partition("=")
        if name == SEAL_OPTION:
            given = value if sign else following
    return given if given in SEALS else AUTO


def connect(*, quiet: bool = False, seal: str = AUTO) -> Star:
    """Join the run: MPI's world where a launcher started this process, else a star of one rank.

    Rank 0 says on stderr when others take long to come; with `quiet` only when that looks like a fault. `seal` is one of
    SEALS: with AUTO links are sealed as soon as a rank is on another host.

    Raises InputError where the launcher and the MPI library are of two different kinds; see also `seal_channel`.
    """
    if launched_rank() is None:
        return Star(None)
    import mpi4py

    mpi4py.rc.thread_level = "multiple"  # the main thread and the heartbeat talk
    # Else Open MPI ends this process where a connection is lost, before anybody can say who is gone.
    os.environ.setdefault("OMPI_MCA_mpi_ft_enable", "1")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # of MPICH: else its warnings stand in the answer
    os.environ.update(OMPI_MCA_btl_tcp_eager_limit=str(EAGER_BYTES))  # the same on all hosts, or messages find no room
    sealed = launched_size() > 1 and (seal == ON or (seal == AUTO and not all_on_this_host()))  # or it is not known
    with contextlib.ExitStack() as to_close:
        handshakes = None
        if sealed:
            from tpimpi.star.secure import begin_handshakes

            handshakes = to_close.enter_context(contextlib.closing(begin_handshakes()))
        with _report_slow_start(quiet=quiet):
            star, beats = _join_world()
        if handshakes is not None and star.rank.size > 1:
            _seal(star, handshakes)
    if beats is not None:
        assert star._channel is not None
        star.threads = True
        channel = Channel(beats)
        channel.seal = star._channel.seal.derive("heartbeat") if star._channel.seal else None
        star.heartbeat = Heartbeat(channel, star.rank, DEFAULT_SILENCE_S, star._channel)
        star.set_rank_names(star.heartbeat.name)
    return star


def _join_world() -> tuple[Star, MPI.Intracomm | None]:
    """Start MPI: the star, and a communicator for the heartbeat where there is to be one. Raises InputError."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    wanted = launched_size()
    if wanted != world.size:
        library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
        if launcher_kind() == "Slurm":
            raise InputError(
                f"srun started {wanted} ranks, but this process sees {world.size}: srun and the MPI library ({library}) "
                "do not find each other; type srun --mpi=pmix (or pmi2, as srun --mpi=list says), or mpirun in the job"
            )
        raise InputError(
            f"mpirun started {wanted} ranks, but this process sees {world.size}: mpirun and the MPI library ({library}) "
            "are of two kinds; use the mpirun of that library, or set MPI4PY_MPIABI=mpich (or openmpi) to change the "
            "library"
        )
    # Communicators of our own, so that no other library's messages meet ours. These are the first messages.
    star = Star(world.Clone())
    return star, world.Clone() if world.size > 1 and _has_thread_multiple() else None


def _seal(star: Star, handshakes: Handshakes) -> None:
    """Seal the links. A rank that is not answered, or to which what comes makes no sense, says so, and ends the job: the
    others may wait for it."""
    from tpimpi.star.secure import seal_channel

    assert star._channel is not None
    try:
        seal = seal_channel(star._channel, handshakes)
        star.rank = replace(star.rank, host=seal.hosts[star.rank.index])  # as the others name this rank too
        star.set_rank_names(lambda rank: f"r{rank} {seal.hosts[rank]}")
    except StarError as error:
        if isinstance(error, LostError) and not star.rank.is_hub:
            time.sleep(WAIT_FOR_HUB_REPORT_S)  # rank 0 or the launcher knows better who is gone, and ends us meanwhile
        os.write(2, f"{star.rank}: {error}\n".encode())
        time.sleep(RELAY_TIME_S)
        star.abort(error.exit_code)


def _has_thread_multiple() -> bool:
    """Whether MPI, which has been started, lets several threads talk at once."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


@contextlib.contextmanager
def _report_slow_start(*, quiet: bool) -> Iterator[None]:
    """Rank 0: if MPI takes long to start, which it does for ever over a wrong network interface, lines say so, and the run
    ends after HOPELESS_START_S.

    MPI holds Python's lock meanwhile, so a process of its own waits for us.
    """
    if launched_rank() != 0:
        yield
        return
    reader, writer = os.pipe()
    waiting = os.fork()
    if waiting == 0:
        os.close(writer)
        _say_what_is_awaited(reader, launched_size() - 1, quiet=quiet)
        os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        os.waitpid(waiting, 0)  # it ends with the pipe


def _say_what_is_awaited(started: int, others: int, *, quiet: bool) -> None:
    """Until the pipe `started` ends: that other ranks are awaited, and later what may be wrong; at last end rank 0, and with
    it the run."""
    if select.select([started], [], [], WAIT_REPORT_S)[0]:
        return
    if others and not quiet:
        ranks = f"{others} other rank{'s' if others > 1 else ''}"
        os.write(2, f"tpimpi: waiting for {ranks} to start, for {WAIT_REPORT_S:.0f} s\n".encode())
    if select.select([started], [], [], SLOW_START_S - WAIT_REPORT_S)[0]:
        return
    line = (
        f"tpimpi: MPI has not started the other ranks for {SLOW_START_S:.0f} s: is a host down, or a wrong network "
        "interface in use? To find out: python -m tpimpi doctor --hostfile FILE\n"
    )
    os.write(2, line.encode())
    if select.select([started], [], [], HOPELESS_START_S - SLOW_START_S)[0]:
        return
    os.write(2, f"tpimpi: MPI has not started for {HOPELESS_START_S:.0f} s; the run ends here\n".encode())
    os.kill(os.getppid(), signal.SIGKILL)  # it is inside MPI, where no other signal reaches it
