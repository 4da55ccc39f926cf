"""Run on every rank in the place of `python -m tpimpi`: the same, with every message and each rank's outside recorded.

Arguments: a folder, then tpimpi's own. Writes messages-R.pickle, a list of (destination, tag, bytes), and outside-R.json:
arguments, environment, open files and imported modules of rank R, taken while it follows.
"""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np

from tpimpi import star
from tpimpi.cli import follow as following
from tpimpi.cli import main as cli
from tpimpi.engine import protocol
from tpimpi.star.channel import BULK, CHECKSUM_BYTES
from tpimpi.star.pieces import TAGS_PER_TURN

OUT = Path(sys.argv[1])
ALLOWED = {"rank", "size", "Irecv", "Improbe", "Abort"}


class Recorder:
    """A communicator that notes what is sent, and has nothing but what the star is known to use."""

    def __init__(self, comm) -> None:
        self._recorded_comm = comm
        self.sent: list[tuple[int, int, bytes]] = []

    def __getattr__(self, name: str):
        if name not in ALLOWED:
            raise AssertionError(f"the star uses {name}, which this test does not record")
        return getattr(self._recorded_comm, name)

    def Isend(self, buffer, dest: int, tag: int):  # noqa: N802
        data, tag_of_kind = np.asarray(buffer[0]).tobytes(), tag % TAGS_PER_TURN  # each sum has tags of its own
        self.sent.append((dest, tag_of_kind, data if tag_of_kind == BULK else data[:-CHECKSUM_BYTES]))
        return self._recorded_comm.Isend(buffer, dest=dest, tag=tag)


def outside() -> dict[str, object]:
    files = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            files.append(str(entry.readlink()))
        except OSError:
            continue
    return {
        "arguments": Path("/proc/self/cmdline").read_bytes().decode(errors="replace"),
        "environment": Path("/proc/self/environ").read_bytes().decode(errors="replace"),
        "files": files,
        "mapped": Path("/proc/self/maps").read_text(),
        "modules": sorted(sys.modules),
    }


def main() -> None:
    connect, follow = star.connect, protocol.follow
    here: list[star.Star] = []

    def recorded_connect(*, quiet: bool, seal: str):
        found = connect(quiet=quiet, seal=seal)
        found._comm = found._channel.comm = Recorder(found._comm)
        here.append(found)
        return found

    def recorded_follow(model, own_star, *more):
        (OUT / f"outside-{own_star.rank.index}.json").write_text(json.dumps(outside()))
        follow(model, own_star, *more)

    cli.connect = recorded_connect
    following.follow = recorded_follow
    try:
        cli.main(sys.argv[2:])
    finally:
        with (OUT / f"messages-{here[0].rank.index}.pickle").open("wb") as file:
            pickle.dump(here[0]._comm.sent, file)


if __name__ == "__main__":
    main()
