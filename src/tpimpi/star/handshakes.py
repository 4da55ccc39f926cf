"""A rank's handshakes with the others (see noise), made in a process that exits: `python -m tpimpi.star.handshake_process`.

What they need, the package cryptography, takes 9 MB, which a rank would hold as long as it runs. The process gets keys and
messages over its standard input, and answers over its standard output, a line of JSON each. Where there can be none, or
where the package is needed anyway (see ciphers), the rank makes its handshakes itself.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Protocol

from tpimpi.errors import StarError
from tpimpi.modules import without_module
from tpimpi.star.ciphers import native_cipher
from tpimpi.system.launcher import environment_without_launcher

with without_module("typing_extensions"):
    import msgspec

END_TIMEOUT_S = 5.0  # after its input was closed


class HandshakeError(Exception):
    """The other side has not the key that it should have, or its message was changed on its way."""


@dataclass(frozen=True)
class Secrets:
    """What both sides share after the handshake: 32 bytes for what the initiator sends, 32 for what the responder sends, and
    the hash of the handshake."""

    initiator: bytes
    responder: bytes
    hash: bytes


@dataclass(frozen=True)
class Known:
    """What a side knows before: its own private key, the other's public one, 32 bytes each, and what both must have
    understood alike."""

    ours: bytes
    theirs: bytes
    prologue: bytes


class Handshakes(Protocol):
    """Makes those of a rank with others, which are told apart by their rank."""

    def begin(self, other: int, known: Known) -> bytes:
        """The first message to another."""

    def finish(self, other: int, message: bytes) -> Secrets:
        """What is shared with another that answered so to the first message. Raises HandshakeError."""

    def answer(self, known: Known, message: bytes) -> tuple[bytes, Secrets]:
        """The answer to another that began so, and what is shared with it. Raises HandshakeError."""

    def close(self) -> None:
        """No more are made."""


class Asked(msgspec.Struct, frozen=True):
    """Of the process: to begin where `known` is there and no `message`, to answer where both are, else to finish."""

    other: int = 0
    known: Known | None = None
    message: bytes | None = None


class Answered(msgspec.Struct, frozen=True):
    """By the process; `wrong` where a HandshakeError was raised."""

    message: bytes = b""
    secrets: Secrets | None = None
    wrong: bool = False


def open_handshakes() -> Handshakes:
    """Begin: as early as possible, as a process takes a while to start."""
    if native_cipher() is not None:
        with contextlib.suppress(OSError):
            return HandshakeProcess()
    from tpimpi.star.noise import NoiseHandshakes

    return NoiseHandshakes()


class HandshakeProcess:
    """Handshakes that a process of their own makes. Raises OSError where it cannot be started."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: the current folder may be that of a model, and has no say in what is imported.
            [sys.executable, "-P", "-m", "tpimpi.star.handshake_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_without_launcher(),
            start_new_session=True,  # the signals of launcher and terminal are for the rank
        )

    def begin(self, other: int, known: Known) -> bytes:
        """See Handshakes; so are those below. Raises StarError where the process has ended."""
        return self._ask(Asked(other, known)).message

    def finish(self, other: int, message: bytes) -> Secrets:
        """See Handshakes."""
        return _secrets(self._ask(Asked(other, message=message)))

    def answer(self, known: Known, message: bytes) -> tuple[bytes, Secrets]:
        """See Handshakes."""
        answered = self._ask(Asked(0, known, message))
        return answered.message, _secrets(answered)

    def close(self) -> None:
        """End the process, which has nothing that is worth waiting for."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, asked: Asked) -> Answered:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(msgspec.json.encode(asked) + b"\n")
            self._process.stdin.flush()
            answered = msgspec.json.decode(self._process.stdout.readline(), type=Answered)
        except (OSError, msgspec.MsgspecError) as error:
            raise StarError(
                "the process that makes this rank's handshakes has ended; see what is said above, and whether there is "
                "memory for it"
            ) from error
        if answered.wrong:
            raise HandshakeError
        return answered


def _secrets(answered: Answered) -> Secrets:
    assert answered.secrets is not None
    return answered.secrets
