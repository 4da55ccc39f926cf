"""Run on every rank, with a folder: sealed links that are well, then each kind of trouble with keys and with messages.

Rank 0 prints a line of JSON: what each rank said of each kind. FOLDER/KIND/RANK.json are the keys of each rank.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import platform
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from tpimpi.engine.ranks import gather_rank_infos
from tpimpi.errors import TpimpiError
from tpimpi.star import PARTIAL, Star, ciphers, connect, secure
from tpimpi.star.channel import HANDSHAKE, Channel
from tpimpi.star.control import Note, gather_notes
from tpimpi.star.seal import LinkSecrets
from tpimpi.star.secure import seal_channel
from tpimpi.system.link_keys import PATH_VARIABLE

FOLDER = Path(sys.argv[1])
RANK = int(os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["PMI_RANK"])
ALTERATIONS = ("change", "repeat", "exchange", "cut", "other tag", "other rank", "plain")


def use_keys(kind: str) -> None:
    os.environ[PATH_VARIABLE] = str(FOLDER / kind / f"{RANK}.json")


class Says(Note, frozen=True):
    """A note that names a host."""

    host: str


class SaysWithin(Note, frozen=True):
    """One that does so in a part of it."""

    part: dict[str, str]


class SaysInList(Note, frozen=True):
    """One that does so in a list of parts."""

    parts: list[dict[str, str]]


class Altered:
    """A communicator on which somebody alters the partials that this rank sends."""

    def __init__(self, comm: Any, kind: str) -> None:
        self._comm, self._kind, self._held, self._frames = comm, kind, None, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Isend(self, message: tuple[np.ndarray, MPI.Datatype], dest: int, tag: int) -> Any:  # noqa: N802
        if tag % 16 != PARTIAL:
            return self._comm.Isend(message, dest=dest, tag=tag)
        frame = message[0]
        self._frames.append(frame.copy())
        number, frame = len(self._frames) - 1, frame.copy()
        if self._kind == "change" and number == 1:
            frame[3] ^= 1
        if self._kind == "repeat" and number == 1:
            frame = self._frames[0]
        if self._kind == "cut" and number == 1:
            frame = frame[:-20]
        if self._kind == "exchange":
            if number == 0:
                self._held = (frame, tag)
                return MPI.REQUEST_NULL
            if number == 1:
                assert self._held is not None
                self._comm.Send(frame, dest=dest, tag=self._held[1])
                frame = self._held[0]
        if self._kind == "other rank" and number == 1:
            frame = np.roll(frame, 1)  # rank 2 sends its own, sealed for it, in this one's name: it opens as little
        if self._kind == "drop" and number == 1:
            return MPI.REQUEST_NULL
        return self._comm.Isend(frame, dest=dest, tag=tag)


def well(star: Star) -> str:
    """All kinds of messages, sealed, by every algorithm."""
    for algorithm in ("star", "exchange", "mesh", "ring", "tree"):
        star.algorithm = algorithm
        for count in (1, 33, 70_000, 300_000):
            values = np.full(count, star.rank.index + 1, np.float32)
            star.allreduce(values)
            assert (values == sum(range(1, star.rank.size + 1))).all(), (algorithm, count)
    star.algorithm = "star"
    values = np.arange(100, dtype=np.float32) if star.rank.is_hub else np.zeros(100, np.float32)
    star.broadcast(values)
    assert values.tolist() == list(range(100))
    notes = star.gather_notes(f"note {star.rank.index}".encode())
    assert notes == ([f"note {r}".encode() for r in range(star.rank.size)] if star.rank.is_hub else [])
    tile = np.arange(200_000, dtype=np.uint8)
    if star.rank.is_hub:
        star.finish_bulk(star.start_bulk(tile, 1))
    elif star.rank.index == 1:
        assert (star.take_bulk(0) == tile).all()
    star.clock_offsets()
    star.measure_links(1000)
    few = star.first(2)
    if few is not None:
        ones = np.ones(50, np.float32)
        few.allreduce(ones)
        assert (ones == 2).all()
    return star.sealed or ""


def imported(star: Star) -> list[str]:
    """What sums and other messages import each time: Python's import statement takes longer than to open a message."""
    found, real = [], builtins.__import__

    def count(name: str, *rest: Any, **named: Any) -> Any:
        found.append(name)
        return real(name, *rest, **named)

    builtins.__import__ = count
    try:
        star.allreduce(np.ones(576, np.float32))
        star.broadcast(np.ones(100, np.float32))
        star.gather_notes(b"note")
    finally:
        builtins.__import__ = real
    return found


class Sizes:
    """A communicator that notes how long its messages are."""

    def __init__(self, comm: Any) -> None:
        self._comm, self.found = comm, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def Isend(self, message: tuple[np.ndarray, MPI.Datatype], dest: int, tag: int) -> Any:  # noqa: N802
        self.found.append(message[0].size)
        return self._comm.Isend(message, dest=dest, tag=tag)


def padded(star: Star) -> list[list[int]]:
    """Messages of prompts of 5, 32 and 33 rows, then of a step of 5 that is none: their lengths."""
    few = star.first(star.rank.size)
    assert few is not None and few._channel is not None
    sizes = Sizes(few._channel.comm)
    few._channel.comm, found = sizes, []  # type: ignore[assignment]
    for rows, prompt in ((5, True), (32, True), (33, True), (5, False)):
        few.pad_rows(prompt)
        sizes.found = []
        x = (
            np.arange(rows * 8, dtype=np.float32).reshape(rows, 8)
            if few.rank.is_hub
            else np.zeros((rows, 8), np.float32)
        )
        few.broadcast(x)
        assert (x.reshape(-1) == np.arange(rows * 8)).all()
        under_way = few.start(x)
        under_way.wait()
        assert (x.reshape(-1) == np.arange(rows * 8) * few.rank.size).all()
        found.append(sizes.found)
    return found


