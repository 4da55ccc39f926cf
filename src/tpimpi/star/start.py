"""How a process joins the run: it starts MPI where a launcher started it, and the heartbeat."""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Iterator

from tpimpi.errors import InputError
from tpimpi.star.heartbeat import DEFAULT_SILENCE_S, Heartbeat
from tpimpi.star.pieces import EAGER_BYTES
from tpimpi.star.star import Star
from tpimpi.system.launcher import launched_rank, launched_size, launcher_kind

SLOW_START_S = 20.0  # rank 0 says that MPI takes long to start after this time


def connect() -> Star:
    """Join the run: MPI's world where a launcher started this process, else a star of one rank.

    Raises InputError where the launcher and the MPI library are of two different kinds.
    """
    if launched_rank() is None:
        return Star(None)
    import mpi4py

    mpi4py.rc.thread_level = "multiple"  # the main thread and the heartbeat talk
    # Else Open MPI ends this process where a connection is lost, before anybody can say who is gone.
    os.environ.setdefault("OMPI_MCA_mpi_ft_enable", "1")
    os.environ.update(OMPI_MCA_btl_tcp_eager_limit=str(EAGER_BYTES))  # the same on all hosts, or messages find no room
    with _report_slow_start():
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
        if star._channel is not None and world.size > 1 and _has_thread_multiple():
            star.threads = True
            star.heartbeat = Heartbeat(world.Clone(), star.rank, DEFAULT_SILENCE_S, star._channel)
            star.set_rank_names(star.heartbeat.name)
    return star


def _has_thread_multiple() -> bool:
    """Whether MPI, which has been started, lets several threads talk at once."""
    from mpi4py import MPI

    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


@contextlib.contextmanager
def _report_slow_start() -> Iterator[None]:
    """Rank 0: if MPI takes long to start, which it does for ever over a wrong network interface, a line says so.

    MPI holds Python's lock meanwhile, so a process of its own waits for us.
    """
    if launched_rank() != 0:
        yield
        return
    reader, writer = os.pipe()
    waiting = os.fork()
    if waiting == 0:
        os.close(writer)
        if not select.select([reader], [], [], SLOW_START_S)[0]:
            line = (
                f"tpimpi: MPI has not started the other ranks for {SLOW_START_S:.0f} s: is a host down, or a wrong network "
                "interface in use? To find out: python -m tpimpi doctor --hostfile FILE\n"
            )
            os.write(2, line.encode())
        os._exit(0)
    os.close(reader)
    try:
        yield
    finally:
        os.close(writer)
        os.waitpid(waiting, 0)  # it ends with the pipe
