"""The handshake against another implementation of the Noise Protocol Framework, in both roles, and what it refuses."""

from __future__ import annotations

import contextlib
import signal
import sys

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from noise.connection import Keypair, NoiseConnection

from tpimpi.errors import StarError
from tpimpi.system import handshakes
from tpimpi.system.handshake_process import answers
from tpimpi.system.handshakes import Answered, Asked, HandshakeError, HandshakeProcess, Known, Secrets, open_handshakes
from tpimpi.system.noise import MESSAGE_BYTES, PROTOCOL, Handshake, NoiseHandshakes

PROLOGUE = b"who, and where"


def _keys() -> tuple[bytes, bytes]:
    key = X25519PrivateKey.generate()
    return key.private_bytes_raw(), key.public_key().public_bytes_raw()


def _oracle(private: bytes, remote: bytes, *, initiator: bool) -> NoiseConnection:
    other = NoiseConnection.from_name(PROTOCOL)
    other.set_as_initiator() if initiator else other.set_as_responder()
    other.set_prologue(PROLOGUE)
    other.set_keypair_from_private_bytes(Keypair.STATIC, private)
    other.set_keypair_from_public_bytes(Keypair.REMOTE_STATIC, remote)
    other.start_handshake()
    return other


@pytest.mark.parametrize("initiator", [True, False])
def test_another_implementation_gets_the_same_keys(initiator: bool) -> None:
    (ours, our_public), (theirs, their_public) = _keys(), _keys()
    here = Handshake(Known(ours, their_public, PROLOGUE), initiator=initiator)
    there = _oracle(theirs, our_public, initiator=not initiator)
    if initiator:
        assert there.read_message(here.write_first()) == b""
        secrets = here.read_second(bytes(there.write_message()))
    else:
        here.read_first(bytes(there.write_message()))
        message, secrets = here.write_second()
        assert there.read_message(message) == b""
    assert there.handshake_finished
    protocol = there.noise_protocol
    assert there.get_handshake_hash() == secrets.hash
    sent, received = protocol.cipher_state_encrypt, protocol.cipher_state_decrypt
    theirs_first, ours_first = (
        (secrets.responder, secrets.initiator) if initiator else (secrets.initiator, secrets.responder)
    )
    assert (sent.k, received.k) == (theirs_first, ours_first)


def _shake(first: Handshake, second: Handshake, *, flip: int | None = None, at: int = 0) -> tuple[Secrets, Secrets]:
    """Both secrets; of message `flip` the byte `at` is changed on its way."""

    def carried(number: int, message: bytes) -> bytes:
        return bytes(b ^ (number == flip and place == at) for place, b in enumerate(message))

    second.read_first(carried(0, first.write_first()))
    message, theirs = second.write_second()
    return first.read_second(carried(1, message)), theirs


def _pair(prologues: tuple[bytes, bytes] = (PROLOGUE, PROLOGUE)) -> tuple[Handshake, Handshake]:
    (ours, our_public), (theirs, their_public) = _keys(), _keys()
    return (
        Handshake(Known(ours, their_public, prologues[0]), initiator=True),
        Handshake(Known(theirs, our_public, prologues[1]), initiator=False),
    )


def test_both_get_the_same_and_never_the_same_again() -> None:
    (ours, our_public), (theirs, their_public) = _keys(), _keys()
    seen = set()
    for _ in range(3):
        first = Handshake(Known(ours, their_public, PROLOGUE), initiator=True)
        one, other = _shake(first, Handshake(Known(theirs, our_public, PROLOGUE), initiator=False))
        assert one == other
        seen |= {one.initiator, one.responder}
    assert len(seen) == 6


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("at", [0, 31, 32, 47])
def test_a_changed_message_is_refused(flip: int, at: int) -> None:
    with pytest.raises(HandshakeError):
        _shake(*_pair(), flip=flip, at=at)


def test_another_prologue_is_refused() -> None:
    with pytest.raises(HandshakeError):
        _shake(*_pair((b"rank 1", b"rank 2")))


def test_who_has_not_the_key_is_refused() -> None:
    (ours, our_public), (_, their_public), (another, _) = _keys(), _keys(), _keys()
    first = Handshake(Known(ours, their_public, PROLOGUE), initiator=True)
    with pytest.raises(HandshakeError):
        _shake(first, Handshake(Known(another, our_public, PROLOGUE), initiator=False))
    first = Handshake(Known(another, our_public, PROLOGUE), initiator=True)  # who begins in another's name
    with pytest.raises(HandshakeError):
        _shake(first, Handshake(Known(ours, their_public, PROLOGUE), initiator=False))


@pytest.mark.parametrize("message", [b"", b"\5" * 47, b"\5" * 49, bytes(48), b"\1" + bytes(47)], ids=len)
def test_what_is_no_handshake_is_refused(message: bytes) -> None:
    """Among it keys of small order, whose product with every key is zero."""
    with pytest.raises(HandshakeError):
        _pair()[1].read_first(message)


def test_a_process_makes_the_same_handshakes() -> None:
    (ours, our_public), (theirs, their_public) = _keys(), _keys()
    here, there = Known(ours, their_public, PROLOGUE), Known(theirs, our_public, PROLOGUE)
    answered = answers()(msgspec.json.encode(Asked(1, here)))
    assert len(msgspec.json.decode(answered, type=Answered).message) == MESSAGE_BYTES
    with contextlib.closing(open_handshakes(own_process=True)) as process:
        assert isinstance(process, HandshakeProcess)
        answer, secrets = NoiseHandshakes().answer(there, process.begin(1, here))
        changed = bytes([answer[0] ^ 1, *answer[1:]])
        with pytest.raises(HandshakeError):
            process.finish(1, changed)
        answer, secrets = NoiseHandshakes().answer(there, process.begin(2, here))
        assert process.finish(2, answer) == secrets
        begun = NoiseHandshakes()
        first = begun.begin(0, there)
        with pytest.raises(HandshakeError):
            process.answer(here, first[:-1])
        answer, secrets = process.answer(here, first)
        assert begun.finish(0, answer) == secrets
        ended = process._process._process
        assert ended is not None
        ended.kill()
        with pytest.raises(
            StarError, match=r"^the process that makes this rank's handshakes was ended by SIGKILL; see"
        ):
            process.begin(1, here)
    assert ended.returncode is not None


def test_keys_are_in_no_message_of_an_error() -> None:
    key = bytes(range(65, 65 + 32))
    for holds in (
        Known(key, key, b""),
        Secrets(key, key, key),
        Asked(1, Known(key, key, b"")),
        Answered(b"", Secrets(key, key, key)),
    ):
        assert "ABCDEF" not in repr(holds)


@pytest.mark.parametrize("program", ["/nonexistent", "/bin/false", "/bin/true"])
def test_a_rank_makes_them_itself_where_no_process_begins(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert isinstance(open_handshakes(own_process=True), NoiseHandshakes)


def test_a_process_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "ANSWER_WAIT_S", 0.2)
    (ours, _), (_, their_public) = _keys(), _keys()
    with contextlib.closing(open_handshakes(own_process=True)) as process:
        assert isinstance(process, HandshakeProcess) and process._process._process is not None
        process._process._process.send_signal(signal.SIGSTOP)
        with pytest.raises(StarError, match="handshakes took more than 0 s"):
            process.begin(1, Known(ours, their_public, PROLOGUE))
