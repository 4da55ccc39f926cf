"""The process that makes a rank's handshakes: requests are handshakes.Asked, answers handshakes.Answered, as JSON."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tpimpi.system.handshakes import Answered, Asked, HandshakeError
from tpimpi.system.helper_process import serve
from tpimpi.system.noise import NoiseHandshakes


def answers() -> Callable[[bytes], str]:
    """What answers the requests of one rank."""
    handshakes = NoiseHandshakes()

    def answer(request: bytes) -> str:
        try:
            answered = _answer(handshakes, msgspec.json.decode(request, type=Asked))
        except HandshakeError:
            answered = Answered(wrong=True)
        return msgspec.json.encode(answered).decode()

    return answer


def _answer(handshakes: NoiseHandshakes, asked: Asked) -> Answered:
    if asked.known is None:
        return Answered(secrets=handshakes.finish(asked.other, asked.message or b""))
    if asked.message is None:
        return Answered(handshakes.begin(asked.other, asked.known))
    return Answered(*handshakes.answer(asked.known, asked.message))


if __name__ == "__main__":
    serve(answers())
