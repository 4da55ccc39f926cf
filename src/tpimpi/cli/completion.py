"""Completion of options and commands in a shell, through argcomplete: eval "$(register-python-argcomplete tpimpi)".

Nothing here is imported unless a shell asks: argcomplete sets _ARGCOMPLETE, to the number of words up to the program.
"""

from __future__ import annotations

import argparse
import os
import sys

from tpimpi.cli.parser import COMMANDS
from tpimpi.cli.perplexity_options import perplexity_parser
from tpimpi.cli.run_parser import run_parser


def complete() -> None:
    """Write what may come next for the shell, and leave."""
    try:
        program, line = int(os.environ["_ARGCOMPLETE"]), os.environ["COMP_LINE"]
        int(os.environ["COMP_POINT"])
    except (KeyError, ValueError):  # no shell asks
        sys.exit(1)
    import argcomplete

    words = line.split()
    after = words[program:] if line.endswith(" ") else words[program:-1]  # but for the word that is being typed
    parser = command_parser(after[0]) if after else None
    if parser is None:
        parser = run_parser()
        if not after:
            parser.add_argument("command", nargs="?", choices=COMMANDS)
    else:
        os.environ["_ARGCOMPLETE"] = str(program + 1)  # the command's name stands for the program
    argcomplete.autocomplete(parser)


def command_parser(name: str) -> argparse.ArgumentParser | None:
    """The parser of a command; None where it is no command's name."""
    from tpimpi.cli import bench, cache, doctor, inspect, plan, slice, synth
    from tpimpi.cli.serve_options import serve_parser

    parsers = {
        "slice": slice.slice_parser,
        "synth": synth.synth_parser,
        "inspect": inspect.inspect_parser,
        "cache": cache.cache_parser,
        "perplexity": perplexity_parser,
        "bench": bench.bench_parser,
        "plan": plan.plan_parser,
        "doctor": doctor.doctor_parser,
        "serve": serve_parser,
    }
    return parsers[name]() if name in parsers else None
