"""The program: what the arguments name is done by this process alone, or by all ranks together.

Under mpirun every rank comes here. Ranks other than 0 import no parser and nothing of `serving`: they follow rank 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tpimpi.cli.process import Job, guarded, leave_on_signals, leave_signals_to_rank_0, set_up_streams
from tpimpi.errors import InputError
from tpimpi.star import Star, connect, launched_rank, seal_given
from tpimpi.star.control import Stopped, stop_others_on_error
from tpimpi.system.core_dumps import turn_off_core_dumps
from tpimpi.system.memory import use_one_arena
from tpimpi.system.terminal import Input, repair_streams, write_past_the_launcher

Alone = Callable[[Job], int]
Together = Callable[[Star, Job], int]  # on rank 0; the others do what its notes say (follow.take_part)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command and leave with its exit code."""
    repair_streams()
    turn_off_core_dumps()
    use_one_arena()
    leave_on_signals()
    # Arguments are taken as UTF-8 whatever the locale: what the terminal sent is in them byte for byte.
    given = sys.argv[1:] if argv is None else argv
    arguments = [os.fsencode(argument).decode("utf-8", "surrogateescape") for argument in given]
    set_up_streams()
    sys.exit(guarded(do_alone if is_alone(arguments) else do_together, arguments))


def is_alone(arguments: Sequence[str]) -> bool:
    """Whether this process does it without the other ranks, and without MPI."""
    if not arguments or arguments[0] not in ("slice", "synth", "inspect", "cache", "bench", "up"):
        return False
    several = arguments[0] == "slice" or arguments[:2] == ["bench", "allreduce"]
    return launched_rank() is None or not several


def do_alone(job: Job) -> int:
    """Under mpirun rank 0 alone does it; MPI is not started."""
    if launched_rank() not in (None, 0):
        return 0
    return alone(job.arguments[0])(job)


def do_together(job: Job) -> int:
    """Join the run, and lead it on rank 0, or follow."""
    launched = launched_rank()
    if launched == 0:
        write_past_the_launcher()
        job.input = Input()
    try:
        # Neither has another meaning in any command.
        job.star = star = connect(quiet="--quiet" in job.arguments, seal=seal_given(job.arguments))
    except InputError as error:
        if launched == 0:
            raise
        return error.exit_code  # every process would say the same line, or rank 0 says it
    if not star.rank.is_hub:
        return follow(star, job)
    with stop_others_on_error(star):
        command = together(job.arguments[0] if job.arguments else "")
    return command(star, job)


def follow(star: Star, job: Job) -> int:
    """A rank other than 0; the exit code is rank 0's where that ended the run before it began."""
    if job.arguments[:1] == ["serve"]:
        leave_signals_to_rank_0()
    with job.others_waiting():  # before the import: a rank without one of its packages ends the job at once
        from tpimpi.cli.follow import take_part

        try:
            take_part(star, job.arguments)
        except Stopped as stopped:
            return stopped.code
    return 0


# Commands are imported when they are wanted: most runs do without most of them.


def alone(name: str) -> Alone:
    """A command of one process."""
    if name == "slice":
        from tpimpi.cli.slice import slice_alone

        return slice_alone
    if name == "synth":
        from tpimpi.cli.synth import synth_alone

        return synth_alone
    if name == "bench":
        from tpimpi.cli.bench import bench_alone

        return bench_alone
    if name == "up":
        from tpimpi.cli.up import up_alone

        return up_alone
    if name == "cache":
        from tpimpi.cli.cache import cache_alone

        return cache_alone
    from tpimpi.cli.inspect import inspect_alone

    return inspect_alone


def together(name: str) -> Together:
    """A command that all ranks take part in; a run where it is none of the others."""
    if name == "perplexity":
        from tpimpi.cli.perplexity import perplexity

        return perplexity
    if name == "bench":
        from tpimpi.cli.bench import bench_together

        return bench_together
    if name == "plan":
        from tpimpi.cli.plan import plan_together

        return plan_together
    if name == "slice":
        from tpimpi.cli.slice import slice_together

        return slice_together
    if name == "serve":
        from tpimpi.cli.serve import serve

        return serve
    if name == "doctor":
        from tpimpi.cli.doctor import doctor_together

        return doctor_together
    from tpimpi.cli.run import run

    return run
