"""A rank's handshakes with the others (see noise), made in a process that exits.

What they need, the package cryptography, takes 9 MB, which a rank would hold as long as it runs; the process has 30 MB, for
a moment. It gets keys and messages over its standard input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tpimpi.errors import StarError
from tpimpi.modules import without_module
from tpimpi.system.helper_process import EndedError, HelperProcess

with without_module("typing_extensions"):
    import msgspec

START_WAIT_S = 60.0  # on a machine whose disk is slow, or which does other things too
ANSWER_WAIT_S = 5.0  # which takes a millisecond


class HandshakeError(Exception):
    """The other side has not the key that it should have, or its message was changed on its way."""


@dataclass(frozen=True, repr=False)
class Secrets:
    """What both sides share after the handshake: 32 bytes for what the initiator sends, 32 for what the responder sends, and
    the hash of the handshake."""

    initiator: bytes
    responder: bytes
    hash: bytes


@dataclass(frozen=True, repr=False)
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


def open_handshakes(*, own_process: bool) -> Handshakes:
    """Made in a process of their own, which has begun; or in this one, where that is wanted, or there can be none."""
    if own_process:
        process = HandshakeProcess()
        if process.start():
            return process
    from tpimpi.system.noise import NoiseHandshakes

    return NoiseHandshakes()


class HandshakeProcess:
    """Handshakes that a process of their own makes. All raise StarError where that has ended."""

    def __init__(self) -> None:
        self._process = HelperProcess("tpimpi.system.handshake_process")

    def start(self) -> bool:
        """Returns False where there can be none."""
        return self._process.start(START_WAIT_S)

    def begin(self, other: int, known: Known) -> bytes:
        """See Handshakes; so are those below."""
        return self._ask(Asked(other, known)).message

    def finish(self, other: int, message: bytes) -> Secrets:
        """See Handshakes."""
        return _secrets(self._ask(Asked(other, message=message)))

    def answer(self, known: Known, message: bytes) -> tuple[bytes, Secrets]:
        """See Handshakes."""
        answered = self._ask(Asked(0, known, message))
        return answered.message, _secrets(answered)

    def close(self) -> None:
        """End it."""
        self._process.close()

    def _ask(self, asked: Asked) -> Answered:
        try:
            if not self._process.say(msgspec.json.encode(asked), START_WAIT_S):
                raise EndedError("could not be started")
            answer = self._process.hear(max_wait_s=ANSWER_WAIT_S)
        except EndedError as error:
            raise StarError(
                f"the process that makes this rank's handshakes {error}; see whether this machine has memory for it, and "
                "start again"
            ) from error
        answered = msgspec.json.decode(answer, type=Answered)
        if answered.wrong:
            raise HandshakeError
        return answered


def _secrets(answered: Answered) -> Secrets:
    assert answered.secrets is not None
    return answered.secrets
