"""Run on every rank: what the heartbeat and the start say. Argument: stop | late | slow | leave | dead-hub | dead-rank."""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from tpimpi.errors import StarError
from tpimpi.star import Star, connect
from tpimpi.star import heartbeat as heartbeat_module
from tpimpi.star import start as start_module

KIND = sys.argv[1]


def main() -> None:
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0")))
    if KIND == "late":
        start_module.WAIT_REPORT_S, start_module.SLOW_START_S = 0.3, 0.5
        time.sleep(2.0 * (rank == 1))
    if KIND == "never":
        start_module.WAIT_REPORT_S, start_module.SLOW_START_S, start_module.HOPELESS_START_S = 0.3, 0.5, 1.0
        time.sleep(600 * (rank == 1))
    heartbeat_module.SLOW_RANK_S = 1.0
    star = connect()
    if star.rank.is_hub:
        star.allow_silence(2.0)
    _agree(star)
    time.sleep(0.6)  # for a first heartbeat
    if KIND in ("dead-hub", "dead-rank"):
        _one_dies(star, dead=0 if KIND == "dead-hub" else 2)
    if KIND == "stop" and rank == 2:
        os.kill(os.getpid(), signal.SIGSTOP)
    if KIND == "slow" and rank == 2:  # it sends heartbeats, but the others wait for it
        time.sleep(3.5)
    if KIND == "leave" and rank == 2:  # it ends in peace, and the others go on for longer than the silence
        star.close()
        return
    if KIND == "leave":
        time.sleep(4)
    else:
        _agree(star)
    if KIND == "slow":
        time.sleep(1)  # for the heartbeat to look again
    if star.rank.is_hub:
        print("all well", flush=True)
    star.close()


def _one_dies(star: Star, *, dead: int) -> None:
    """One rank is killed while the others wait for a note, which is a probe for a message of whatever size."""
    if star.rank.index == dead:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        if star.rank.is_hub:
            star.gather_notes(b"")
        else:
            star.receive_note()
    except StarError as error:
        print(f"{star.rank}: {error}", file=sys.stderr, flush=True)
        star.abort(1)


def _agree(star: Star) -> None:
    values = np.ones(4, np.float32)
    star.allreduce(values)
    assert values.tolist() == [star.rank.size] * 4


if __name__ == "__main__":
    main()
