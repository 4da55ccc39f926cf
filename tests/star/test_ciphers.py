"""The ciphers of links: those of the extension and of the package make the same bytes, and refuse what does not fit."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from tpimpi.star import ciphers
from tpimpi.star.ciphers import AES, CHACHA


@pytest.fixture(params=["OpenSSL's", "the package's"])
def ciphers_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links have the ciphers of the system's OpenSSL, or those of the package cryptography."""
    if request.param == "the package's":
        monkeypatch.setattr(ciphers, "native_cipher", lambda name: None)
    else:
        assert None not in map(ciphers.native_cipher, (AES, CHACHA)), "this machine's OpenSSL was not found"


@pytest.mark.parametrize("name", [AES, CHACHA])
def test_messages_are_sealed_as_the_package_does(ciphers_of: None, name: str) -> None:
    """One after the other by the same ciphers, of which some do not open; a message in one's own memory too."""
    key, dice = bytes(range(32)), np.random.default_rng(0)
    sealing, opening = (ciphers.make_cipher(name, key, opens=opens) for opens in (False, True))
    of_package = {AES: AESGCM, CHACHA: ChaCha20Poly1305}[name](key)
    for size in (2304, 0, 1, 100_001, 0, 15, 16, 17):
        tag, number, data = 0x01020304 + size, 0x0102030405060708 + size, dice.bytes(size)
        frame = np.empty(size + 16, np.uint8)
        sealing.seal(tag, number, np.frombuffer(data, np.uint8), frame)
        nonce = tag.to_bytes(4, "little") + number.to_bytes(8, "little")
        assert frame.tobytes() == of_package.encrypt(nonce, data, None)
        own = np.concatenate([np.frombuffer(data, np.uint8), np.zeros(16, np.uint8)])
        sealing.seal(tag, number, own[:size], own)
        assert own.tobytes() == frame.tobytes()
        for place in (0, size // 2, size, size + 15):  # of which a bit is changed
            changed = frame.copy()
            changed[place] ^= 4
            assert not opening.open(tag, number, changed, into := np.full(size, 7, np.uint8))
            assert not into.any(), "what nobody vouches for is not handed out"
        for other in ((tag + 1, number), (tag, number + 1)):
            assert not opening.open(*other, frame, into := np.full(size, 7, np.uint8))
            assert not into.any()
        for given, into in ((frame, np.empty(size, np.uint8)), (own, own[:size])):
            assert opening.open(tag, number, given, into)
            assert into.tobytes() == data


def test_the_extensions_cipher_refuses_what_does_not_fit() -> None:
    make = ciphers.native_cipher(AES)
    assert make is not None
    for name, key in (("AES-128-GCM", bytes(32)), (AES, bytes(16))):
        with pytest.raises((RuntimeError, ValueError)):
            make(name, key, False)
    sealing, opening = make(AES, bytes(32), False), make(AES, bytes(32), True)
    data, frame = np.zeros(8, np.uint8), np.zeros(24, np.uint8)
    for call in (
        lambda: sealing.seal(1, 1, data, frame[:23]),
        lambda: sealing.seal(1, 1, data, frame[::-1]),
        lambda: sealing.seal(1, 1, data, bytes(24)),
        lambda: sealing.seal(-1, 1, data, frame),
        lambda: sealing.seal(1, 1 << 64, data, frame),
        lambda: sealing.open(1, 1, frame, data),
        lambda: opening.seal(1, 1, data, frame),
        lambda: opening.open(1, 1, frame[:8], data),
        lambda: opening.open(1, 1, frame, bytes(8)),
        lambda: sealing.seal(1, 1, frame[1:9], frame),
        lambda: opening.open(1, 1, frame, frame[16:]),
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            call()


@pytest.mark.parametrize("missing", ["the extension", "OpenSSL"])
def test_the_package_takes_the_place_of_what_is_missing(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("there is no libcrypto")

    if missing == "the extension":
        monkeypatch.setitem(sys.modules, "tpimpi._native", None)
    else:
        monkeypatch.setattr("tpimpi._native.LinkCipher", fails)
    ciphers.native_cipher.cache_clear()
    try:
        assert isinstance(ciphers.make_cipher(AES, bytes(32), opens=True), ciphers.PackageCipher)
    finally:
        ciphers.native_cipher.cache_clear()
