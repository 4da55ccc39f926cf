"""The process that makes a rank's handshakes: requests of handshakes.Asked, a line each, answered on standard output."""

from __future__ import annotations

import sys
from typing import BinaryIO

import msgspec

from tpimpi.star.handshakes import Answered, Asked, HandshakeError
from tpimpi.star.noise import NoiseHandshakes
from tpimpi.system.core_dumps import turn_off_core_dumps


def answer_all(requests: BinaryIO, answers: BinaryIO) -> None:
    """Until there are no more requests."""
    handshakes = NoiseHandshakes()
    for line in requests:
        try:
            answered = _answer(handshakes, msgspec.json.decode(line, type=Asked))
        except HandshakeError:
            answered = Answered(wrong=True)
        answers.write(msgspec.json.encode(answered) + b"\n")
        answers.flush()


def _answer(handshakes: NoiseHandshakes, asked: Asked) -> Answered:
    if asked.known is None:
        return Answered(secrets=handshakes.finish(asked.other, asked.message or b""))
    if asked.message is None:
        return Answered(handshakes.begin(asked.other, asked.known))
    return Answered(*handshakes.answer(asked.known, asked.message))


if __name__ == "__main__":
    turn_off_core_dumps()
    answer_all(sys.stdin.buffer, sys.stdout.buffer)
