"""The ciphers of links: those of the extension and of the package make the same bytes, and refuse what does not fit."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

from tpimpi.star import ciphers
from tpimpi.star.ciphers import AES, CHACHA


@pytest.fixture(params=["OpenSSL's", "the package's"])
def ciphers_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Links have the ciphers of the system's OpenSSL, or those of the package cryptography."""
    if request.param == "the package's":
        monkeypatch.setattr(ciphers, "native_cipher", lambda: None)
    else:
        assert ciphers.native_cipher() is not None, "this machine's OpenSSL was not found"


@pytest.mark.parametrize("name", [AES, CHACHA])
@pytest.mark.parametrize("size", [0, 1, 2304, 100_001])
def test_messages_are_sealed_as_the_package_does(ciphers_of: None, name: str, size: int) -> None:
    """A message in one's own memory too; and where it is not what was sealed, nothing is handed out."""
    key, data = bytes(range(32)), np.random.default_rng(size).bytes(size)
    frame = np.empty(size + 16, np.uint8)
    ciphers.make_cipher(name, key, opens=False).seal(77, 1 << 40, np.frombuffer(data, np.uint8), frame)
    of_package = {AES: AESGCM, CHACHA: ChaCha20Poly1305}[name](key)
    nonce = (77).to_bytes(4, "little") + (1 << 40).to_bytes(8, "little")
    assert frame.tobytes() == of_package.encrypt(nonce, data, None)
    opening = ciphers.make_cipher(name, key, opens=True)
    for number, opens in ((1 << 40, True), (1 << 40 | 1, False), (1 << 40, True)):
        for into in (np.full(size, 7, np.uint8), frame.copy()[:size]):
            given = frame if into.base is None else into.base
            assert opening.open(77, number, given, into) is opens
            assert not opens or into.tobytes() == data


def test_the_extensions_cipher_refuses_what_does_not_fit() -> None:
    make = ciphers.native_cipher()
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
    ):
        with pytest.raises((ValueError, TypeError, BufferError)):
            call()
