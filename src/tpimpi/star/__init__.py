"""The star: all that goes between the ranks, as point-to-point messages with rank 0, the hub, in the middle.

An allreduce is two link latencies, whatever the number of ranks: every rank sends its partial to the hub, the hub adds them
in rank order and sends its own bytes back, so that every rank holds the same bits. (A ring takes 2(n - 1) latencies; at
home it is latency that costs: arXiv 2410.00531, section 3.3.)

What is on the wire, by tag: CONTROL (hub to all: int64 [4]: magic, operation, positions, start), HIDDEN (hub to all: f32
[positions, hidden]), PARTIAL (to the hub) and SUM (from it), f32 [positions, hidden], or with other algorithms and wires
between any ranks, and packed (see `allreduce`, `wire`), ECHO (to measure links), NOTE (settings, status and measurements
as JSON), CLOCK (both ways: float64 [1], the sender's clock in seconds; only where a run is traced), and BULK (tiles of
slices, to the rank that needs them). Prompt, token ids and text are in none of them.

`launch` knows the launchers, `post` single messages and waiting, `allreduce` the sums, `watch` who is gone, `star` what
other rooms use. mpi4py is imported only here, by `connect`, in a launched run; without mpirun a star of one rank needs no
MPI.
"""

from tpimpi.star.allreduce import ALGORITHMS, Allreduce, parse_rule
from tpimpi.star.channel import BULK, CLOCK, CONTROL, HIDDEN, NOTE, PARTIAL, SUM, Pending
from tpimpi.star.codec import WIRES, Wire
from tpimpi.star.heartbeat import DEFAULT_SILENCE, LEAST_SILENCE, LEAVE_TO_OTHERS
from tpimpi.star.link_test import Ping, answer_link, ping_link
from tpimpi.star.mpi_library import AboutMpi, about_mpi
from tpimpi.star.star import ALLREDUCES, BEGIN, DEFAULT_TIMEOUT, FINISH, FORWARD, Star, connect
from tpimpi.star.tuning import Links, choose, describe
from tpimpi.system.launcher import MPICH, OPEN_MPI, Rank, launched_rank, launcher_commands, launcher_kind

__all__ = [
    "ALGORITHMS",
    "ALLREDUCES",
    "BEGIN",
    "BULK",
    "CLOCK",
    "CONTROL",
    "DEFAULT_SILENCE",
    "DEFAULT_TIMEOUT",
    "FINISH",
    "FORWARD",
    "HIDDEN",
    "LEAST_SILENCE",
    "LEAVE_TO_OTHERS",
    "MPICH",
    "NOTE",
    "OPEN_MPI",
    "PARTIAL",
    "SUM",
    "WIRES",
    "AboutMpi",
    "Allreduce",
    "Links",
    "Pending",
    "Ping",
    "Rank",
    "Star",
    "Wire",
    "about_mpi",
    "answer_link",
    "choose",
    "connect",
    "describe",
    "launched_rank",
    "launcher_commands",
    "launcher_kind",
    "parse_rule",
    "ping_link",
]