def names(star: Star) -> list[str]:
    """How this rank and its messages name the ranks; and what it says where rank 1 takes another host's name: at first, in a
    note, and in one that is within another."""
    found = [str(star.rank), *(star.rank_name(rank) for rank in range(star.rank.size))]
    own = star.rank
    if RANK == 1:
        star.rank = replace(own, host="host-2")
    notes = (Says(star.rank.host), SaysWithin({"host": star.rank.host}), SaysInList([{"host": star.rank.host}]))
    for say in (partial(gather_rank_infos, star, []), *(partial(gather_notes, star, note) for note in notes)):
        try:
            say()
            found.append("ok")
        except TpimpiError as error:
            found.append(f"{type(error).__name__}: {error}")
    star.rank = own
    return found


def altered(star: Star, kind: str) -> str:
    """Two sums over links of which rank 1's partials are altered: what this rank says."""
    few = star.first(star.rank.size)
    assert few is not None and few._channel is not None
    few.timeout = 1.0
    if kind == "plain" and RANK == 1:
        few._channel.seal = None
    if kind == "other tag" and RANK == 1:
        few._turn = 1
    if RANK == 1:
        few._channel.comm = Altered(few._channel.comm, kind)  # type: ignore[assignment]
    sums = [np.full(64, RANK + turn, np.float32) for turn in range(3)]
    try:
        if kind == "exchange":
            under_way = [few.start(values) for values in sums]
            for each in under_way:
                each.wait()
        else:
            for values in sums:
                few.allreduce(values)
    except TpimpiError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def sealed_channel() -> Channel:
    """Raises what `seal_channel` does."""
    channel = Channel(MPI.COMM_WORLD.Clone())
    with contextlib.closing(secure.begin_handshakes()) as handshakes:
        seal_channel(channel, handshakes)
    return channel


def keys_of(kind: str) -> str:
    """A handshake with keys of that kind: what this rank says."""
    use_keys(kind)
    honest = secure._Run.answer
    if kind == "forging" and RANK == 2:  # says nothing of what it finds wrong
        secure._Run.answer = lambda *_: (os.urandom(48).hex(), LinkSecrets(bytes(32), bytes(32), b""))  # type: ignore
    try:
        return sealed_channel().seal.cipher
    except TpimpiError as error:
        return f"{type(error).__name__} {error.exit_code}, {error.where}: {error}"
    finally:
        secure._Run.answer = honest  # type: ignore[method-assign]


def names_in_one_home_folder() -> list[str]:
    """What the ranks are called where all have the same keys, and ranks 1 and 2 are another machine than rank 0."""
    use_keys("one host")
    node, platform.node = platform.node, lambda: f"node-{min(RANK, 1)}"
    try:
        return list(sealed_channel().seal.hosts)
    finally:
        platform.node = node


def with_the_package() -> list[float]:
    """Rank 1 finds no OpenSSL for the extension: what every rank gets of the one before it."""
    use_keys("good")
    if RANK == 1:
        ciphers.native_cipher = secure.native_cipher = lambda name: None  # type: ignore[assignment]
    channel, got = sealed_channel(), np.zeros(3, np.float32)
    sent = channel.send(np.full(3, RANK, np.float32), (RANK + 1) % channel.size, PARTIAL)
    for pending in (channel.receive(got, (RANK - 1) % channel.size, PARTIAL), sent):
        channel.wait(pending, time.monotonic() + 10)
    return list(map(float, got))


def long_handshake() -> str:
    """2 MiB before anybody has proved who he is: what rank 0 says."""
    channel = Channel(MPI.COMM_WORLD.Clone())
    try:
        if RANK == 1:
            channel.wait(channel.send(np.zeros(1 << 21, np.uint8), 0, HANDSHAKE), time.monotonic() + 1)
        elif RANK == 0:
            channel.take(1, HANDSHAKE, time.monotonic() + 10)
    except TpimpiError as error:
        return f"{type(error).__name__}: {error}"
    return "ok"


def main() -> None:
    use_keys("good")
    star = connect(seal="on")
    if len(sys.argv) > 2:  # a message is left out, and nobody but the heartbeat can know
        assert star._channel is not None
        if RANK == 1:
            star._channel.comm = Altered(star._channel.comm, sys.argv[2])  # type: ignore[assignment]
        for turn in range(3):
            star.allreduce(np.full(64, turn, np.float32))
        print("not noticed", flush=True)
        return
    said: dict[str, Any] = {"well": well(star)}
    said["imported"] = imported(star)
    said["padded"] = padded(star)
    said["names"] = names(star)
    for kind in sorted(folder.name for folder in FOLDER.iterdir()):
        MPI.COMM_WORLD.Barrier()
        said[f"keys: {kind}"] = keys_of(kind)
    said["one home folder"] = names_in_one_home_folder()
    said["long handshake"] = long_handshake()
    said["package"] = with_the_package()
    for kind in ALTERATIONS:
        MPI.COMM_WORLD.Barrier()
        said[kind] = altered(star, kind)
    gathered = MPI.COMM_WORLD.gather(said)
    if star.rank.is_hub:
        print(json.dumps(gathered), flush=True)
    sys.stdout.flush()
    MPI.COMM_WORLD.Barrier()
    os._exit(0)  # by a launcher no good end; but messages that nobody takes would be waited for


if __name__ == "__main__":
    main()
