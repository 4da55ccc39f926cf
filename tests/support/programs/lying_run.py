"""`python -m tpimpi`, with a last rank that scales what it sends into sums, and answers audits honestly."""

from __future__ import annotations

import sys

from bench.studies.audit_ranks import lies_in_sums
from tpimpi.cli import follow as following
from tpimpi.cli import main as cli
from tpimpi.engine import protocol


def follow(models, star, *arguments, **named) -> None:
    if star.rank.index == star.rank.size - 1:
        lies_in_sums(models[0])
    protocol.follow(models, star, *arguments, **named)


following.follow = follow
cli.main(sys.argv[1:])
