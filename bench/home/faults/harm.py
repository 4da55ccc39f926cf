"""What a program between two devices does to our messages: each kind of harm, done once to a message that chance picks.

But for `headers`, MPI notices nothing: its own headers stay right, and fit what is sent. So only tpimpi can find it.
"""

from __future__ import annotations

import random
import struct
import threading
import time
from collections import deque
from dataclasses import replace

import xxhash

from bench.home.faults.frames import Frame

Flow = tuple[int, int]  # the ranks of whom sends and who receives
REMEMBERED = 256  # messages that have passed
CHECKSUM_BYTES = 8  # the end of a plain message: star/channel.py
PIECE_BYTES = 4 * 4096
SKIPPED_MOST = 12  # suitable messages that pass, once harm is due, before it is done


class CutError(Exception):
    """The connection ends here, after these bytes."""

    def __init__(self, before: bytes) -> None:
        super().__init__()
        self.before = before


class Harm:
    """Passes on all as it is, and remembers it; subclasses do harm to one message after `due` is set."""

    patience_s = 0.5  # so long nothing comes, before `late` is asked

    def __init__(
        self, flow: Flow = (0, 0), chance: random.Random | None = None, communicator: int | None = None
    ) -> None:
        """To a message from and to these ranks; of a communicator, or of any."""
        self.flow, self.chance, self.communicator = flow, chance or random.Random(), communicator
        self.due = False
        self.done_at: float | None = None  # time.monotonic()
        self.done = ""  # what was done, in words
        self.passed: deque[tuple[Flow, Frame]] = deque(maxlen=REMEMBERED)
        self.largest = 0  # bytes of a message that has passed
        self._skip = self.chance.randrange(SKIPPED_MOST)
        self._lock = threading.Lock()

    def meet(self, flow: Flow, frame: Frame) -> list[Frame]:
        """What is sent on in place of a frame. Raises CutError."""
        with self._lock:
            if frame.ours:
                self.largest = max(self.largest, len(frame.payload))
                self.passed.append((flow, replace(frame, data=bytearray(frame.data))))
            return self._meet(flow, frame)

    def late(self, flow: Flow) -> list[Frame]:
        """What is sent on where nothing came for `patience_s`."""
        return []

    def _meet(self, flow: Flow, frame: Frame) -> list[Frame]:
        if not self.due or self.done_at is not None or flow != self.flow or not self.suits(frame):
            return [frame]
        if self._skip > 0:
            self._skip -= 1
            return [frame]
        return self.act(frame)

    def suits(self, frame: Frame) -> bool:
        """Whether harm may be done to it."""
        return frame.ours and self.communicator in (None, frame.communicator) and len(frame.payload) > CHECKSUM_BYTES

    def act(self, frame: Frame) -> list[Frame]:
        """Do it: what is sent on in place of the frame. Where it cannot be done to this one, `note` is not called."""
        return [frame]

    def note(self, what: str, frame: Frame) -> None:
        """It is done."""
        self.done_at = time.monotonic()
        self.done = f"{what}: {len(frame.payload)} bytes, tag {frame.tag}, communicator {frame.communicator}"

    def earlier(self, frame: Frame, flows: tuple[Flow, ...], *, other_tag: bool = False) -> Frame | None:
        """The latest message of the same size and other bytes that passed in one of these flows."""
        own = frame.payload
        for flow, past in reversed(self.passed):
            fits = len(past.payload) == len(own) and past.payload != own
            if flow in flows and fits and not (other_tag and past.tag == frame.tag):
                return past
        return None


def _kind(frame: Frame) -> tuple[int, int]:
    return frame.communicator, frame.tag


