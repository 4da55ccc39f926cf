"""`python -m tpimpi`, with a fault in the last rank. The first argument says which: `sums` scales what it sends into sums,
and answers audits honestly; `flip` changes a bit of a pinned tile, and has the tiles checked before the next step."""

from __future__ import annotations

import sys
import time

from bench.studies.audit_ranks import flipped_bit, lies_in_sums
from tpimpi.cli import follow as following
from tpimpi.cli import main as cli
from tpimpi.engine import protocol

FAULT = sys.argv[1]


def flip(model) -> None:
    window = model.window
    while not all(window._pinned.tiles):
        time.sleep(0.01)
    flipped_bit(model)
    for _ in window._pinned.tiles:
        window.check_next_pinned()


def follow(models, star, *arguments, **named) -> None:
    if star.rank.index == star.rank.size - 1:
        {"sums": lies_in_sums, "flip": flip}[FAULT](models[0])
    protocol.follow(models, star, *arguments, **named)


following.follow = follow
cli.main(sys.argv[2:])
