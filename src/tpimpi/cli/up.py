"""`up`: a server over several machines from one command, which goes on when one of them is lost.

It stands outside the run: it looks at the hosts as `doctor` does, has the front (HTTP, keys, requests under way), and starts
mpirun with `serve`. When that ends though nobody asked for it, it looks again, and starts it with the hosts that answer; the
front asks that run for what was under way, from where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from tpimpi.cli.network_options import add_hosts
from tpimpi.cli.options import UpOptions
from tpimpi.cli.parser import Parser
from tpimpi.cli.process import Job, say
from tpimpi.cli.serve_options import front_options, listening, parse_serve
from tpimpi.cli.supervisor import Supervisor
from tpimpi.cli.values import program_given, whole_number
from tpimpi.errors import InputError
from tpimpi.serving.server.front_process import FrontProcess
from tpimpi.system.hostfile import read_hostfile
from tpimpi.system.launcher import launched_rank
from tpimpi.system.wake import macs_of


def up_parser() -> argparse.ArgumentParser:
    """Options of `up`."""
    parser = Parser(
        prog="tpimpi up",
        description="Start a server (see serve) on the machines of a hostfile, this one first, and start it again with "
        "those that are left when one is lost: answers that were under way go on. All other options are those of serve.",
        allow_abbrev=False,
    )
    add_hosts(parser, "the machines, one a line, this one first (default: this one alone)")
    parser.add_argument(
        "--ranks",
        type=whole_number("--ranks", 1, 64),
        default=1,
        metavar="N",
        help="without --hostfile: ranks on this machine (default 1)",
    )
    parser.add_argument(
        "--run-under",
        type=program_given("--run-under"),
        metavar="PROGRAM",
        help="on each machine, start tpimpi as PROGRAM python -m tpimpi …",
    )
    parser.add_argument(
        "--wake",
        action="store_true",
        help="wake machines that do not answer by wake-on-LAN, where the comment of their line has the address of their "
        "network card: desktop.home  # 00:11:22:33:44:55",
    )
    return parser


def up_alone(job: Job) -> int:
    """The command, outside every launcher. Returns its exit code."""
    if launched_rank() is not None:
        raise InputError("up starts mpirun by itself; run it without, as: tpimpi up --hostfile FILE")
    parsed, others = up_parser().parse_known_args(job.arguments[1:])
    options = UpOptions(**vars(parsed))
    if options.hostfile is not None and options.ranks != 1:
        raise InputError("--ranks is for this machine alone; with --hostfile, write NAME slots=N there")
    if options.wake and options.hostfile is None:
        raise InputError("--wake needs --hostfile, with the addresses of network cards; see --help")
    if options.hostfile is not None:  # before we say that we listen
        read_hostfile(options.hostfile)
        if options.wake:
            macs_of(options.hostfile)
    serving = parse_serve(others)
    if serving.front is not None:
        raise InputError("--front is what up gives serve; leave it out")
    if shutil.which("mpirun") is None:  # this environment's, where nobody has gone into it
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    front = FrontProcess(partial(front_options, serving, outlives=True))
    job.at_end.callback(front.close)
    for line in listening(front.url, serving):
        say(line)
    return Supervisor(options, serving, others, front).run()
