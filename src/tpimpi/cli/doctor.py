"""`doctor`: whether the machines can work together."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tpimpi.cli.network_options import add_hosts, add_seal
from tpimpi.cli.parser import Parser
from tpimpi.cli.process import Job
from tpimpi.cli.run_parser import add_shares
from tpimpi.cli.values import AUTO, path_given, share_weights
from tpimpi.diagnostics.doctor.command import doctor
from tpimpi.diagnostics.options import DoctorOptions
from tpimpi.errors import InputError
from tpimpi.star import Star
from tpimpi.star.control import stop_others_on_error
from tpimpi.system.files import check_writable


def doctor_parser() -> argparse.ArgumentParser:
    """Options of `doctor`."""
    parser = Parser(
        prog="python -m tpimpi doctor",
        description="Under mpirun: what every rank has, what the links between them give, what is wrong, what to type to "
        "mend it. With --hostfile, without mpirun: whether ranks can be started on those hosts. Exit code 1 where something "
        "is wrong.",
        allow_abbrev=False,
    )
    add_hosts(parser, "without mpirun: look at the hosts of that file, over ssh")
    parser.add_argument(
        "--make-keys",
        action="store_true",
        help="with --hostfile: make the keys by which these hosts know one another in a run, and put each host's into a "
        "file there, over ssh; without: keys for the hosts that share this user's home folder",
    )
    parser.add_argument("--rotate-keys", action="store_true", help="with --make-keys: replace earlier keys")
    parser.add_argument("--model", metavar="PATH", help="look for the slices of that model (default: as in a run)")
    parser.add_argument(
        "--slices",
        type=path_given("--slices", "the folder of the slices"),
        metavar="DIR",
        help="look for the slices in that folder",
    )
    parser.add_argument("--format", default="auto", help="of the slices, as in a run")
    add_shares(parser)
    add_seal(parser)
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as JSON")
    return parser


def parse_doctor(arguments: Sequence[str], ranks: int) -> DoctorOptions:
    """The options of `doctor` for so many ranks. Raises InputError for what cannot be used."""
    parsed = doctor_parser().parse_args(arguments)
    for name, given in (("model", parsed.model), ("slices", parsed.slices)):
        if parsed.hostfile is not None and given is not None:
            raise InputError(f"--{name} is looked for under mpirun; leave it out with --hostfile")
    if parsed.rotate_keys and not parsed.make_keys:
        raise InputError("--rotate-keys says that --make-keys may replace keys, which is not given; give both")
    for name in ("model", "slices", "json"):
        if parsed.make_keys and parsed.hostfile is None and getattr(parsed, name) is not None:
            raise InputError(f"--make-keys without --hostfile looks at nothing; leave out --{name}, or give --hostfile")
    if parsed.json is not None:
        check_writable(parsed.json, "--json")
    shares = None
    if parsed.shares != AUTO and parsed.hostfile is None and parsed.slices is None:
        shares = tuple(share_weights(parsed.shares, ranks))
    return DoctorOptions(
        hostfile=parsed.hostfile,
        ssh=parsed.ssh,
        model=parsed.model,
        slices=parsed.slices,
        format=parsed.format,
        shares=shares,
        json=None if parsed.json is None else Path(parsed.json),
        make_keys=parsed.make_keys,
        rotate_keys=parsed.rotate_keys,
    )


def doctor_together(star: Star, job: Job) -> int:
    """Rank 0 of `doctor`, and all of `doctor --hostfile`."""
    with stop_others_on_error(star):
        return doctor(parse_doctor(job.arguments[1:], star.rank.size), star, job.arguments)
