"""The journal of a server (--journal): requests with an Idempotency-Key, under way or kept, and their answers so far.

A file of sealed lines (see sealed_lines), each a JSON array that begins with the kind of its record, one of those below. It
grows at its end, by a line every FLUSH_S seconds while answers come, and is written anew, with what is kept alone, when it
has grown. Only what is written anew is forced to the disk (fsync): it is for a server that is killed; after a power cut its
last seconds may be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from tpimpi.errors import shorten_path
from tpimpi.serving.record_file import RecordFile
from tpimpi.serving.server import wire

OPTION, KEY_OPTION = "--journal", "--journal-key-file"
FLUSH_S = 0.2
WRITE_AGAIN_S = 5.0  # after a disk that was full, say
MAX_GROWN = 2.0  # times what was kept of it, until it is written anew; and where nothing is under way
MAX_GROWN_IDLE = 1.25
MIN_GROWN_BYTES, MIN_GROWN_IDLE_BYTES = 1 << 20, 1 << 16
MAX_REPLIES = 2048  # in one line: of tokens with all their logprobs, 2 MB
MAX_LINE_BYTES = 1 << 27  # twice what the longest request takes

Reply = wire.Began | wire.Part | wire.Done


class _Record(msgspec.Struct, frozen=True, tag=True, array_like=True, forbid_unknown_fields=True):
    """One line."""


class Begun(_Record, frozen=True):
    """A request, as `number` in the lines that follow. `key` is its Idempotency-Key, of `owner`; `fingerprint` tells its
    path and body from others; `model` (its fingerprint) is to answer it, `at` (Unix time) it came. `asks` are empty where
    all `answers` are there; else there is one for each prompt, and `choices` has its number of answers, whose seeds count up
    from its own (none: one each). Where its number was there before, it begins again, without replies."""

    number: int
    owner: str
    key: str
    fingerprint: str
    at: float
    model: str = ""
    answers: int = 0
    asks: list[wire.Ask] = []
    choices: list[int] = []


class Replied(_Record, frozen=True):
    """What rank 0 said: the request, the number of the answer among its own, and the reply."""

    replies: list[tuple[int, int, Reply]]


class Held(_Record, frozen=True):
    """Nothing more of it is computed, for nobody waits for it; or it goes on."""

    number: int
    held: bool


class Forgotten(_Record, frozen=True):
    """It is not kept any more."""

    number: int


Record = Begun | Replied | Held | Forgotten
_decode = msgspec.json.Decoder(Record).decode


class Journal:
    """The file, open and locked."""

    def __init__(
        self,
        given: str,
        passphrase: bytes,
        take: Callable[[Record], None],
        everything: Callable[[], Iterable[Record]],
    ) -> None:
        """Read it, or make it; `take` gets each record that is there, and raises KeyError or ValueError for one that cannot
        follow those before it. `everything` gives what stands in a file that is written anew, as it is here at once. Raises
        InputError where it cannot be used."""
        self._file = RecordFile(given, "journal", OPTION, KEY_OPTION, passphrase, MAX_LINE_BYTES)
        self._file.open(lambda line: take(_decode(line)))
        self._file.make_key()
        self._pending: list[Record] = []
        self._timer: asyncio.TimerHandle | None = None
        self._kept_bytes = 0  # of the file, when it was written anew, or that was tried
        self._failed_at: float | None = None  # time.monotonic(), where not all of it could be written
        self._everything = everything
        try:
            self._replace()
        except OSError as error:
            self._file.close()
            raise self._file.wrong(
                f" cannot be written anew ({error.strerror}); make room, or give a file in a folder where files can be made"
            ) from error

    def add(self, record: Record, *, now: bool = False) -> None:
        """One more, which is written soon, or `now`."""
        last = self._pending[-1] if self._pending else None
        if isinstance(record, Replied) and isinstance(last, Replied):
            last.replies.extend(record.replies)
        else:
            self._pending.append(record)
        if now:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what is not written yet. What cannot be written is said once, and tried again later."""
        self._stop_timer()
        lines = b"".join(_lines(self._pending))
        self._pending = []
        if self._failed_at is not None:
            self.try_again()
        elif lines:
            try:
                self._file.append(lines)
            except OSError as error:
                self._fail(error)
            else:
                if self._file.lines.whole > MAX_GROWN * self._kept_bytes + MIN_GROWN_BYTES:
                    self.write_anew()

    def try_again(self) -> None:
        """Write what could not be written, if that is a while ago."""
        if self._failed_at is not None and time.monotonic() - self._failed_at > WRITE_AGAIN_S:
            self.write_anew()

    def write_anew(self) -> None:
        """With what is kept alone. Where that cannot be, the file grows on, unless it could not be written before."""
        try:
            self._replace()
        except OSError as error:
            self._kept_bytes = self._file.lines.whole
            if self._failed_at is not None:
                self._fail(error)
        else:
            self._stop_timer()
            self._pending = []
            self._failed_at = None

    def _replace(self) -> None:
        self._file.replace(b"".join(_lines(self._everything())))
        self._kept_bytes = self._file.lines.whole

    def tidy(self, *, empty: bool) -> None:
        """Nothing is under way, or kept either where `empty`: it is written anew if it has grown."""
        grown = self._file.lines.whole > MAX_GROWN_IDLE * self._kept_bytes + MIN_GROWN_IDLE_BYTES
        if grown or (empty and self._file.has_records):
            self.write_anew()

    def say(self, problem: str) -> None:
        """A line for who has started the server."""
        with contextlib.suppress(OSError):
            print(f"tpimpi: {OPTION} {shorten_path(self._file.path)}{problem}", file=sys.stderr, flush=True)

    def _fail(self, error: OSError) -> None:
        if self._failed_at is None:
            self.say(
                f" cannot be written ({error.strerror}): answers go on, but no other server could go on with them; make "
                "room, and it is written again"
            )
        self._failed_at = time.monotonic()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _lines(records: Iterable[Record]) -> Iterator[bytes]:
    for record in records:
        if isinstance(record, Replied):  # of which a whole answer may be one
            for first in range(0, len(record.replies), MAX_REPLIES):
                yield msgspec.json.encode(Replied(record.replies[first : first + MAX_REPLIES])) + b"\n"
        else:
            yield msgspec.json.encode(record) + b"\n"
