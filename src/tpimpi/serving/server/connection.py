"""Rank 0's end of the socket to the front: never waits for the front, but where there is nothing else to do."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Sequence

import msgspec

from tpimpi.errors import TpimpiError
from tpimpi.serving.server.wire import Frames, Question, Reply, decode_question, frame

READ_BYTES = 1 << 18
MAX_UNSENT_BYTES = 1 << 26  # a front that takes nothing for so long is gone
LAST_WORDS_S = 1.0  # what is said at the end may take so long to go


class FrontGoneError(TpimpiError):
    """The front has ended, or says what makes no sense."""


class Connection:
    """Messages to and from the front. Raises FrontGoneError where it has ended."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.connect(path)
        self._socket.setblocking(False)
        self._unsent, self._lock = bytearray(), threading.Lock()
        self._frames = Frames()
        self._waker, self._wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)[::-1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wakes, selectors.EVENT_READ)

    def say(self, message: Reply) -> None:
        """A message, which `flush` sends."""
        with self._lock:
            self._unsent += frame(message)

    def flush(self) -> None:
        """Send what the socket takes."""
        with self._lock:
            if not self._unsent:
                return
            try:
                del self._unsent[: self._socket.send(self._unsent)]
            except BlockingIOError:
                pass
            except OSError as error:
                raise FrontGoneError(f"the HTTP front has ended ({error.strerror})") from error
        if len(self._unsent) > MAX_UNSENT_BYTES:
            raise FrontGoneError(f"the HTTP front has taken nothing of {len(self._unsent)} bytes; it hangs")

    def wait(self, seconds: float | None) -> None:
        """Until there is something to be taken, the socket takes more, or somebody wakes us; or so long."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._unsent else 0)
        self._selector.modify(self._socket, events)
        self._selector.select(seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wakes, READ_BYTES)

    def wake(self) -> None:
        """End a `wait`, from a signal's handler or another thread."""
        with contextlib.suppress(OSError):
            os.write(self._waker, b"\0")

    def take(self) -> Sequence[Question]:
        """The messages that have come."""
        try:
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise FrontGoneError("the HTTP front has ended")
            return [decode_question(one) for one in self._frames.feed(data)]
        except BlockingIOError:
            return []
        except OSError as error:
            raise FrontGoneError(f"the HTTP front has ended ({error.strerror})") from error
        except (msgspec.MsgspecError, ValueError) as error:
            raise FrontGoneError(f"the HTTP front sent a message that makes no sense: {error}") from error

    def say_last(self, message: Reply) -> None:
        """A message that is to be sent before this process ends, from whichever thread; nothing follows."""
        with contextlib.suppress(OSError), self._lock:
            self._socket.settimeout(LAST_WORDS_S)
            self._socket.sendall(bytes(self._unsent) + frame(message))
            self._unsent.clear()

    def close(self) -> None:
        self._selector.close()
        self._socket.close()
        os.close(self._waker)
        os.close(self._wakes)
