"""Run on every rank: one kind of trouble, by its name. What is said and the exit code are what a run would give."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import xxhash

from tpimpi.engine.protocol import Operation, StepHeader, receive_header
from tpimpi.errors import TpimpiError
from tpimpi.star import CONTROL, HIDDEN, NOTE, PARTIAL, SUM, Star, connect

VALUES = np.ones(4, np.float32)
HEADER = StepHeader(Operation.BEGIN, 1).pack()
# Messages of every kind: the tag, what is sent, whether rank 0 sends it, and what the other is doing.
DAMAGED: dict[str, tuple[int, np.ndarray, bool, Callable[[Star], object]]] = {
    "damaged partial": (PARTIAL, VALUES, False, lambda star: star.allreduce(VALUES.copy())),
    "damaged sum": (SUM, VALUES, True, lambda star: star.allreduce(VALUES.copy())),
    "damaged hidden": (HIDDEN, VALUES, True, lambda star: star.broadcast(VALUES.copy())),
    "damaged control": (CONTROL, HEADER, True, receive_header),
    "damaged note": (NOTE, np.frombuffer(b'{"a": 1}', np.uint8), False, lambda star: star.gather_notes(b"{}")),
}


def trouble(star: Star, kind: str) -> None:
    values = np.ones(4, np.float32)
    if kind == "hang":
        star.timeout = 1.0 if star.rank.is_hub else 50.0
        if star.rank.index == star.rank.size - 1:
            time.sleep(50)
        star.allreduce(values)
    elif kind == "short":
        if star.rank.is_hub:
            star.allreduce(values)
        else:
            star._comm.Send(values[:3], dest=0, tag=PARTIAL)  # type: ignore[union-attr]
            time.sleep(50)
    elif kind in DAMAGED:
        tag, data, from_hub, receive = DAMAGED[kind]
        if star.rank.is_hub != from_hub:
            receive(star)
        else:  # of the right size, but a bit was flipped after its checksum was made
            message = np.append(data.view(np.uint8), np.zeros(8, np.uint8))
            message[-8:].view(np.uint64)[0] = xxhash.xxh3_64_intdigest(message[:-8], tag)
            message[3] ^= 1
            star._comm.Send(message, dest=1 - star.rank.index, tag=tag)  # type: ignore[union-attr]
            time.sleep(50)
    elif kind == "header":
        if star.rank.is_hub:
            star.send_words(np.array([1, 2, 3, 4, 5], np.int64))
            time.sleep(50)
        else:
            receive_header(star)


if __name__ == "__main__":
    here = connect()
    try:
        trouble(here, sys.argv[1])
    except TpimpiError as error:
        print(f"{here.rank}: {error}", file=sys.stderr, flush=True)
        here.abort(error.exit_code)
