"""The messages of one rank's process, as they were recorded at MPI: the file they are in, and the steps that they are of.

What each of them is says its tag, which MPI needs to deliver it: so tags and sizes are in clear where all else is sealed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.attack.public import PublicModel, numbers
from tpimpi.compute.arrays import F32
from tpimpi.compute.formats.packed import row_bytes
from tpimpi.engine.overlap import half_chunks
from tpimpi.models.blocks import Block
from tpimpi.star import CONTROL, HIDDEN, SUM
from tpimpi.star.pieces import TAGS_PER_TURN, TURNS

HEAD = struct.Struct("<5q")  # direction, communicator, the other rank, tag, bytes
SENT, RECEIVED = 0, 1
TRAILERS = (8, 16)  # bytes at a message's end: a checksum, or the tag of an authenticated cipher


class Message(NamedTuple):
    """One message of a rank: SENT or RECEIVED, over which of its communicators, with which rank, and the bytes."""

    direction: int
    communicator: int
    peer: int
    tag: int
    data: bytes


def read_messages(path: Path) -> Iterator[Message]:
    """The messages of a file, in their order; what was cut off at its end is left out."""
    with path.open("rb") as file:
        while len(head := file.read(HEAD.size)) == HEAD.size:
            direction, communicator, peer, tag, size = HEAD.unpack(head)
            if len(data := file.read(size)) == size:
                yield Message(direction, communicator, peer, tag, data)


@dataclass
class Step:
    """What one step brought: hidden vectors, and its sums by their turns; bytes, in the order in which they came."""

    hidden: list[bytes] = field(default_factory=list)
    sums: dict[int, list[bytes]] = field(default_factory=dict)


def steps_of(messages: Iterable[Message]) -> list[Step]:
    """The steps of a run in what a rank got from rank 0, where rank 0 adds the sums (`--allreduce star`)."""
    steps: list[Step] = []
    begins = True  # a step, with the next vectors: the words that say what they are have come
    for message in messages:
        kind, turn = message.tag % TAGS_PER_TURN, message.tag // TAGS_PER_TURN
        if message.direction != RECEIVED or message.peer != 0:
            continue
        if kind == CONTROL:
            begins = True
        elif kind == HIDDEN:
            if begins or not steps:
                steps.append(Step())
            steps[-1].hidden.append(message.data)
            begins = False
        elif kind == SUM and steps:  # else a measurement of the links
            steps[-1].sums.setdefault(turn, []).append(message.data)
    return steps


def vectors(messages: Sequence[bytes], wire: str, hidden: int) -> F32:
    """The vectors in pieces of one array, [n, hidden]; [0, hidden] where they are not of such a size."""
    block = row_bytes(wire, 32)
    whole = []
    for data in messages:
        trailer = next((size for size in TRAILERS if len(data) > size and (len(data) - size) % block == 0), None)
        if trailer is None:
            return np.empty((0, hidden), np.float32)
        whole.append(numbers(data[:-trailer], wire))
    flat = np.concatenate(whole) if whole else np.empty(0, np.float32)
    return flat[: len(flat) // hidden * hidden].reshape(-1, hidden)


def hidden_vectors(steps: Sequence[Step], wire: str, model: PublicModel) -> list[F32]:
    """What rank 0 sent at the beginning of each step, [n, hidden]."""
    return [vectors(step.hidden, wire, model.config.hidden) for step in steps]


def residual(step: Step, wire: str, model: PublicModel, layers: int) -> F32:
    """The residual of a step's rows after so many layers, [n, hidden], from hidden vectors and sums alone.

    [0, hidden] where messages are missing, or are not what they would have to be.
    """
    nothing = np.empty((0, model.config.hidden), np.float32)
    sent, blocks = vectors(step.hidden, wire, model.config.hidden), model.summed_blocks
    x = sent[
        : np.flatnonzero((sent != 0).any(axis=1)).max(initial=-1) + 1
    ].copy()  # on sealed links prompts end with rows of zeros
    if not step.sums or not len(x):
        return nothing
    # Long steps go through the layers in two halves, by turns.
    first = next(iter(step.sums))
    turns = sorted(step.sums, key=lambda turn: (turn - first + TURNS // 2) % TURNS)
    halves = half_chunks(len(x), 2) if len(turns) == 2 * len(blocks) else [slice(0, len(x))]
    if len(turns) != len(halves) * len(blocks):
        return nothing
    for place, turn in enumerate(turns):
        block, half = blocks[place // len(halves)], halves[place % len(halves)]
        if block.layer < layers and not _is_of_squares(block):
            total = vectors(step.sums[turn], wire, model.config.hidden)
            if len(total) < len(x[half]):
                return nothing
            with np.errstate(all="ignore"):  # any bytes, where they are sealed
                x[half] += model.to_residual(total[: len(x[half])], block)
    return x


def _is_of_squares(block: Block) -> bool:
    """Whether a block's sum is of squares, for a norm over all heads, and is not added to the residual."""
    return block.kind == "qkv"