class Flip(Harm):
    """One bit of a message is another."""

    def act(self, frame: Frame) -> list[Frame]:
        bit = self.chance.randrange(8 * len(frame.payload))
        frame.data[frame.at + bit // 8] ^= 1 << bit % 8
        self.note(f"flipped bit {bit}", frame)
        return [frame]


class Forge(Harm):
    """A message is another one, whose plain checksum is right."""

    def act(self, frame: Frame) -> list[Frame]:
        count = (len(frame.payload) - CHECKSUM_BYTES) // 4
        data = struct.pack(
            f"<{count}f", *(1000.0 * (-1) ** place for place in range(count))
        )  # drowns what is added to it
        checksum = xxhash.xxh3_64_intdigest(data, frame.tag).to_bytes(CHECKSUM_BYTES, "little")
        frame.replace(data + checksum)
        self.note("forged", frame)
        return [frame]


class Drop(Harm):
    """A message is left out, and MPI's counts of the later ones, where it has some, are lessened by it."""

    _of: int | None = None

    def _meet(self, flow: Flow, frame: Frame) -> list[Frame]:
        if self._of == frame.communicator and flow == self.flow and frame.match_at is not None:
            frame.count_down(1)
        return super()._meet(flow, frame)

    def act(self, frame: Frame) -> list[Frame]:
        self._of = frame.communicator
        self.note("dropped", frame)
        return []


class Repeat(Harm):
    """In place of a message an earlier one of the same size is sent again."""

    def act(self, frame: Frame) -> list[Frame]:
        if past := self.earlier(frame, (self.flow,)):
            frame.replace(past.payload)
            self.note(f"repeated one of tag {past.tag}", frame)
        return [frame]


class Reorder(Harm):
    """Two messages that follow one another in one flow change places."""

    patience_s = 0.4  # where the receiver has to answer the first there will be no second
    _held: Frame | None = None

    def suits(self, frame: Frame) -> bool:
        """Only pieces of a larger array follow one another without an answer."""
        return super().suits(frame) and len(frame.payload) >= PIECE_BYTES

    def _meet(self, flow: Flow, frame: Frame) -> list[Frame]:
        held = self._held
        if held is None or flow != self.flow:
            return super()._meet(flow, frame)
        self._held = None
        if (*_kind(frame), len(frame.data)) == (*_kind(held), len(held.data)) and frame.payload != held.payload:
            first, second = held.payload, frame.payload
            held.replace(second)
            frame.replace(first)
            self.note("reordered", frame)
        return [held, frame]

    def act(self, frame: Frame) -> list[Frame]:
        self._held = frame
        return []

    def late(self, flow: Flow) -> list[Frame]:
        with self._lock:
            if flow != self.flow or self._held is None:
                return []
            held, self._held = self._held, None
            return [held]


class Shorten(Harm):
    """A message ends early."""

    def act(self, frame: Frame) -> list[Frame]:
        kept = self.chance.randrange(len(frame.payload))
        self.note(f"cut to {kept} bytes", frame)
        frame.replace(frame.payload[:kept])
        return [frame]


class Break(Harm):
    """The connection ends within a message."""

    def act(self, frame: Frame) -> list[Frame]:
        kept = self.chance.randrange(1, len(frame.data))
        self.note(f"connection cut after {kept} bytes of a frame", frame)
        raise CutError(bytes(frame.data[:kept]))


class SwapDirections(Harm):
    """In place of a message one of the other direction is sent: the receiver's own."""

    def act(self, frame: Frame) -> list[Frame]:
        if past := self.earlier(frame, (self.flow[::-1],)):
            frame.replace(past.payload)
            self.note(f"swapped with one of the other direction, tag {past.tag}", frame)
        return [frame]


class SwapTags(Harm):
    """In place of a message one of another tag is sent."""

    def act(self, frame: Frame) -> list[Frame]:
        if past := self.earlier(frame, (self.flow,), other_tag=True):
            frame.replace(past.payload)
            self.note(f"swapped with one of tag {past.tag}", frame)
        return [frame]


class SwapPairs(Harm):
    """In place of a message one of another pair of ranks is sent."""

    def act(self, frame: Frame) -> list[Frame]:
        others = {flow for flow, _ in self.passed} - {self.flow, self.flow[::-1]}
        if past := self.earlier(frame, tuple(others)):
            frame.replace(past.payload)
            self.note(f"swapped with one of another pair, tag {past.tag}", frame)
        return [frame]


class Headers(Harm):
    """One to eight bytes of MPI's own headers are others."""

    def suits(self, frame: Frame) -> bool:
        return frame.at > frame.header_bytes  # whatever MPI sends

    def act(self, frame: Frame) -> list[Frame]:
        before = bytes(frame.data[: frame.at])
        first = self.chance.randrange(frame.at)
        for at in range(first, min(frame.at, first + self.chance.randint(1, 8))):
            frame.data[at] ^= self.chance.randrange(1, 256)
        self.note(f"header {before.hex()} became {bytes(frame.data[: frame.at]).hex()}", frame)
        return [frame]


KINDS: dict[str, tuple[type[Harm], ...]] = {
    "flip": (Flip,),
    "drop": (Drop,),
    "repeat": (Repeat,),
    "reorder": (Reorder,),
    "cut": (Shorten, Break),
    "swap": (SwapDirections, SwapTags, SwapPairs),
    "forge": (Forge,),
    "headers": (Headers,),
}
