"""The steps of a run after its start: what rank 0 commands, and how the other ranks follow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from tpimpi.compute.arrays import F32
from tpimpi.engine.model import Model
from tpimpi.errors import StarError
from tpimpi.star import BEGIN, FINISH, FORWARD, Star


def step(model: Model, star: Star, x: F32, start: int, *, head: bool = True) -> F32:
    """Rank 0: have every rank run `x` [n, hidden] through the layers at positions from `start`; returns [n, hidden].

    Unless `head`, no logits will be asked for.
    """
    star.command(FORWARD, x.shape[0], start)
    star.broadcast(x)
    return model.forward(x, start, head=head)


def follow(models: Sequence[Model], star: Star) -> None:
    """Other ranks: do what rank 0 says until it says that the run is over. They see hidden vectors, never ids or text.

    Where there are several models the commands are for them in turn, the first for the first.
    """
    for model in itertools.cycle(models):
        operation, positions, start = star.next_command()
        if operation == FINISH:
            return
        if operation == BEGIN:
            model.begin(positions)
            continue
        if model.cache is None or start + positions > model.cache.context:
            raise StarError(f"rank 0 asks for position {start + positions}, which is outside the context it announced")
        x = np.empty((positions, model.config.hidden), np.float32)
        star.broadcast(x)
        model.forward(x, start)
