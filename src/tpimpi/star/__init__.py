"""The star: all that goes between the ranks, as point-to-point messages with rank 0, the hub, in the middle.

An allreduce is two link latencies, whatever the number of ranks: every rank sends its partial to the hub, the hub adds them
in rank order and sends its own bytes back, so that every rank holds the same bits. (A ring takes 2(n - 1) latencies; at
home it is latency that costs: arXiv 2410.00531, section 3.3.)

What is on the wire, by tag: CONTROL (hub to all: int64 [n], the header of a step), HIDDEN (hub to all: f32
[positions, hidden]), PARTIAL (to the hub) and SUM (from it), f32 [positions, hidden], or with other algorithms and wires
between any ranks, and packed (see `allreduce`, `codec`), ECHO (to measure links), NOTE (settings, status and measurements
as JSON), HANDSHAKE (before all others, where links are sealed: see `secure`), CLOCK (both ways: float64 [1], the sender's
clock in seconds; only where a run is traced), and BULK (tiles of slices, to the rank that needs them). Prompt, token ids
and text are in none of them.

`channel` has single messages and waiting, `seal` and `ciphers` their encryption, `secure` how its keys come about (with
`noise` and `handshakes` of tpimpi.system), `codec` the numbers on the wire, `pieces` how arrays are cut, `allreduce` the
sums, `heartbeat` who is gone, `control` the notes, `star` what other packages use. mpi4py is imported only in this
package, by `connect`, in a launched run; without mpirun a star of one rank needs no MPI.
"""

from tpimpi.star.allreduce import ALGORITHMS, IN_RANK_ORDER, Allreduce, parse_rule
from tpimpi.star.channel import BULK, CLOCK, CONTROL, HIDDEN, NOTE, PARTIAL, SUM, Pending
from tpimpi.star.codec import WIRES, Wire
from tpimpi.star.heartbeat import DEFAULT_SILENCE_S, SHORTEST_SILENCE_S, WAIT_FOR_HUB_REPORT_S
from tpimpi.star.link_test import Ping, answer_link, ping_link
from tpimpi.star.mpi_library import MpiLibrary, mpi_library
from tpimpi.star.pieces import PartialWatch
from tpimpi.star.star import ALLREDUCES, DEFAULT_TIMEOUT_S, Star, Words
from tpimpi.star.start import RELAY_TIME_S, SEALS, connect, seal_given
from tpimpi.star.tuning import Links, choose, describe
from tpimpi.system.launcher import MPICH, OPEN_MPI, Rank, launched_rank, launcher_commands, launcher_kind

__all__ = [
    "ALGORITHMS",
    "ALLREDUCES",
    "BULK",
    "CLOCK",
    "CONTROL",
    "DEFAULT_SILENCE_S",
    "DEFAULT_TIMEOUT_S",
    "HIDDEN",
    "IN_RANK_ORDER",
    "MPICH",
    "NOTE",
    "OPEN_MPI",
    "PARTIAL",
    "RELAY_TIME_S",
    "SEALS",
    "SHORTEST_SILENCE_S",
    "SUM",
    "WAIT_FOR_HUB_REPORT_S",
    "WIRES",
    "Allreduce",
    "Links",
    "MpiLibrary",
    "PartialWatch",
    "Pending",
    "Ping",
    "Rank",
    "Star",
    "Wire",
    "Words",
    "answer_link",
    "choose",
    "connect",
    "describe",
    "launched_rank",
    "launcher_commands",
    "launcher_kind",
    "mpi_library",
    "parse_rule",
    "ping_link",
    "seal_given",
]
