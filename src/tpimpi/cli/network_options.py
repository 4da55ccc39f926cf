"""Options about how the ranks talk, of whatever computes: see run_options."""

from __future__ import annotations

import argparse

from tpimpi.cli.values import path_given, program_given, seconds
from tpimpi.star import ALLREDUCES, DEFAULT_SILENCE_S, DEFAULT_TIMEOUT_S, SEALS, SHORTEST_SILENCE_S, WIRES

LONGEST_SILENCE_S = 86400
SILENCE_RANGE = f"{SHORTEST_SILENCE_S:.0f} to {LONGEST_SILENCE_S} seconds"


def add_hosts(parser: argparse.ArgumentParser, hostfile: str) -> None:
    """Hosts that are reached without mpirun; `hostfile` is what they are for."""
    parser.add_argument(
        "--hostfile", type=path_given("--hostfile", "the name of a file"), metavar="FILE", help=hostfile
    )
    parser.add_argument(
        "--ssh",
        type=program_given("--ssh"),
        default="ssh",
        metavar="PROGRAM",
        help="with --hostfile: instead of ssh, called as PROGRAM HOST COMMAND",
    )


def add_seal(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """What every command has that ranks on several hosts take part in. It is read before the parser is there
    (`seal_given`)."""
    group.add_argument(
        "--seal",
        default="auto",
        choices=SEALS,
        help="whether all that goes between the ranks is encrypted and authenticated (default auto: as soon as a rank is on "
        "another host, which needs keys: doctor --make-keys)",
    )


def add_network(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--allreduce",
        default="auto",
        choices=ALLREDUCES,
        help="how partial results are added (default auto: the fastest of star, exchange and mesh for each size, as "
        "measured at the start; they give the same numbers)",
    )
    group.add_argument(
        "--wire",
        default="f32",
        choices=WIRES,
        help="how numbers travel: f32 (default), or rounded to bf16 or q8_0, which is less to send and less exact",
    )
    add_seal(group)
    group.add_argument(
        "--timeout",
        type=seconds("--timeout"),
        default=DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds a rank that is there may keep another waiting before the run ends (default "
        f"{DEFAULT_TIMEOUT_S:.0f})",
    )
    group.add_argument(
        "--silence",
        type=seconds("--silence", SHORTEST_SILENCE_S, LONGEST_SILENCE_S, SILENCE_RANGE),
        default=DEFAULT_SILENCE_S,
        metavar="S",
        help="seconds without a sign of life, of its process, machine or network, after which a rank is gone, and the run "
        f"ends (default {DEFAULT_SILENCE_S:.0f}, at least {SHORTEST_SILENCE_S:.0f})",
    )
